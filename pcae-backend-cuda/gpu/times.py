"""How fast is it: steps and forwards beside PyTorch, taking turns, and where the time goes."""
import functools
import json
import re

import nsys
from contenders import Ours, fastest, launch_faults, peers, race, ratio
from session import NO_FP8, Failure

# Width, blocks and heads of the decoders: the method's, as wide as the encoder, and MAE's.
DECODERS = {"vit-micro": [96, 2, 3], "vit-b16": [768, 2, 12], "vit-l16": [1024, 2, 16], "vit-h14": [1280, 2, 16]}
MAE_DECODER = [512, 8, 16]
PCAE_MASK, MAE_MASK = 0.85, 0.75
DROP_RATIOS = [0.0, 0.4]
# Seconds that a launch takes at least, by its bytes, to be judged: events and the launch itself take microseconds.
SHORTEST = 10e-6
# Steps of a row in which how busy the GPU is can be seen.
LEAST_STEPS = 5
# Dense bf16 without sparsity, in GFLOP/s, by what a device's name has in it: NVIDIA's data sheets.
NOMINAL = [("H100 PCIe", 756e3), ("H100 NVL", 835e3), ("H100", 989e3), ("H200 NVL", 835e3), ("H200", 989e3), ("A100", 312e3)]


# ---------------------------------------------------------------- a step

def pcae_step(args, batch):
    return dict(what="step", model=args.model, batch=batch, precision=args.precision, method="pcae", mask_ratio=PCAE_MASK,
                decoder=DECODERS[args.model])


def mae_step(args, batch):
    # Its own decoder, or for small pictures the method's.
    decoder = DECODERS["vit-micro"] if args.model == "vit-micro" else MAE_DECODER
    return pcae_step(args, batch) | dict(method="mae", mask_ratio=MAE_MASK, decoder=decoder)


def forward(args, batch, drop_ratio):
    return dict(what="infer", model=args.model, batch=batch, precision=args.precision, drop_ratio=drop_ratio)


def step_contenders(run, batch):
    """Ours, and PyTorch's variants, of a step of so many pictures."""
    args = run.args
    pcae, mae = pcae_step(args, batch), mae_step(args, batch)
    ours = [Ours(run, name + label, one | more) for name, one in (("pcae", pcae), ("mae", mae))
            for label, more in (("", {}), (" --tune", {"tune": True}))]
    if has_fp8(run):
        ours.append(Ours(run, "pcae, fp8 teacher", pcae | {"teacher": "fp8"}))
    return ours + peers(run, [("", pcae)])


@functools.cache
def has_fp8(run):
    """Whether this program knows such teachers, which go beside bf16."""
    return run.args.precision == "bf16" and "fp8" in run.command(run.ours("bench", "--help"))


def has_finetune(run):
    """Whether this program times steps of fine-tuning."""
    return re.search(r"^\s*- finetune\b", run.command(run.ours("bench", "--help")), re.MULTILINE) is not None


def step(run, results):
    """Each contender once at every batch size, and then all rounds of each at its best. In between none is left to hold memory."""
    args, best, last = run.args, {}, 0.0
    for batch in sorted(args.batch_size, key=lambda batch: abs(batch - 256)):
        # This size, and the best ones again.
        if best and run.left() < 2.5 * last + args.rounds * 10 * args.seconds:
            run.report.say(f"  batch {batch} is left out: no time")
            continue
        before = run.left()
        run.report.say(f"  step, {args.model}, batch {batch}, {args.precision}, one round")
        everyone = step_contenders(run, batch)
        found = race(run, everyone, 1)
        results |= {f"batch {batch}, {name}": one for name, one in found.items()}
        for one in everyone:
            rate = found[one.name].get("images_per_s", {"median": 0.0})["median"]
            if rate > best.get(one.name, (0.0, None))[0]:
                best[one.name] = (rate, one)
        last = before - run.left()
        run.report.save()
    run.report.say(f"  step, {args.model}, {args.precision}, each at its best batch")
    found = race(run, [one for _, one in best.values()], args.rounds)
    results |= {f"best, {name}": one for name, one in found.items()}
    if not fastest(without_fp8(found), "pcae"):
        reasons = [one["reason"] for name, one in found.items() if name.startswith("pcae") and "reason" in one]
        raise Failure("; ".join(reasons) or "ours ran at no batch size")
    step_targets(run, results, found)
    graphs(run, results, found)
    share_of_peak(run, results, found)


