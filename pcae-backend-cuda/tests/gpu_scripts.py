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
from session import Failure, whole


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
    """Does its batch in as many seconds as it is told, one after the other; a text is what it fails with, and an exit ends the script."""

    def __init__(self, name, *seconds, batch=8):
        self.name, self.seconds, self.case, self.facts = name, list(seconds), {"batch": batch}, {}
        self.starts, self.closed = 0, False

    def start(self):
        self.starts, self.closed = self.starts + 1, False

    def ready(self):
        if isinstance(self.seconds[0], SystemExit):
            raise self.seconds[0]
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


class Bundle(Quiet):
    def program(self, name):
        path = pathlib.Path(self.folder.name) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path

    def test_files_that_are_missing_or_cut_short_are_told(self):
        folder = self.program("tests/fp8").parents[1]
        self.assertEqual(whole(folder), [])
        (folder / "contents").write_text("10 tests/fp8\n")
        self.assertEqual(whole(folder), [])
        (folder / "contents").write_text("11 tests/fp8\n3 pcae\n")
        self.assertEqual(whole(folder), ["tests/fp8: expected 11 bytes, found 10", "pcae is missing"])

    def test_programs_that_are_asked_for_are_there_or_the_part_fails(self):
        run = self.run_of(test_programs=self.program("tests/fp8").parent, only_tests=["fp8", "graphs"])
        self.assertEqual(checks.test_programs(run, None).keys(), {"fp8"})
        for part in (checks.tests, checks.sanitizer):
            run.args.rehearse, run.scratch = "emulator", pathlib.Path(self.folder.name)
            run.ours = lambda *words: list(words)
            with self.assertRaisesRegex(Failure, "no test programs .*graphs"):
                part(run, {})

    def test_a_rehearsal_runs_one_test_of_each_program_and_not_the_emulators_own(self):
        run, results, ran = self.run_of(test_programs=self.program("tests/fp8").parent, only_tests=None), {}, []

        def command(words):
            if words[1:] == ["--list"]:
                return "on_the_emulator: test\nfirst: test\nsecond: test\n\n3 tests, 0 benchmarks\n"
            ran.append(words[1:-5])
            return f"test result: ok. {1 if len(words) > 6 else 2} passed; 0 failed\n"
        run.command = command
        for run.args.rehearse, count in [(None, 2), ("emulator", 1)]:
            checks.tests(run, results)
            self.assertEqual(results["fp8"], {"status": "passed", "says": f"{count} tests", "tests": count})
        self.assertEqual(ran, [[], ["--exact", "first"]])


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

    def step(self, contenders_of, has_fp8=False, **arguments):
        """What a step of such contenders finds; at the end and between batch sizes all are closed."""
        made = []

        def make(_, batch):
            self.assertTrue(all(one.closed for one in made), "some hold memory that the next size needs")
            new = contenders_of(batch)
            for one in new:
                one.facts = {"gflop_per_image": 1e3, "launches": {"graphs": 1}}
            made.extend(new)
            return new
        run = self.run_of(**{"batch_size": [64, 128, 256], "variants": []} | arguments)
        run.limits = lambda: {"bf16_gflops": 4e5}
        run.has_torch = lambda: {"device": "NVIDIA H100 80GB HBM3"}
        self.report.data["parts"]["step"] = entry = {"results": {}}
        before = times.step_contenders, times.has_fp8
        try:
            times.step_contenders, times.has_fp8 = make, lambda run: has_fp8
            times.step(run, entry["results"])
        finally:
            times.step_contenders, times.has_fp8 = before
            self.assertTrue(all(one.closed for one in made), "some go on")
            self.starts = {f"{one.name} {one.case['batch']}": one.starts for one in made}
        return entry["results"]

    def test_every_contender_runs_at_its_best_batch(self):
        # Ours is fastest at 128, PyTorch's at 64, and has no memory for more than 128.
        def contenders_of(batch):
            ours = {64: 1.0, 128: 1.0, 256: 4.0}[batch]
            torch = {64: 2.0, 128: 8.0, 256: "out of memory"}[batch]
            return [Contender(name, *[seconds] * 4, batch=batch) for name, seconds in
                    (("pcae", ours), ("mae", 4 * ours), ("torch eager", torch))]
        results = self.step(contenders_of)
        self.assertEqual(results["best, pcae"]["case"]["batch"], 128)
        self.assertEqual(results["best, torch eager"]["case"]["batch"], 64)
        self.assertEqual(results["batch 256, torch eager"]["status"], "no memory")
        self.assertEqual({name for name, starts in self.starts.items() if starts == 2}, {"pcae 128", "mae 128", "torch eager 64"})
        rows = self.report.rows()
        self.assertEqual((rows["step over PyTorch"]["met"], rows["step over MAE"]["met"]), (True, True))
        self.assertTrue(rows["step over PyTorch"]["found"].startswith("4.00 "), rows)
        self.assertEqual(rows["step with fp8 teacher over MAE"]["met"], False)
        self.assertEqual(rows["graphs"]["met"], True)

    def test_a_teacher_in_fp8_counts_for_its_own_target_alone(self):
        def contenders_of(batch):
            return [Contender(name, *[seconds] * 4, batch=batch) for name, seconds in
                    (("pcae", 0.4), ("pcae, fp8 teacher", 0.2), ("mae", 1.0), ("torch eager", 1.0))]
        results = self.step(contenders_of, has_fp8=True, batch_size=[128], variants=["eager"])
        rows = self.report.rows()
        found = {target: rows[target]["found"].split()[0] for target in
                 ("step over PyTorch", "step over MAE", "step with fp8 teacher over MAE")}
        self.assertEqual(list(found.values()), ["2.50", "2.50", "5.00"])
        # 128 pictures of 1e3 GFLOP in 0.4 s.
        self.assertAlmostEqual(results["share of peak"]["gflops"], 320e3)
        self.assertEqual(rows["step of peak"]["met"], False)

    def test_a_device_without_fp8_fails_nothing(self):
        refusal = "error: a teacher in fp8 on A100: expected compute capability 8.9 (Ada, Hopper) or newer, found 8.0"

        def contenders_of(batch):
            return [Contender(name, *[seconds] * 4, batch=batch) for name, seconds in
                    (("pcae", 1.0), ("pcae, fp8 teacher", refusal), ("mae", 3.0))]
        results = self.step(contenders_of, has_fp8=True, batch_size=[128])
        self.assertEqual({one["status"] for one in results.values()}, {"passed", "not available"})
        row = self.report.rows()["step with fp8 teacher over MAE"]
        self.assertEqual((row["found"], row["met"]), (refusal, None))

    def test_an_end_while_contenders_start_ends_all(self):
        # The second size is ended.
        def contenders_of(batch):
            second = SystemExit(143) if batch == 128 else 1.0
            return [Contender("pcae", 1.0, batch=batch), Contender("torch eager", second, batch=batch),
                    Contender("mae", 1.0, batch=batch)]
        with self.assertRaises(SystemExit):
            self.step(contenders_of)
        self.assertEqual(self.starts["mae 128"], 1)

    def test_ours_at_no_batch_size_says_why(self):
        with self.assertRaisesRegex(Failure, "ours ran at no batch size"):
            self.step(lambda batch: [Contender("pcae", "out of memory", batch=batch), Contender("mae", *[1.0] * 4, batch=batch)])


