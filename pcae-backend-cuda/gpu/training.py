"""Does it train: losses of bf16 beside f32, and large models."""
import json
import math
import os
import random
import shutil
import zlib

from report import TARGETS
from session import Failure

PCAE_MASK = 0.85
# Steps whose losses are averaged.
WINDOW = 50


def pretrain(run, name, *words):
    """A short run of training; its losses by step."""
    folder = run.scratch / name
    command = run.ours("pretrain", "--backend", "cuda", "--out", folder, "--set", "eval_every=0",
                       "--set", "save_every=1000000", *words)
    try:
        run.command(command)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


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
        run.report.found("curve", says, abs(whole) <= 0.01 and both[-1] >= 500)
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
            run.report.found(f"large {model}", says, result["status"] == "passed" and run.args.large_steps >= 200)


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
