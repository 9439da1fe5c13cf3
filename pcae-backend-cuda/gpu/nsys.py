"""How busy the GPU is while steps follow each other, by what Nsight Systems saw run on it."""
import contextlib
import glob
import shutil
import sqlite3

from session import Failure

PLACES = ["/usr/local/cuda*/bin/nsys", "/opt/nvidia/nsight-systems*/*/bin/nsys", "/opt/nvidia/nsight-systems*/bin/nsys"]
# Of `copyKind`: to the device, and from it. Those go over the bus on a stream of their own, and hide no gap between kernels.
OVER_THE_BUS = (1, 2)


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
    """(start, end, stream, node of a graph or None, counts) by start, in nanoseconds, of the device that ran graphs."""
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
            for start, end, device, stream, node, kind in database.execute(
                    f"SELECT start, end, deviceId, streamId, {node}, {kind} FROM {table}"):
                found.append((start, end, device, stream, node or None, kind not in OVER_THE_BUS, table.endswith("KERNEL")))
    devices = {one[2] for one in found if one[4] and one[6]}
    if len(devices) != 1:
        raise Failure(f"nsys: expected kernels of graphs on one device, found them on {len(devices)}")
    return sorted((start, end, stream, node, counts) for start, end, device, stream, node, counts, _ in found if device in devices)


def union(intervals):
    """The length of what is in at least one of them."""
    length, reached = 0, None
    for start, end in sorted(intervals):
        start = start if reached is None else max(start, reached)
        if end > start:
            length, reached = length + end - start, end
    return length


def rows_of_steps(found):
    """Rows of steps that follow each other, as the times at which the same kernel of each began.

    That is the kernel of a graph that takes longest in all. `pcae bench` warms up first, and waits in between. From then on it measures the
    peak before each row, on a stream that was not there while it warmed up, which tells the rows apart; a row waits for nothing.
    """
    spent = {}
    for start, end, _, node, _ in found:
        if node:
            spent[node] = spent.get(node, 0) + end - start
    longest = max(spent, key=spent.get)
    begins = [start for start, _, _, node, _ in found if node == longest]
    if len(begins) < 2:
        return []
    own = {stream for start, _, stream, _, _ in found if start < begins[1]}
    others = [start for start, _, stream, node, _ in found if not node and stream not in own]
    rows = {}
    for begin in begins:
        measured = sum(other < begin for other in others)
        if measured:
            rows.setdefault(measured, []).append(begin)
    return [row for row in rows.values() if len(row) > 1]


def busy(path):
    """Seconds of a step, and how much of it something ran, the bus left out, from the first to the last of each row of steps; `None` if
    there is no row."""
    found = activities(path)
    rows = rows_of_steps(found)
    steps = sum(len(row) - 1 for row in rows)
    if not steps:
        return None
    length = sum(row[-1] - row[0] for row in rows)
    ran = sum(union((max(start, row[0]), min(end, row[-1])) for start, end, _, _, counts in found
                    if counts and start < row[-1] and end > row[0]) for row in rows)
    return {"steps": steps, "rows": len(rows), "step": 1e-9 * length / steps, "ran": 1e-9 * ran / steps}
