"""Does it train: losses of bf16 beside f32, and large models."""
import json
import math
import os
import random
import shutil
import zlib

from report import TARGETS, verdict
from session import Failure

PCAE_MASK = 0.85
# Steps whose losses are averaged.
WINDOW = 50
# Of the targets; fewer tell nothing of them.
CURVE_STEPS, LARGE_STEPS = 500, 200
# Ten steps of the fixtures agree to 1e-6; rounding grows with the steps.
RESUMED_STEPS, RESUMED_WITHIN = 40, 1e-4


def pretrain(run, name, *words):
    """A short run of training; its losses by step."""
    folder = run.scratch / name
    command = run.ours("pretrain", "--backend", "cuda", "--out", folder, "--set", "eval_every=0",
                       "--set", "save_every=1000000", *words)
    try:
        run.command(command)
        return losses_of(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def losses_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def resumed(run, results):
    """A run in f32 that one backend begins, and another one ends, has the losses of one that nothing interrupts."""
    # A model of a head of 32, for which there is a kernel, and the fewest steps that leave time to interrupt them.
    tiny = [word for setting in ("embed_dim=32", "depth=3", "num_heads=1", "decoder_embed_dim=32", "decoder_depth=1", "decoder_num_heads=1",
                                 "eval_every=0", "save_every=1") for word in ("--set", setting)]

    def begin(name, backend):
        return run.scratch / name, run.ours("pretrain", "--backend", backend, "--out", run.scratch / name, "--data", pictures(run), "--steps",
                                            RESUMED_STEPS, "--batch-size", "4", "--precision", "f32", "--workers", "1", *tiny)

    def whole():
        folder, command = begin("whole", "cpu")
        run.command(command)
        want.update(losses_of(folder))
        return {"says": f"{len(want)} steps"}

    def other(first, second):
        folder, command = begin(f"{first}-{second}", first)
        code = run.interrupted(command, (folder / "checkpoints/last.safetensors").exists)
        if code != 130:
            raise Failure(f"expected an exit code of 130 after an interrupt, found {code}")
        done = max(losses_of(folder), default=0)
        run.command(run.ours("pretrain", "--resume", folder, "--backend", second))
        found = losses_of(folder)
        if found.keys() != want.keys() or not 0 < done < len(want):
            raise Failure(f"expected {len(want)} steps, some of them on each backend, found {len(found)}, {done} before the resume")
        worst = max(abs(found[step] / want[step] - 1) for step in want)
        says = f"{done} steps on {first} and {len(want) - done} on {second}, losses within {worst:.1e}"
        if not worst <= RESUMED_WITHIN:
            raise Failure(f"expected losses within {RESUMED_WITHIN:.0e} of those of one backend, found {says}")
        return {"says": says, "losses": found}
    want, each = {}, {}
    alone = run.each(results, "a run on cpu", whole)
    if alone["status"] == "passed":
        for first, second in (("cpu", "cuda"), ("cuda", "cpu")):
            name = f"from {first} to {second}"
            each[name] = run.each(results, name, lambda: other(first, second))
    says = "; ".join(f"{name}: {one.get('says') or one.get('reason') or one['status']}" for name, one in each.items())
    run.report.found("parity resume", says or f"a run on cpu: {alone.get('reason') or alone['status']}", verdict([alone, *each.values()]))


def curve(run, results):
    steps, model = str(run.args.curve_steps), "vit-micro"
    losses, data = {}, []
    if run.args.rehearse:
        # Of few pictures and without classes, so that nothing is evaluated.
        data = ["--data", pictures(run)]
    for precision in ("f32", "bf16"):
        def train():
            losses[precision] = pretrain(run, f"curve-{precision}", "--model", model, "--steps", steps,
                                         "--batch-size", str(run.args.curve_batch), "--precision", precision, *data)
            last = max(losses[precision])
            return {"says": f"loss {losses[precision][last]:.4f} after {last} steps", "losses": losses[precision]}
        run.each(results, precision, train)
    if len(losses) < 2:
        return

    def within():
        both = sorted(losses["f32"].keys() & losses["bf16"].keys())

        def difference(steps):
            exact, found = (sum(losses[precision][step] for step in steps) for precision in ("f32", "bf16"))
            return found / exact - 1
        # Of single steps and of some, only the whole tells the formats apart: see docs/results/README.md.
        whole = difference(both)
        windows = [difference(both[at:at + WINDOW]) for at in range(0, len(both), WINDOW)]
        says = (f"{100 * whole:+.2f} % over {both[-1]} steps, means of {WINDOW} steps {100 * min(windows):+.2f} to "
                f"{100 * max(windows):+.2f} %")
        run.report.found("curve", says, abs(whole) <= 0.01 if both[-1] >= CURVE_STEPS else None)
        if not abs(whole) <= 0.01:
            raise Failure(f"expected the mean loss within 1 % of that of f32, found {says}")
        return {"says": says}
    run.each(results, "bf16 beside f32", within)


def large(run, results):
    for model in run.args.large:
        def train():
            losses = pretrain(run, model, "--model", model, "--data", pictures(run), "--steps", str(run.args.large_steps),
                              "--batch-size", str(run.args.large_batch), "--mask-ratio", str(PCAE_MASK),
                              "--workers", str(min(8, os.cpu_count() or 1)), "--precision", run.args.precision)
            last = max(losses, default=0)
            wrong = [step for step, loss in losses.items() if loss is None or not math.isfinite(loss)]
            if last != run.args.large_steps or wrong:
                raise Failure(f"expected {run.args.large_steps} steps with finite losses, found {last}, not finite: {wrong}")
            return {"says": f"loss {losses[min(losses)]:.4f} -> {losses[last]:.4f} in {last} steps", "losses": losses}
        result = run.each(results, model, train)
        if f"large {model}" in TARGETS:
            says = result.get("says") or result.get("reason") or result["status"]
            run.report.found(f"large {model}", says, verdict([result]) and (run.args.large_steps >= LARGE_STEPS or None))


def pictures(run):
    """A folder of pictures of 256 x 256 pixels in coloured squares, each different."""
    folder = run.scratch / "pictures"
    if folder.is_dir():
        return folder
    folder.mkdir()
    squares, edge = 16, 16

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    size = squares * edge
    header = size.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    generator = random.Random(0)
    for number in range(run.args.pictures):
        rows = b""
        for _ in range(squares):
            colours = generator.randbytes(3 * squares)
            row = b"".join(colours[3 * i:3 * i + 3] * edge for i in range(squares))
            rows += (b"\0" + row) * edge
        png = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b""))
        (folder / f"{number:04}.png").write_bytes(png)
    return folder