def is_asked(run):
    """Whether the targets are about this model and precision; a rehearsal fills them in all the same."""
    return run.args.rehearse or (run.args.model, run.args.precision) == ("vit-b16", "bf16")


def without_fp8(found):
    """Those without a teacher in fp8."""
    return {name: one for name, one in found.items() if "fp8" not in name}


def step_targets(run, results, found):
    """Ours, tuned or not, over the fastest of PyTorch's and over our own MAE."""
    ours = fastest(without_fp8(found), "pcae")
    for target, above, below, least in [
            ("step over PyTorch", ours, fastest(found, "torch"), 1.5),
            ("step over MAE", ours, fastest(found, "mae"), 2.0),
            ("step with fp8 teacher over MAE", fastest(found, "pcae, fp8 teacher"), fastest(found, "mae"), 2.25)]:
        compare(run, results, found, target, above, below, least)
    if is_asked(run):
        target = "step with fp8 teacher over MAE"
        refused = next((one for one in results.values() if one["status"] == "not available"), None)
        if not has_fp8(run):
            run.report.found(target, "this program has no fp8 teacher", False)
        elif refused:
            run.report.found(target, refused["reason"], None)


def compare(run, results, found, target, above, below, least, label=""):
    """The ratio of two contenders, and the target that is about it."""
    if not (above and below):
        return
    value = ratio(found, above, below)
    batches = [found[name]["case"]["batch"] for name in (above, below)]
    says = (f"{value['median']:.2f} ({value['least']:.2f}-{value['greatest']:.2f}): {above}, batch {batches[0]}, over {below},"
            f" batch {batches[1]}")
    results[f"{label}{above} over {below}"] = {"status": "passed", "ratio": value, "says": says}
    run.report.say(f"    {says}")
    if target and is_asked(run):
        run.report.at_least(target, least, value["median"], says)


def graphs(run, results, found, label=""):
    """Whether all of ours ran as graphs and by cuBLASLt; the target is about what every part has last found."""
    def check():
        faults = [fault for name, one in ours.items() for fault in launch_faults(name, one, run.args.model)]
        if faults:
            raise Failure("; ".join(faults))
        return {"says": f"none of {len(ours)} contenders", "is_asked": is_asked(run)}
    ours = {name: one for name, one in found.items() if not name.startswith("torch") and one["status"] == "passed"}
    # Of none nothing is known, and each has said why.
    if ours:
        run.each(results, f"{label}graphs and products", check)
    checks = [one for part in run.report.data["parts"].values() for name, one in part["results"].items()
              if name.endswith("graphs and products")]
    faults = [one["reason"] for one in checks if one["status"] == "failed"]
    asked = [one["says"] for one in checks if one.get("is_asked")]
    if faults:
        run.report.found("graphs", "; ".join(faults), False)
    elif asked:
        run.report.found("graphs", asked[-1], True)
    else:
        run.report.data["targets"].pop("graphs", None)


def share_of_peak(run, results, found):
    """The share of the device's peak, of its data sheet where that is known, and of what PyTorch's matrix product reaches."""
    def shares():
        best = found[fastest(without_fp8(found), "pcae")]
        gflops = best["images_per_s"]["median"] * best["gflop_per_image"]
        measured = run.limits()[f"{run.args.precision}_gflops"]
        name = run.has_torch()["device"] or ""
        nominal = next((peak for part, peak in NOMINAL if part in name and run.args.precision == "bf16"), None)
        says = f"{gflops:.0f} GFLOP/s, {100 * gflops / measured:.1f} % of PyTorch's matrix product"
        if nominal:
            says += f", {100 * gflops / nominal:.1f} % of the {nominal:.0f} of {name}'s data sheet"
        if is_asked(run):
            run.report.at_least("step of peak", 0.45, gflops / (nominal or measured), says)
        return {"says": says, "gflops": gflops, "measured_peak": measured, "nominal_peak": nominal}
    if run.args.variants:
        run.each(results, "share of peak", shares)


