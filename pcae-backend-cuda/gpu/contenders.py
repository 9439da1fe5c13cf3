"""Who is timed: ours in a fresh process each time, PyTorch's variants each in a process that waits for its turn."""
import json
import os
import queue
import statistics
import subprocess
import threading
import time

from session import HERE, NO_FP8, NO_TIME, Failure, NoTime, children, end

VARIANTS = ["eager", "compile", "graphs", "autotune"]


class Ours:
    """`pcae bench` in a fresh process each time."""

    def __init__(self, run, name, case):
        self.run, self.name, self.case, self.timing, self.facts = run, name, case, None, {}
        self.json = run.scratch / f"{name.replace(' ', '-')}-{case['batch']}.json"
        self.command = run.ours("bench", "--backend", "cuda", "--what", case["what"], "--model", case["model"],
                                "--batch-size", case["batch"], "--precision", case["precision"], "--json", self.json)
        if case["what"] in ("infer", "finetune"):
            self.command += ["--drop-ratio", case["drop_ratio"]]
        else:
            width, depth, heads = case["decoder"]
            self.command += ["--method", case["method"], "--mask-ratio", case["mask_ratio"]]
            for setting in (f"decoder_embed_dim={width}", f"decoder_depth={depth}", f"decoder_num_heads={heads}"):
                self.command += ["--set", setting]
        if case.get("tune"):
            self.command.append("--tune")
        if case.get("teacher"):
            self.command += ["--teacher-precision", case["teacher"]]

    def start(self):
        pass

    def ready(self):
        self.sample(0)  # tells how many timings fit in a sample; not counted

    def sample(self, seconds):
        repeats = max(1, int(seconds / self.timing)) if self.timing else 1
        self.run.command(self.command + ["--repeats", repeats])
        result = json.loads(self.json.read_text())["results"][0]
        took = self.case["batch"] / result["images_per_s"]
        self.timing = took * result["calls"]  # some calls each
        self.facts = {"gflop_per_image": result["gflops"] / result["images_per_s"], "share_of_peak": result.get("share_of_peak"),
                      "planned_bytes": result.get("planned_bytes"), "launches": result.get("launches"),
                      "warnings": result.get("warnings", [])}
        return took

    def close(self):
        pass