class Again(Quiet):
    def test_a_process_that_starts_again_does_not_hear_the_one_before(self):
        run = self.run_of(python=sys.executable)
        run.scratch, run.left = pathlib.Path(self.folder.name), lambda: 20.0
        before, contenders.HERE = contenders.HERE, run.scratch
        self.addCleanup(setattr, contenders, "HERE", before)
        (run.scratch / "peer.py").write_text(
            "import json, os\nprint('ready', flush=True)\nfor _ in iter(input, None):\n"
            "    print(json.dumps({'seconds': os.getpid(), 'memory': 0}), flush=True)\n")
        peer, processes = contenders.Peer(run, "torch eager", {"batch": 1}), []
        self.addCleanup(peer.close)
        for _ in range(3):
            peer.start()
            peer.ready()
            processes.append(peer.process)
            self.assertEqual(peer.sample(0), peer.process.pid)
            peer.close()
            peer.close()
        self.assertTrue(all(process.returncode is not None for process in processes))


class Peak(Quiet):
    def test_the_data_sheet_is_of_the_very_device(self):
        for device, nominal in [("NVIDIA H100 NVL", 835e3), ("NVIDIA H100 PCIe", 756e3), ("NVIDIA H100 80GB HBM3", 989e3),
                                ("NVIDIA H200", 989e3), ("NVIDIA H200 NVL", 835e3), ("another", None)]:
            run, results = self.run_of(variants=["eager"]), {}
            run.limits, run.has_torch = lambda: {"bf16_gflops": 4e5}, lambda: {"device": device}
            pcae = {"status": "passed", "images_per_s": {"median": 2.0}, "gflop_per_image": 1e3}
            times.share_of_peak(run, results, {"pcae": pcae})
            self.assertEqual(results["share of peak"]["nominal_peak"], nominal, device)


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
            self.report.data["parts"]["step"] = entry = {"results": {}}
            results = entry["results"]
            run = self.run_of(model=model)
            times.graphs(run, results, {"pcae": self.result(**launches), "torch eager": {"status": "passed"}})
            found = results["graphs and products"]
            self.assertEqual(found["status"], "failed" if fails else "passed", (model, launches))
            asked = fails or model == "vit-b16"
            self.assertEqual(self.report.rows()["graphs"]["met"], not fails if asked else None, (model, launches))
            if fails:
                self.assertIn("because", found["reason"])

    def test_where_nothing_of_ours_ran_nothing_is_found_of_its_graphs(self):
        self.report.data["parts"]["step"] = entry = {"results": {}}
        found = {"pcae": {"status": "failed", "reason": "no driver"}, "torch eager": {"status": "passed"}}
        times.graphs(self.run_of(), entry["results"], found)
        self.assertEqual(entry["results"], {})
        self.assertIsNone(self.report.rows()["graphs"]["met"])

    def test_another_part_does_not_make_up_for_one_with_faults_but_its_rerun_does(self):
        parts, run = self.report.data["parts"], self.run_of()

        def found(part, label="", **launches):
            times.graphs(run, parts.setdefault(part, {"results": {}})["results"], {"pcae": self.result(**launches)}, label)
            return self.report.rows()["graphs"]["met"]
        self.assertTrue(found("infer", "batch 1, "))
        self.assertFalse(found("infer", "batch 256, ", refused=1))
        self.assertFalse(found("step"))
        del parts["infer"]
        self.assertTrue(found("infer", "batch 1, "))


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
