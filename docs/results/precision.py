#!/usr/bin/env python3
"""Losses of 500 steps in each number format beside those in f32, seed by seed: the last table of docs/results/README.md.

    python3 docs/results/precision.py target/release/pcae runs/precision
"""
import json
import pathlib
import statistics
import subprocess
import sys

FORMATS = {
    "f32": ["--precision", "f32"],
    "bf16": ["--precision", "bf16"],
    "f32, teacher bf16": ["--precision", "f32", "--teacher-precision", "bf16"],
}
SEEDS, STEPS, WINDOW = range(1, 7), 500, 50


def read(metrics):
    return [json.loads(line) for line in metrics.open()] if metrics.is_file() else []


def train(pcae, out, flags):
    """Means of the loss over `WINDOW` steps each, and the kNN accuracy at the end; a run that has been made is not made again."""
    metrics = out / "metrics.jsonl"
    rows = read(metrics)
    if len(rows) < STEPS or "knn_top1" not in rows[-1]:
        begin = ["--resume", str(out)] if (out / "config.toml").is_file() else ["--steps", str(STEPS), "--out", str(out), *flags]
        subprocess.run([pcae, "pretrain", *begin], check=True, stdout=subprocess.DEVNULL)
        rows = read(metrics)
    losses = [row["loss"] for row in rows if "loss" in row]
    accuracy = [row["knn_top1"] for row in rows if "knn_top1" in row][-1]
    return [statistics.mean(losses[at:at + WINDOW]) for at in range(0, STEPS, WINDOW)], accuracy


def main():
    pcae, out = sys.argv[1], pathlib.Path(sys.argv[2])
    runs = {name: [train(pcae, out / f"{''.join(filter(str.isalnum, name))}-{seed}", [*flags, "--seed", str(seed)]) for seed in SEEDS]
            for name, flags in FORMATS.items()}
    exact = runs["f32"]
    spread = [statistics.stdev(window) / statistics.mean(window) for window in zip(*(curve for curve, _ in exact))]
    print(f"f32, seed to seed: a window's standard deviation is {min(spread):.1%} to {max(spread):.1%} of its mean")
    for name, each in runs.items():
        windows = [a / b - 1 for (curve, _), (other, _) in zip(each, exact) for a, b in zip(curve, other)]
        whole = [sum(curve) / sum(other) - 1 for (curve, _), (other, _) in zip(each, exact)]
        accuracy = [accuracy for _, accuracy in each]
        print(f"{name:<18} windows {min(windows):+.2%} to {max(windows):+.2%}, all steps {min(whole):+.2%} to {max(whole):+.2%}, "
              f"kNN {statistics.mean(accuracy):.2%} +- {statistics.stdev(accuracy):.2%}")


if __name__ == "__main__":
    main()