# ---------------------------------------------------------------- a forward

def infer(run, results):
    args = run.args
    for batch in args.infer_batch:
        cases = [(f" drop {drop_ratio}", forward(args, batch, drop_ratio)) for drop_ratio in DROP_RATIOS]
        ours = [Ours(run, f"pcae{label}{tuned}", case | {"tune": bool(tuned)}) for label, case in cases
                for tuned in ("", " --tune")]
        run.report.say(f"  infer, {args.model}, batch {batch}, {args.precision}")
        found = race(run, ours + peers(run, cases), args.rounds)
        results |= {f"batch {batch}, {name}": one for name, one in found.items()}
        run.report.save()
        # A rehearsal has small batches only.
        size = batch if not args.rehearse else ([1, 256] + args.infer_batch)[args.infer_batch.index(batch)]
        target = f"infer {size}" if size in (1, 256) else None
        dense, less = (f"pcae{label}" for label, _ in cases)
        label = f"batch {batch}, "
        compare(run, results, found, target, fastest(found, less), fastest(found, dense), 1.75, label)
        for these, goal in ((less, target and f"{target} over PyTorch"), (dense, None)):
            torch = {name: one for name, one in found.items() if name.startswith("torch") and name.endswith(these[4:])}
            compare(run, results, found, goal, fastest(found, these), fastest(torch, "torch"), 1.0, label)
        graphs(run, results, found, label)


# ---------------------------------------------------------------- where the time goes

def taken_apart(run):
    """What together launches all kernels there are, by name."""
    args = run.args
    batch, infer_batch = args.breakdown_batch, args.infer_batch[-1]
    pcae = pcae_step(args, batch)
    cases = {"step": pcae, "forward": forward(args, infer_batch, DROP_RATIOS[0]),
             f"forward, drop {DROP_RATIOS[1]}": forward(args, infer_batch, DROP_RATIOS[1]), "MAE step": mae_step(args, batch)}
    if has_fp8(run):
        cases["step, fp8 teacher"] = pcae | {"teacher": "fp8"}
    if has_finetune(run):
        cases["fine-tuning step"] = forward(args, batch, DROP_RATIOS[1]) | {"what": "finetune"}
    return {f"{name}, batch {case['batch']}": case for name, case in cases.items()}


def breakdown(run, results):
    found = {}
    for number, (name, case) in enumerate(taken_apart(run).items()):
        def bench():
            ours = Ours(run, f"breakdown {number}", case)
            try:
                run.command(ours.command + ["--repeats", run.args.rounds, "--breakdown"])
            except Failure as failure:
                if NO_FP8 in str(failure):
                    return {"status": "not available", "says": str(failure)}
                raise
            return {"bench": json.loads(ours.json.read_text())}
        result = run.each(results, name, bench)
        # What this device does not do has no kernels here.
        if result["status"] != "not available":
            found[name] = result.get("bench")
        if case == pcae_step(run.args, case["batch"]) and found[name]:
            busy(run, results, found[name]["results"][0])
    bandwidth(run, results, found)


