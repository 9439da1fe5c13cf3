"""How busy the GPU is while steps follow each other, by what Nsight Systems saw run on it."""
import contextlib
import glob
import shutil
import sqlite3

from session import Failure

PLACES = ["/usr/local/cuda*/bin/nsys", "/opt/nvidia/nsight-systems*/*/bin/nsys", "/opt/nvidia/nsight-systems*/bin/nsys"]
# Of `copyKind`: to the device, and from it. Those go over the bus on a stream of their own, and hide no gap between kernels.
OVER_THE_BUS = (1, 2)
# Of a row of steps, what is looked at.
LAST_PART = 0.8


def tool(run):
    if run.args.rehearse:
        return None  # sees nothing of the emulator
    found = [path for place in PLACES for path in sorted(glob.glob(place))]
    return shutil.which("nsys") or (found[-1] if found else None)


def traced(run, tool, command, name):
    """Runs a command under nsys: a database of what ran on the device, every node of a graph by itself."""
    report, database = run.scratch / f"{name}.nsys-rep", run.scratch / f"{name}.sqlite"
    run.command([tool, "profile", "--trace=cuda", "--sample=none", "--cpuctxsw=none", "--cuda-graph-trace=node",
                 "--force-overwrite=true", f"--output={report}", *command])
    run.command([tool, "export", "--type=sqlite", "--force-overwrite=true", f"--output={database}", report])
    return database


def activities(path):
    """(start, end, node of a graph or None, counts), in nanoseconds, of the device that ran graphs."""
    found = []
    with contextlib.closing(sqlite3.connect(path)) as database:
        for table in ("KERNEL", "MEMCPY", "MEMSET"):
            table = f"CUPTI_ACTIVITY_KIND_{table}"
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            if not columns:
                continue  # tables without rows are not written
            # An older one does not tell nodes.
            node = "graphNodeId" if "graphNodeId" in columns else "NULL"
            kind = "copyKind" if "copyKind" in columns else "NULL"
            for start, end, device, node, kind in database.execute(
                    f"SELECT start, end, deviceId, {node}, {kind} FROM {table}"):
                found.append((start, end, device, node or None, kind not in OVER_THE_BUS, table.endswith("KERNEL")))
    devices = {device for _, _, device, node, _, is_kernel in found if node and is_kernel}
    if len(devices) != 1:
        raise Failure(f"nsys: expected kernels of graphs on one device, found them on {len(devices)}")
    return [(start, end, node, counts) for start, end, device, node, counts, _ in found if device in devices]


def union(intervals):
    """The length of what is in at least one of them."""
    length, reached = 0, None
    for start, end in sorted(intervals):
        start = start if reached is None else max(start, reached)
        if end > start:
            length, reached = length + end - start, end
    return length


def busy(path, seconds, calls):
    """Seconds of a step, and how much of it something ran, the bus left out, of a trace whose last graphs are those of a row of so many steps
    of so many seconds each by the host's clock.

    Of that row the last part: the first steps wait for their pictures, as none does in training.
    """
    found = activities(path)
    until = max(end for _, end, node, counts in found if node and counts)
    length = LAST_PART * 1e9 * seconds * calls
    since = until - length
    ran = union((max(start, since), min(end, until)) for start, end, _, counts in found if counts and start < until and end > since)
    return {"calls": calls, "step": seconds, "ran": seconds * ran / length}