class Peer:
    """A variant of PyTorch's, in a process of its own."""

    def __init__(self, run, name, case):
        self.run, self.name, self.case, self.facts, self.process = run, name, case, {}, None
        self.errors = run.scratch / f"{name.replace(' ', '-')}.err"

    def start(self):
        command = [self.run.args.python, HERE / "peer.py", "--worker", json.dumps(self.case)]
        with self.errors.open("w") as errors:
            self.process = children(command, env=os.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        self.lines = queue.Queue()
        # What a process says that was closed is not taken for what the next one says.
        threading.Thread(target=self.read, args=(self.process.stdout, self.lines), daemon=True).start()

    @staticmethod
    def read(pipe, lines):
        for line in pipe:
            lines.put(line.strip())
        lines.put(None)

    def answer(self):
        try:
            line = self.lines.get(timeout=max(1.0, self.run.left()))
        except queue.Empty:
            raise NoTime(NO_TIME) from None
        if line is None:
            said = [line for line in self.errors.read_text().splitlines() if line.strip()]
            self.run.report.note("\n".join(said))
            raise Failure(f"ended: {said[-1] if said else 'without a word'}")
        return line

    def ready(self):
        while self.answer() != "ready":
            pass

    def sample(self, seconds):
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        found = json.loads(self.answer())
        self.facts = {"memory_bytes": found["memory"]}
        return found["seconds"]

    def close(self):
        if self.process:
            end(self.process)
            for pipe in (self.process.stdin, self.process.stdout):
                try:
                    pipe.close()
                except (BrokenPipeError, ValueError):
                    pass
            self.process = None


def spread(values):
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def peers(run, cases):
    """PyTorch's variants of each case, none if there is no PyTorch."""
    if not run.args.variants:
        return []
    try:
        run.has_torch()
    except Failure as failure:
        run.report.say(f"  without PyTorch: {failure}")
        return []
    device = "cpu" if run.args.rehearse else "cuda"
    # Where there are several cases a variant of each.
    return [Peer(run, f"torch {variant}{label}", case | {"variant": variant, "device": device})
            for label, case in cases for variant in run.args.variants]


def failed(run, one, failure):
    """The result of a contender that failed; one that has no room, or is not for this device, is no failure of ours."""
    run.report.say(f"    {one.name}, batch {one.case['batch']}: {failure}")
    text, status = str(failure), "failed"
    if any(words in text for words in ("no memory on the device", "out of memory", "OutOfMemory")):
        status = "no memory"
    elif NO_FP8 in text:
        status = "not available"
    elif isinstance(failure, NoTime):
        status = "no time"
    return {"status": status, "reason": text, "case": one.case}


def prepare(run, contenders, results):
    """Starts all; those that are ready. What happens to the others is in `results`."""
    running = []
    for one in contenders:
        one.start()
    for one in contenders:
        try:
            one.ready()
            running.append(one)
        except Failure as failure:
            results[one.name] = failed(run, one, failure)
            one.close()
    return running


def take_turns(run, running, results, rounds):
    """All rounds: a result for each contender that is ready."""
    running = list(running)
    rates = {one.name: [] for one in running}
    longest = 0.0
    for turn in range(rounds):
        began = time.monotonic()
        if turn and run.left() < 1.2 * longest:
            run.report.say(f"    after {turn} of {rounds} rounds: no time left")
            break
        first = turn % max(1, len(running))
        for one in running[first:] + running[:first]:
            try:
                rates[one.name].append(one.case["batch"] / one.sample(run.args.seconds))
            except Failure as failure:
                results[one.name] = failed(run, one, failure)
                running.remove(one)
        longest = max(longest, time.monotonic() - began)
    for one in running:
        results[one.name] = {"status": "passed", "images_per_s": spread(rates[one.name]),
                             "samples": rates[one.name], "case": one.case} | one.facts
        rate = results[one.name]["images_per_s"]
        run.report.say(f"    {one.name:<24} batch {one.case['batch']:<4} {rate['median']:>11.2f} images/s"
                       f" ({rate['least']:.2f}-{rate['greatest']:.2f}, {len(rates[one.name])} rounds)")
    return results


def race(run, contenders, rounds):
    """Starts all, lets those that are ready take turns, and ends all, whatever happens. A result for each."""
    results = {}
    try:
        return take_turns(run, prepare(run, contenders, results), results, rounds)
    finally:
        for one in contenders:
            one.close()


def passed(results, prefix):
    """The results of contenders whose name begins so, that have a rate."""
    return {name: one for name, one in results.items() if name.startswith(prefix) and one["status"] == "passed"
            and "images_per_s" in one}


def fastest(results, prefix):
    """The name of the fastest contender whose name begins so, if there is one."""
    found = passed(results, prefix)
    return max(found, key=lambda name: found[name]["images_per_s"]["median"], default=None)


def ratio(results, above, below):
    """The ratio of the medians, with the least and the greatest of any one round."""
    samples = [results[name]["samples"] for name in (above, below)]
    each = spread([a / b for a, b in zip(*samples)])
    each["median"] = statistics.median(samples[0]) / statistics.median(samples[1])
    return each


def launch_faults(name, one, model):
    """What is wrong with how ours ran: graphs that were refused, and in a step of ViT-B/16 products by our plain kernel."""
    launches = one.get("launches") or {}
    faults = []
    if launches.get("refused"):
        faults.append(f"{launches['refused']} graphs were refused")
    if launches.get("own_products") and model == "vit-b16":
        faults.append(f"{launches['own_products']} products by the plain kernel")
    if not launches.get("graphs"):
        faults.append("no work ran as a graph")
    return [f"{name}: {fault}: {' | '.join(one.get('warnings', []))}" for fault in faults]
