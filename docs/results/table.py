#!/usr/bin/env python3
"""Prints the tables of docs/results/README.md from what fashion.sh has measured.

    python3 docs/results/table.py runs/fashion/results
"""
import json
import pathlib
import statistics
import sys

folder = pathlib.Path(sys.argv[1])


def load(name):
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def top1(name):
    found = load(name)
    if found is None:
        return None
    return found["rows"][0]["top1"][0]["weighted"] if "rows" in found else found.get("best_top1") or found["top1"]


def cell(names):
    values = [100 * value for value in map(top1, names) if value is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


print("| | kNN, k 20 | logistic regression | LARS probe | fine-tuned on 6,000 |")
print("|---|---|---|---|---|")
for name, label in (("pcae", "PCAE"), ("mae", "MAE"), ("none", "not trained")):
    knn = [f"knn-{name}", *(f"knn-{name}-{seed}" for seed in range(3))]
    rest = [[f"{what}-{name}-{seed}" for seed in range(3)] for what in ("lars", "finetune")]
    print("|", label, "|", " | ".join(cell(names) for names in (knn, [f"logistic-{name}"], *rest)), "|")

print()
print("| drop ratio | multiply-adds | images/s | trained dense: similarity | random | trained so: similarity | random |")
print("|---|---|---|---|---|---|---|")
dense = load("evaluate-dense")
speed = {row["drop_ratio"]: row["images_per_s"] for row in (load("bench") or {}).get("results", [])}
for ratio in (0.0, 0.1, 0.2, 0.3, 0.4):
    own = load(f"evaluate-reduced-{ratio}") if ratio else None
    row = [f"{ratio}"]
    found = {}
    for report in (dense, own):
        rows = [r for r in report["results"] if abs(r["drop_ratio"] - ratio) < 1e-9] if report else []
        for criterion in ("mean-similarity", "random"):
            match = [r for r in rows if r["criterion"] in (criterion, None)]
            found[id(report), criterion] = f"{100 * match[0]['top1']:.2f}" if match else "-"
            if match and criterion == "mean-similarity" and report is dense:
                row += [f"{match[0]['multiply_adds'] / 1e6:.1f} M", f"{speed[ratio]:.0f}" if ratio in speed else "-"]
    row += [found[id(report), criterion] for report in (dense, own) for criterion in ("mean-similarity", "random")]
    print("|", " | ".join(row), "|")
