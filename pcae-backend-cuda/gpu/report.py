"""What was found, on disk at any time, and which targets that meets."""
import json

# Everything that is asked of the backend on an H100 or H200: what, and what is expected. A run fills in what its parts find.
TARGETS = {
    "parity f32": ("every golden fixture in f32", "ids exact, within 1e-4"),
    "parity bf16": ("every golden fixture in bf16", "within the derived tolerance"),
    "parity resume": ("a run in f32 from the CPU to CUDA, and back", "losses of one on the CPU, within 1e-4"),
    "sanitizer": ("memcheck, racecheck and synccheck of small fixtures and test programs", "0 errors, 0 hazards"),
    "curve": ("mean loss of 500 steps in bf16 beside f32", "within 1 %"),
    "step over PyTorch": ("PCAE step, ViT-B/16, mask 0.85, decoder 2 x 768, over PyTorch's fastest, each at its best batch", ">= 1.5"),
    "step of peak": ("the same step, best batch, share of the peak", ">= 45 %"),
    "step over MAE": ("the same step over our own MAE's, each at its best batch", ">= 2.0"),
    "step with fp8 teacher over MAE": ("the same with an fp8 teacher", ">= 2.25"),
    "bandwidth": ("the slowest memory-bound kernel, share of a copy's bandwidth", ">= 80 %"),
    "busy": ("GPU busy during the step", ">= 97 %"),
    "graphs": ("steps and forwards as graphs, no product by our plain kernel", "none refused, none"),
    "large vit-l16": ("200 steps of ViT-L/16", "finite losses"),
    "large vit-h14": ("200 steps of ViT-H/14", "finite losses"),
    "infer 1": ("forward, ViT-B/16, batch 1, drop ratio 0.4 over dense", ">= 1.75"),
    "infer 256": ("forward, ViT-B/16, batch 256, drop ratio 0.4 over dense", ">= 1.75"),
    "infer 1 over PyTorch": ("forward, batch 1, drop ratio 0.4, over PyTorch's fastest", ">= 1.0"),
    "infer 256 over PyTorch": ("forward, batch 256, drop ratio 0.4, over PyTorch's fastest", ">= 1.0"),
}


def verdict(results):
    """Of a target that all of these have to pass: `False` if one failed, else `None` if one is not known, or if there are none."""
    statuses = [one["status"] for one in results]
    return False if "failed" in statuses else True if statuses and set(statuses) == {"passed"} else None


class Report:
    """`report.json` and `report.log` in a folder. With `add`, parts that an earlier run of the same program has left there stay."""

    def __init__(self, folder, identity, add=False):
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.text = folder / "report.json", folder / "report.log"
        self.rehearsal = identity["rehearsal"]
        self.data = identity | {"parts": {}, "targets": {}}
        if add and self.json.is_file():
            earlier = json.loads(self.json.read_text())
            if any(earlier.get(name) != value for name, value in identity.items()):
                raise SystemExit(f"error: --add: expected a report of {identity}, found one of commit {earlier.get('commit')} in {folder}")
            self.data |= {name: earlier[name] for name in ("parts", "targets")}
            for entry in self.data["parts"].values():
                if entry["status"] == "running":
                    entry["status"] = "ended"
        else:
            self.text.write_text("")

    def say(self, text):
        print(text, flush=True)
        self.note(text)

    def note(self, text):
        with self.text.open("a") as file:
            file.write(text.rstrip("\n") + "\n")

    def save(self):
        new = self.json.with_suffix(".new")
        new.write_text(json.dumps(self.data | {"targets": self.rows()}, indent=1))
        new.replace(self.json)

    def found(self, target, text, met):
        """Fills in a target; `met` is `None` if what was found does not tell. Of a rehearsal nothing does."""
        self.data["targets"][target] = {"found": text, "met": None if self.rehearsal or met is None else bool(met)}

    def all_of(self, target, results):
        """Fills in a target that all of these have to pass."""
        others = [name + ("" if one["status"] == "failed" else f" ({one['status']})") for name, one in results.items()
                  if one["status"] != "passed"]
        says = f"{len(results) - len(others)} of {len(results)} pass" + (f", not {', '.join(others)}" if others else "")
        self.found(target, says, verdict(results.values()))

    def at_least(self, target, least, value, text=None):
        self.found(target, text or f"{value:.2f}", value >= least)

    def rows(self):
        """A row for every target: what, expected, found, and whether it is met, `None` where that is not known."""
        missing = {"found": "not measured", "met": None}
        return {target: {"what": what, "expected": expected} | {"found": "", "met": None} | self.data["targets"].get(target, missing)
                for target, (what, expected) in TARGETS.items()}

    def end(self):
        self.say("\nsummary")
        for part, entry in self.data["parts"].items():
            counts = [one.get("status") for one in entry["results"].values()]
            self.say(f"  {part:<10} {entry['status']:<8} {entry.get('seconds', '-'):>6} s  {counts.count('passed')} of {len(counts)}"
                     f" passed {entry.get('reason', '')}")
        self.say("\ntarget: expected / found / met?")
        for row in self.rows().values():
            met = {True: "yes", False: "NO", None: "-"}[row["met"]]
            self.say(f"  {row['what']}: {row['expected']} / {row['found']} / {met}")
        self.save()