def bandwidth(run, results, reports):
    """The share of a copy's bandwidth of each kernel that memory bounds, by its bytes. Shorter ones than a launch and the events around
    it are told and not judged. `reports` are those of `pcae bench --breakdown`, or `None` where it failed."""
    least, judged, short, silent = 0.8, {}, {}, []
    for name, report in reports.items():
        kernels = report and report["results"][0].get("kernels")
        if not kernels:
            silent.append(name)
            continue
        copied = 1e9 * report["machine"]["copy_gbytes_per_s"]["cuda"]
        for kernel in kernels:
            if kernel.get("bytes") is None:
                continue  # not bound by memory
            takes = kernel["bytes"] / kernel["launches"] / copied
            into = judged if takes >= SHORTEST else short
            into[f"{kernel['kernel']} ({name})"] = {"share": kernel["bytes"] / kernel["seconds"] / copied, "copy": takes}
    for kernels, what in ((judged, ""), (short, f"; not judged, as it is less than {1e6 * SHORTEST:.0f} us")):
        for name, one in sorted(kernels.items(), key=lambda item: item[1]["share"]):
            run.report.say(f"    {100 * one['share']:6.1f} % of a copy's bandwidth: {name}, a launch of which a copy makes in"
                           f" {1e6 * one['copy']:.1f} us{what}")
    results["bandwidth"] = {"status": "passed", "judged": judged, "short": short, "silent": silent}
    if not is_asked(run):
        return
    ordered = sorted(judged, key=lambda name: judged[name]["share"])
    says, met = [], None
    if ordered:
        percent = lambda name: f"{100 * judged[name]['share']:.0f} %"
        slow = [f"{name} {percent(name)}" for name in ordered if judged[name]["share"] < least]
        met = not slow
        says = [f"{percent(ordered[0])} {ordered[0]}, of {len(judged)}, {len(short)} too short to judge"]
        says += [f"below: {', '.join(slow)}"] if slow else []
    elif short:
        says = [f"all {len(short)} are too short to judge"]
    if silent:
        # Those might be slower.
        met, says = met and None, says + [f"no kernels are told of {', '.join(silent)}"]
    run.report.found("bandwidth", "; ".join(says) or "no kernel is bound by memory", met)


def busy(run, results, bench):
    """How much of a step's time something runs on the GPU. `bench` is what was found of it operation by operation."""
    least = 0.97

    def look():
        alone, share = busy_at_most(bench)
        bound = {"says": f"at most {100 * min(1.0, share):.1f} % (operations alone {1e3 * alone:.2f} ms, a step"
                         f" {1e3 * bench['seconds']:.2f} ms)", "met": False if share < least else None}
        tool = nsys.tool(run)
        if not tool:
            return bound | {"says": f"{bound['says']}; nsys, which would tell, was not found"}
        try:
            found = busy_traced(run, tool)
        except Failure as failure:
            return bound | {"status": "not available", "says": f"{bound['says']}; {failure}"}
        low, high = found["ran"] / found["step"], found["ran"] / found["untraced_step"]
        says = (f"{100 * low:.1f} % by nsys, {100 * high:.1f} % less what tracing adds ({1e3 * found['ran']:.2f} ms of"
                f" {1e3 * found['step']:.2f} or {1e3 * found['untraced_step']:.2f} ms, batch {found['batch']}, {found['calls']} steps)")
        return found | {"says": says, "met": True if low >= least else False if high < least else None}
    result = run.each(results, "busy", look)
    if is_asked(run) and "met" in result:
        run.report.found("busy", result["says"], result["met"])


def busy_at_most(bench):
    """The sum of all operations, each timed alone by the device's clock, and its share of the time of a step in a row of graphs by the
    host's. What crosses the bus is left out, as it goes on a stream of its own. Alone an operation takes longer, by its launch and as it
    finds less in the cache. So a share below the target is a miss, and one above it tells nothing."""
    alone = sum(part["seconds"] for part in bench["breakdown"] if part["operation"] != "transfer")
    return alone, alone / bench["seconds"]


def busy_traced(run, tool):
    """A row of steps with and without nsys, which makes the gaps between kernels longer and not the kernels: what it adds to a step by the
    host's clock is taken off a step of the trace, too. That leaves a least and a greatest share."""
    batch = run.args.breakdown_batch
    while batch:
        ours = Ours(run, "busy", pcae_step(run.args, batch))
        # One row, behind which nothing runs.
        command = ours.command + ["--repeats", 1]

        def timed():
            one = json.loads(ours.json.read_text())["results"][0]
            return one["seconds"], one["calls"]
        run.command(command)
        untraced, calls = timed()
        if calls >= LEAST_STEPS:
            database = nsys.traced(run, tool, command, f"busy-{batch}")
            seconds, calls = timed()
            if calls >= LEAST_STEPS:
                found = nsys.busy(database, seconds, calls)
                return found | {"batch": batch, "untraced_step": max(min(untraced, seconds), found["ran"])}
        # In steps of fewer pictures, more of which make a row, gaps weigh more.
        batch //= 2
    raise Failure(f"nsys: no row of {LEAST_STEPS} steps")
