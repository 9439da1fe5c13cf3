"""What can be known of `gpu/run.py` without a GPU and a program: `python3 pcae-backend-cuda/tests/gpu_scripts.py`."""
import pathlib
import sys
import tempfile
import time
import types
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "gpu"))

import checks
import contenders
import times
from report import TARGETS, Report
from session import Failure


def report(folder, commit="c", rehearsal=False, add=False):
    return Report(pathlib.Path(folder), {"commit": commit, "rehearsal": rehearsal}, add)


class Quiet(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.report = report(self.folder.name)
        self.report.say = self.report.note

    def text(self):
        return self.report.text.read_text()

    def run_of(self, **arguments):
        """What parts see of a session."""
        usual = dict(rehearse=None, model="vit-b16", precision="bf16", seconds=0.0, rounds=3)
        run = types.SimpleNamespace(args=types.SimpleNamespace(**usual | arguments), report=self.report, left=lambda: 1e9)
        run.each = lambda results, name, do: results.update({name: attempt(do)})
        return run


def attempt(do):
    try:
        return {"status": "passed"} | do()
    except Failure as failure:
        return {"status": "failed", "reason": str(failure)}


class Contender:
    """Does its batch in as many seconds as it is told, one after the other; a text is what it fails with."""

    def __init__(self, name, *seconds, batch=8):
        self.name, self.seconds, self.case, self.facts, self.closed = name, list(seconds), {"batch": batch}, {}, False

    def start(self):
        pass

    def ready(self):
        if isinstance(self.seconds[0], str):
            raise Failure(self.seconds[0])

    def sample(self, _):
        return self.seconds.pop(0)

    def close(self):
        self.closed = True


class Targets(Quiet):
    def test_each_is_one_row_whatever_was_found(self):
        self.report.at_least("step over MAE", 2.0, 2.25)
        self.report.at_least("step over PyTorch", 1.5, 1.4)
        self.report.found("busy", "at most 100 %", None)
        self.report.end()
        lines = self.text().split("met?\n")[1].splitlines()
        self.assertEqual(len(lines), len(TARGETS))
        ends = {what: line.rsplit(" / ", 1)[1] for what, line in zip(TARGETS, lines)}
        self.assertEqual({what for what, end in ends.items() if end == "yes"}, {"step over MAE"})
        self.assertEqual({what for what, end in ends.items() if end == "NO"}, {"step over PyTorch"})
        self.assertIn("not measured", lines[list(TARGETS).index("curve")])

    def test_parts_of_an_earlier_run_stay_if_that_is_asked_for(self):
        self.report.data["parts"]["parity"] = {"status": "passed", "results": {}, "seconds": 1}
        self.report.found("parity f32", "all", True)
        self.report.save()
        more = report(self.folder.name, add=True)
        self.assertEqual(more.rows()["parity f32"]["met"], True)
        self.assertEqual(more.rows()["parity bf16"]["found"], "not measured")
        self.assertIn("parity", more.data["parts"])
        with self.assertRaises(SystemExit):
            report(self.folder.name, commit="another", add=True)
        self.assertEqual(report(self.folder.name).data["parts"], {})

    def test_a_part_that_was_ended_stays_as_ended(self):
        self.report.data["parts"] |= {"step": {"status": "running", "results": {}},
                                      "parity": {"status": "passed", "results": {}, "seconds": 1}}
        self.report.save()
        more = report(self.folder.name, add=True)
        more.say = more.note
        more.end()
        lines = [line.split() for line in self.text().splitlines()]
        self.assertIn("step ended - s 0 of 0 passed".split(), lines)
        self.assertIn("parity passed 1 s 0 of 0 passed".split(), lines)

    def test_a_rehearsal_meets_and_misses_nothing(self):
        rehearsal = report(self.folder.name, rehearsal=True)
        rehearsal.at_least("step over MAE", 2.0, 1.0)
        self.assertIsNone(rehearsal.rows()["step over MAE"]["met"])


class Race(Quiet):
    def test_contenders_take_turns_and_those_that_fail_are_left_out(self):
        run, results = self.run_of(), {}
        a, b = Contender("a", 1.0, 2.0, 4.0), Contender("b", 2.0, 2.0, 2.0)
        large = Contender("large", "CUDA out of memory", batch=512)
        broken = Contender("broken", "illegal instruction")
        ready = contenders.prepare(run, [a, large, b, broken], results)
        self.assertEqual(ready, [a, b])
        self.assertTrue(large.closed and broken.closed)
        self.assertEqual((results["large"]["status"], results["broken"]["status"]), ("no memory", "failed"))
        contenders.take_turns(run, ready, results, 3)
        self.assertEqual(results["a"]["samples"], [8.0, 4.0, 2.0])
        ratio = contenders.ratio(results, "a", "b")
        self.assertEqual((ratio["least"], ratio["median"], ratio["greatest"]), (0.5, 1.0, 2.0))
        results["a tuned"] = results["a"] | {"images_per_s": {"median": 5.0}}
        self.assertEqual(contenders.fastest(results, "a"), "a tuned")
        self.assertIsNone(contenders.fastest(results, "torch"))

    def test_every_contender_runs_at_its_best_batch(self):
        made = []

        def contenders_of(run, batch):
            # Ours is fastest at 128, PyTorch's at 64, and has no memory for more than 128.
            ours = {64: 1.0, 128: 1.0, 256: 4.0}[batch]
            torch = {64: 2.0, 128: 8.0, 256: "out of memory"}[batch]
            new = [Contender(name, *[seconds] * 4, batch=batch) for name, seconds in
                   (("pcae", ours), ("mae", 4 * ours), ("torch eager", torch))]
            for one in new:
                one.facts = {"gflop_per_image": 1.0, "launches": {"graphs": 1}}
            made.extend(new)
            return new
        run, results = self.run_of(batch_size=[64, 128, 256], variants=[]), {}
        before = times.step_contenders, times.has_fp8
        try:
            times.step_contenders, times.has_fp8 = contenders_of, lambda run: False
            times.step(run, results)
        finally:
            times.step_contenders, times.has_fp8 = before
        self.assertTrue(all(one.closed for one in made))
        self.assertEqual(results["best, pcae"]["case"]["batch"], 128)
        self.assertEqual(results["best, torch eager"]["case"]["batch"], 64)
        self.assertEqual(results["batch 256, torch eager"]["status"], "no memory")
        rows = self.report.rows()
        self.assertEqual((rows["step over PyTorch"]["met"], rows["step over MAE"]["met"]), (True, True))
        self.assertTrue(rows["step over PyTorch"]["found"].startswith("4.00 "), rows)
        self.assertEqual(rows["step with fp8 teacher over MAE"]["met"], False)
        self.assertEqual(rows["graphs"]["met"], True)


class Parity(Quiet):
    def parity(self, says):
        """Results of fixtures that are replayed by a program that says so, a failure or not, of its fp8."""
        run, results, asked = self.run_of(), {}, []
        run.ours = lambda *words: list(map(str, words))

        def command(words):
            if "--teacher-precision" not in words:
                return "parity: 3 tensors\n"
            asked.append(pathlib.Path(words[1]).stem)
            if isinstance(said := says(asked[-1]), Failure):
                raise said
            return said
        run.command = command
        checks.parity(run, results)
        self.assertEqual(asked, [path.stem for path in checks.fixture_paths() if path.stem.startswith("pcae")])
        return {name.split()[0]: one["status"] for name, one in results.items() if name.endswith("bf16, fp8 teacher")}

    def test_fixtures_with_a_teacher_in_fp8_where_that_can_be(self):
        narrow = Failure("parity: exit code 1: teacher_params: expected widths of multiples of 16, for a teacher in fp8, found 24")
        old = Failure("parity: exit code 2: expected compute capability 8.9 (Ada, Hopper) or newer, found 8.0")
        wrong = Failure("parity: exit code 1: expect.target is off")
        for says, status in [("parity: 3 tensors\n", "passed"), (old, "not available"), (wrong, "failed")]:
            found = self.parity(lambda name: narrow if name == "pcae_small" else says)
            self.assertEqual(found, {"pcae_gray_rect": status, "pcae_small": "not available"})
        count = len(checks.fixture_paths())
        row = self.report.rows()["parity bf16"]
        self.assertEqual((row["found"], row["met"]), (f"{count} of {count} pass", True))


class Launches(Quiet):
    def result(self, **launches):
        usual = dict(graphs=9, refused=0, own_products=0)
        return {"status": "passed", "launches": usual | launches, "warnings": ["because"]}

    def test_refused_graphs_and_plain_products_fail_the_part(self):
        for model, launches, fails in [
                ("vit-b16", {}, False),
                ("vit-b16", {"refused": 1}, True),
                ("vit-b16", {"own_products": 2}, True),
                ("vit-micro", {"own_products": 2}, False),
                ("vit-micro", {"refused": 1}, True),
                ("vit-b16", {"graphs": 0}, True)]:
            run, results = self.run_of(model=model), {}
            self.report.data["targets"].pop("graphs", None)
            times.graphs(run, results, {"pcae": self.result(**launches), "torch eager": {"status": "passed"}})
            found = results["graphs and products"]
            self.assertEqual(found["status"], "failed" if fails else "passed", (model, launches))
            if fails:
                self.assertIn("because", found["reason"])
                self.assertEqual(self.report.rows()["graphs"]["met"], False)
                # A later part without faults does not make up for it.
                times.graphs(run, results, {"pcae": self.result()})
                self.assertEqual(self.report.rows()["graphs"]["met"], False)


class Busy(Quiet):
    def test_operations_alone_bound_how_busy_it_is(self):
        parts = [{"operation": "linear forward", "seconds": 0.3}, {"operation": "selection", "seconds": 0.2},
                 {"operation": "transfer", "seconds": 9.0}]
        for seconds, met, says in [(1.0, False, "at most 50.0 %"), (0.4, None, "at most 100.0 %")]:
            times.busy(self.run_of(), {"breakdown": parts, "seconds": seconds})
            row = self.report.rows()["busy"]
            self.assertEqual(row["met"], met)
            self.assertTrue(row["found"].startswith(says), row)


if __name__ == "__main__":
    unittest.main()
