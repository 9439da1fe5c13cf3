"""How fast is it: steps and forwards beside PyTorch, taking turns, and where the time goes."""
import functools
import json

from contenders import Ours, fastest, launch_faults, peers, race, ratio
from session import Failure

# Width, blocks and heads of the decoders: the method's, as wide as the encoder, and MAE's.
DECODERS = {"vit-micro": [96, 2, 3], "vit-b16": [768, 2, 12], "vit-l16": [1024, 2, 16], "vit-h14": [1280, 2, 16]}
MAE_DECODER = [512, 8, 16]
PCAE_MASK, MAE_MASK = 0.85, 0.75
DROP_RATIOS = [0.0, 0.4]
# Dense bf16 without sparsity, in GFLOP/s, by what a device's name has in it: NVIDIA's data sheets.
NOMINAL = [("H100 PCIe", 756e3), ("H100 NVL", 835e3), ("H100", 989e3), ("H200 NVL", 835e3), ("H200", 989e3), ("A100", 312e3)]


# ---------------------------------------------------------------- a step

def step_contenders(run, batch):
    """Ours, and PyTorch's variants, of a step of so many pictures."""
    args = run.args
    case = dict(what="step", model=args.model, batch=batch, precision=args.precision)
    pcae = case | dict(method="pcae", mask_ratio=PCAE_MASK, decoder=DECODERS[args.model])
    # MAE's own decoder, or for small pictures the method's.
    decoder = DECODERS["vit-micro"] if args.model == "vit-micro" else MAE_DECODER
    mae = case | dict(method="mae", mask_ratio=MAE_MASK, decoder=decoder)
    ours = [Ours(run, name + label, one | more) for name, one in (("pcae", pcae), ("mae", mae))
            for label, more in (("", {}), (" --tune", {"tune": True}))]
    if has_fp8(run):
        ours.append(Ours(run, "pcae, fp8 teacher", pcae | {"teacher": "fp8"}))
    return ours + peers(run, [("", pcae)])


@functools.cache
def has_fp8(run):
    """Whether this program knows such teachers, which go beside bf16."""
    return run.args.precision == "bf16" and "fp8" in run.command(run.ours("bench", "--help"))


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
        cases = [(f" drop {drop_ratio}", dict(what="infer", model=args.model, batch=batch, precision=args.precision,
                                              drop_ratio=drop_ratio)) for drop_ratio in DROP_RATIOS]
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

def breakdown(run, results):
    args, shares = run.args, {}
    for what, batch in [("step", args.breakdown_batch), ("infer", args.infer_batch[-1])]:
        def bench():
            path = run.scratch / f"breakdown-{what}.json"
            width, depth, heads = DECODERS[args.model]
            decoder = [word for setting in (f"decoder_embed_dim={width}", f"decoder_depth={depth}", f"decoder_num_heads={heads}")
                       for word in ("--set", setting)] if what == "step" else []
            run.command(run.ours("bench", "--backend", "cuda", "--what", what, "--model", args.model, "--mask-ratio",
                                 PCAE_MASK, *decoder, "--batch-size", batch, "--precision", args.precision, "--repeats",
                                 args.rounds, "--breakdown", "--json", path))
            report = json.loads(path.read_text())
            for part in report["results"][0]["breakdown"]:
                if part.get("share_of_bandwidth") is not None:
                    shares[f"{part['operation']} ({what}, batch {batch})"] = part["share_of_bandwidth"]
            if what == "step":
                busy(run, report["results"][0])
            return {"bench": report}
        run.each(results, f"{what}, batch {batch}", bench)
    if shares:
        ordered = sorted(shares, key=shares.get)
        for name in ordered:
            run.report.say(f"    {100 * shares[name]:6.1f} % of a copy's bandwidth: {name}")
        results["bandwidth"] = {"status": "passed", "shares": shares}
        if is_asked(run):
            slow = ", ".join(f"{name} {100 * shares[name]:.0f} %" for name in ordered if shares[name] < 0.8)
            run.report.at_least("bandwidth", 0.8, shares[ordered[0]],
                                f"{100 * shares[ordered[0]]:.0f} % {ordered[0]}" + (f"; below: {slow}" if slow else ""))


def busy(run, result):
    """A bound on how much of a step's time kernels run: the sum of all operations, each timed alone by the device's clock, over the time
    of a step in a row of graphs by the host's. What crosses the bus is left out, as it goes on a stream of its own. Alone an operation
    takes longer, by its launch and as it finds less in the cache. So less than the target is a miss, and more tells nothing."""
    alone = sum(part["seconds"] for part in result["breakdown"] if part["operation"] != "transfer")
    share = alone / result["seconds"]
    says = f"at most {100 * min(1.0, share):.1f} % (operations alone {1e3 * alone:.2f} ms, a step {1e3 * result['seconds']:.2f} ms)"
    run.report.say(f"    GPU busy: {says}")
    if is_asked(run):
        run.report.found("busy", says, False if share < 0.97 else None)
