"""What can be known of `gpu/run.py` without a GPU and a program: `python3 pcae-backend-cuda/tests/gpu_scripts.py`."""
import json
import os
import pathlib
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
import types
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "gpu"))

import checks
import contenders
import nsys
import times
import training
from report import TARGETS, Report
from session import Failure, NoTime, Session, library_folders, package_folders, whole


def report(folder, commit="c", rehearsal=False, add=False):
    return Report(pathlib.Path(folder), {"commit": commit, "rehearsal": rehearsal}, add)


class Run(types.SimpleNamespace):
    __hash__ = object.__hash__


class Quiet(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.report = report(self.folder.name)
        self.report.say = self.report.note

    def text(self):
        return self.report.text.read_text()

    def path(self, path):
        """The only places for programs."""
        before = os.environ["PATH"], nsys.PLACES, checks.SANITIZER_PLACES
        os.environ["PATH"], nsys.PLACES, checks.SANITIZER_PLACES = str(path), [], []

        def back():
            os.environ["PATH"], nsys.PLACES, checks.SANITIZER_PLACES = before
        self.addCleanup(back)

    def run_of(self, **arguments):
        """What parts see of a session."""
        usual = dict(rehearse=None, model="vit-b16", precision="bf16", seconds=0.0, rounds=3)
        run = Run(args=types.SimpleNamespace(**usual | arguments), report=self.report, left=lambda: 1e9, packages=[])
        run.each = types.MethodType(Session.each, run)
        return run


def command(words):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        raise Failure(done.stderr)


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
            run.ours, run.command = lambda *words: list(words), lambda words: ""
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
            self.assertEqual((results["fp8"]["status"], results["fp8"]["tests"]), ("passed", count))
        self.assertEqual(ran, [[], ["--exact", "first"]])

    def test_a_program_that_tests_nothing_fails(self):
        run, results = self.run_of(test_programs=self.program("tests/fp8").parent, only_tests=None), {}
        result = "test result: ok. 7 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out\n"
        for output, fails in [(result, None), ("skipped: no CUDA device\n" + result, "fp8 found no CUDA device"),
                              ("", "fp8 ran no test"), (result.replace("7", "0"), "fp8 ran no test"),
                              (result + result.replace("7", "0"), "fp8 ran no test")]:
            run.command = lambda words: output
            checks.tests(run, results)
            self.assertEqual(results["fp8"].get("reason"), fails, output)
            self.assertEqual(results["fp8"]["status"], "failed" if fails else "passed")


class Sanitizer(Quiet):
    def test_each_check_gets_the_options_that_the_tool_has(self):
        """Hazards of others' kernels are not looked for, and any of ours is."""
        none = checks.sanitizer_options("--tool --error-exitcode")
        self.assertEqual(none, {check: [] for check in checks.SANITIZERS})
        some = checks.sanitizer_options("  --report-api-errors arg\n  --kernel-name-exclude arg")
        self.assertEqual(some["memcheck"], ["--report-api-errors", "no"])
        self.assertEqual(some["racecheck"], some["synccheck"])
        words = some["racecheck"]
        # One option for each name, as all names of one would have to match.
        self.assertEqual(set(words[::2]), {"--kernel-name-exclude"})
        self.assertEqual([word for word in words[1::2] if not re.fullmatch(r"kns=\w+", word)], [])
        parts = [word.removeprefix("kns=") for word in words[1::2]]
        theirs = ["nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "void cublasLt::splitKreduce_kernel<32, 16, int>(...)",
                  "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "void cutlass::Kernel2<...>(...)"]
        self.assertEqual([name for name in theirs if not any(part in name for part in parts)], [])
        kernels = pathlib.Path(checks.__file__).resolve().parents[1] / "kernels"
        ours = re.findall(r"(?:__launch_bounds__\([^\n]*\)\s+|^[A-Z_]+\()([a-z]\w+)\(?", "\n".join(
            path.read_text() for path in kernels.glob("*.cu")), re.MULTILINE)
        self.assertGreater(len(ours), 50)
        self.assertIn("adamw_ema", ours)
        self.assertEqual([name for name in ours if any(part in name for part in parts)], [])

    def sanitized(self, said, **more):
        """Results of checks of one test program that say so, or fail so, and the target's row."""
        folder, asked = pathlib.Path(self.folder.name), []
        (folder / "tests").mkdir(exist_ok=True)
        for name in ("compute-sanitizer", *(f"tests/{name}" for name, *_ in checks.SANITIZED)):
            (folder / name).write_text("")
            (folder / name).chmod(0o755)
        self.path(folder)
        run, results = self.run_of(test_programs=folder / "tests"), {}
        run.ours = lambda *words: [*words]
        for name, value in more.items():
            setattr(run, name, value)

        def command(words):
            if words[1:] == ["--help"]:
                return "--kernel-name-exclude"
            asked.append(words[2])
            if isinstance(said, Failure):
                raise said
            return said
        run.command = command
        checks.sanitizer(run, results)
        self.asked = asked
        return {one["status"] for one in results.values()}, self.report.rows()["sanitizer"]

    def test_only_a_summary_without_errors_and_hazards_passes(self):
        for said, status in [
                ("========= ERROR SUMMARY: 0 errors", "passed"),
                ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
                ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", "failed"),
                ("========= ERROR SUMMARY: 1 error", "failed"),
                ("========= ERROR SUMMARY: 10 errors", "failed"),
                ("test result: ok. 3 passed", "failed"),
                ("========= Target application terminated before first instrumented API call\n========= ERROR SUMMARY: 0 errors", "failed"),
                (Failure("exit code 99"), "failed"), (NoTime("no time left"), "no time")]:
            found, row = self.sanitized(said)
            self.assertEqual(found, {status}, said)
            self.assertEqual(row["met"], {"passed": True, "failed": False, "no time": None}[status])
            self.assertEqual({check for check in checks.SANITIZERS if check in self.asked}, set(checks.SANITIZERS))

    def test_a_sanitizer_that_is_not_there_is_told_in_the_last_table(self):
        self.path(self.folder.name)
        self.assertEqual(checks.sanitizer(self.run_of(), {}), "skipped")
        self.report.end()
        row = next(line for line in self.text().splitlines() if "racecheck" in line)
        self.assertTrue(row.endswith(" / not measured: there is no compute-sanitizer here / -"), row)

    def test_the_stand_in_of_a_rehearsal_takes_any_options(self):
        run = self.run_of(rehearse="emulator")
        run.scratch = pathlib.Path(self.folder.name)
        tool = checks.sanitizer_tool(run)
        said = subprocess.run([tool, "--tool", "memcheck", "--more", "1", "echo", "done"], capture_output=True, text=True)
        self.assertEqual(said.stdout.splitlines()[0], "done")
        self.assertIn(": 0 errors", said.stdout)
        self.assertEqual(subprocess.run([tool, "--tool", "memcheck", "false"]).returncode, 1)


class Packages(Quiet):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.folder.name)

    def file(self, name, text=""):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def test_those_of_the_python_that_has_torch_are_looked_at(self):
        (self.root / "site").mkdir()
        there, gone = str(self.root / "site"), str(self.root / "gone")
        python = self.file("python", f"#!/bin/sh\necho a notice\ncase $1 in -c) echo '{json.dumps(['', there, gone])}';; *) exit 1; esac\n")
        found = package_folders(str(python))
        self.assertEqual(found[0], there)
        # This one's too, and alone if the other tells nothing.
        own = [path for path in dict.fromkeys(sys.path) if os.path.isdir(path)]
        self.assertEqual(found[1:], own)
        for python in (self.file("broken", "#!/bin/sh\nexit 1\n"), self.file("silent", "#!/bin/sh\n"), self.root / "gone"):
            self.assertEqual(package_folders(str(python)), own)

    def test_those_of_a_user_are_among_them(self):
        major, minor = sys.version_info[:2]
        user = self.root / f"lib/python{major}.{minor}/site-packages"
        user.mkdir(parents=True)
        # Packages of a virtual environment shut those out.
        python = self.file("python", f'#!/bin/sh\nPYTHONUSERBASE={self.root} exec {os.path.realpath(sys.executable)} "$@"\n')
        before = os.environ.pop("PYTHONNOUSERSITE", None)
        try:
            self.assertIn(str(user), package_folders(str(python)))
        finally:
            if before is not None:
                os.environ["PYTHONNOUSERSITE"] = before

    def test_libraries_and_the_sanitizer_are_found_in_them(self):
        for major in (12, 13):
            for name in ("nvrtc", "cublasLt"):
                self.file(f"[a] {major}/nvidia/{name}/lib/lib{name}.so.{major}")
        packages = [str(self.root / f"[a] {major}") for major in (12, 13)]
        for driver, major in [(13, 13), (12, 12)]:
            found = library_folders(driver, packages)
            self.assertEqual(found[:2], [f"{self.root}/[a] {major}/nvidia/{name}/lib" for name in ("nvrtc", "cublasLt")])
        self.path(self.root / "nowhere")
        run = self.run_of()
        run.packages = packages
        self.assertIsNone(checks.sanitizer_tool(run))
        self.file("[a] 12/nvidia/cuda_sanitizer_api/bin/compute-sanitizer")
        self.assertIsNone(checks.sanitizer_tool(run))
        tool = self.file("[a] 13/nvidia/cu13/compute-sanitizer/compute-sanitizer")
        self.assertEqual(checks.sanitizer_tool(run), str(tool))
        tool.chmod(0o644)
        self.assertIsNone(checks.sanitizer_tool(run))


class Ours(Quiet):
    def test_a_sample_has_as_many_timings_as_fit(self):
        """Each is of several calls."""
        run, repeats = self.run_of(), []
        run.scratch, run.ours = pathlib.Path(self.folder.name), lambda *words: list(words)
        case = dict(what="infer", model="vit-b16", batch=4, precision="bf16", drop_ratio=0.0)
        ours = contenders.Ours(run, "ours", case)

        def command(words):
            repeats.append(words[-1])
            ours.json.write_text(json.dumps({"results": [{"images_per_s": 400.0, "gflops": 14000.0, "calls": 25}]}))
        run.command = command
        ours.ready()
        self.assertEqual([ours.sample(seconds) for seconds in (1.0, 0.0)], [0.01, 0.01])
        self.assertEqual(repeats, [1, 4, 1])
        self.assertEqual(ours.facts["gflop_per_image"], 35.0)


class Race(Quiet):
    def test_contenders_take_turns_and_those_that_fail_are_left_out(self):
        run, results = self.run_of(), {}
        a, b = Contender("a", 1.0, 2.0, 8.0), Contender("b", 2.0, 2.0, 2.0)
        large = Contender("large", "CUDA out of memory", batch=512)
        broken = Contender("broken", "illegal instruction")
        ready = contenders.prepare(run, [a, large, b, broken], results)
        self.assertEqual(ready, [a, b])
        self.assertTrue(large.closed and broken.closed)
        self.assertEqual((results["large"]["status"], results["broken"]["status"]), ("no memory", "failed"))
        contenders.take_turns(run, ready, results, 3)
        self.assertEqual(results["a"]["samples"], [8.0, 4.0, 1.0])
        ratio = contenders.ratio(results, "a", "b")
        self.assertEqual((ratio["least"], ratio["median"], ratio["greatest"]), (0.25, 1.0, 2.0))
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


class Commands(Quiet):
    def test_one_that_is_cut_short_has_not_failed(self):
        run = self.run_of()
        run.env, run.left = os.environ, lambda: 1.0
        for words, status in [(["true"], "passed"), (["false"], "failed"), (["sleep", "60"], "no time")]:
            result = run.each({}, "one", lambda: {"says": Session.command(run, words)})
            self.assertEqual(result["status"], status)
            if status != "passed":
                self.assertIn({"failed": "exit code 1", "no time": "no time left"}[status], result["reason"])


class Bounds(Quiet):
    """Each target just below, and just above what is expected."""

    def row(self, target):
        row = self.report.rows()[target]
        self.report.data["targets"].clear()
        return row

    def met(self, target):
        return self.row(target)["met"]

    @staticmethod
    def ran(rate, batch=256):
        return {"status": "passed", "images_per_s": {"median": rate}, "samples": [rate] * 3, "case": {"batch": batch}}

    def test_ratios_of_steps(self):
        before = times.has_fp8
        self.addCleanup(setattr, times, "has_fp8", before)
        times.has_fp8 = lambda run: True
        usual = {"pcae": 1.0, "pcae --tune": 1000.0, "pcae, fp8 teacher": 1000.0, "mae": 1.0, "mae --tune": 1.0, "torch eager": 1.0,
                 "torch graphs": 1.0}
        for target, others, least in [("step over PyTorch", "torch graphs", 1.5), ("step over MAE", "mae --tune", 2.0),
                                      ("step with fp8 teacher over MAE", "mae --tune", 2.25)]:
            for value, met in [(least - 0.01, False), (least + 0.01, True)]:
                found = {name: self.ran(rate) for name, rate in (usual | {others: 1000.0 / value}).items()}
                times.step_targets(self.run_of(), {}, found)
                self.assertEqual(self.met(target), met, (target, value))
            # Of another model nothing is known.
            times.step_targets(self.run_of(model="vit-l16"), {}, found)
            self.assertIsNone(self.met(target))

    def test_a_teacher_in_fp8_alone_reaches_its_own_bound(self):
        before = times.has_fp8
        self.addCleanup(setattr, times, "has_fp8", before)
        times.has_fp8 = lambda run: True
        for fp8, met in [(2.24, False), (2.26, True)]:
            found = {"pcae": self.ran(2.1), "pcae, fp8 teacher": self.ran(fp8), "mae": self.ran(1.0), "torch eager": self.ran(1.0)}
            times.step_targets(self.run_of(), {}, found)
            self.assertEqual(self.met("step with fp8 teacher over MAE"), met, fp8)

    def test_share_of_the_peak(self):
        # Of 989e3 by the data sheet, and of what was measured where there is none.
        for device, peak in [("NVIDIA H100 80GB HBM3", 989e3), ("another", 500e3)]:
            for share, met in [(0.449, False), (0.451, True)]:
                run = self.run_of(variants=["eager"])
                run.limits, run.has_torch = lambda: {"bf16_gflops": 500e3}, lambda: {"device": device}
                pcae = self.ran(share * peak / 35.0) | {"gflop_per_image": 35.0}
                times.share_of_peak(run, {}, {"pcae": pcae, "pcae, fp8 teacher": self.ran(1e9) | {"gflop_per_image": 35.0}})
                self.assertEqual(self.met("step of peak"), met, (device, share))

    def infer(self, **seconds):
        """The rows of forwards of both sizes, each contender by seconds of a picture."""
        before = times.Ours, times.peers

        def back():
            times.Ours, times.peers = before

        def make(run, name, case):
            one = Contender(name, *[case["batch"] * seconds["tuned" if case.get("tune") else "less" if case["drop_ratio"] else "dense"]] * 3,
                            batch=case["batch"])
            one.facts = {"launches": {"graphs": 1}}
            return one
        try:
            times.Ours = make
            times.peers = lambda run, cases: [
                Contender(f"torch eager{label}", *[case["batch"] * seconds["torch_less" if case["drop_ratio"] else "torch"]] * 3,
                          batch=case["batch"]) for label, case in cases]
            times.infer(self.run_of(infer_batch=[1, 256]), {})
        finally:
            back()
        rows = self.report.rows()
        self.report.data["targets"].clear()
        return {target: row["met"] for target, row in rows.items() if target.startswith("infer")}

    def test_ratios_of_forwards(self):
        usual = dict(less=1.0, dense=2.0, tuned=9.0, torch=1.0, torch_less=2.0)
        every = {"infer 1", "infer 256", "infer 1 over PyTorch", "infer 256 over PyTorch"}
        for change, missed in [
                ({}, set()), ({"dense": 1.76}, set()), ({"dense": 1.74}, {"infer 1", "infer 256"}),
                ({"torch_less": 1.01}, set()), ({"torch_less": 0.99}, {"infer 1 over PyTorch", "infer 256 over PyTorch"}),
                # What is dense is held against nothing of PyTorch's, and the fastest counts, tuned or not.
                ({"torch": 0.1}, set()), ({"less": 9.0, "tuned": 1.0}, every - {"infer 1 over PyTorch", "infer 256 over PyTorch"})]:
            found = self.infer(**usual | change)
            self.assertEqual(found, {target: target not in missed for target in every}, change)

    def trained(self, part, losses, **arguments):
        """The results of a part by such losses, and what of its targets is met."""
        before = training.pretrain, training.pictures
        try:
            training.pretrain, training.pictures = lambda run, name, *words: losses(name), lambda run: "pictures"
            results = {}
            part(self.run_of(**arguments), results)
        finally:
            training.pretrain, training.pictures = before
        return {name: one["status"] for name, one in results.items()}

    def test_losses_in_bf16_beside_f32(self):
        def curve(off, steps=500):
            # Half of them by twice as much.
            losses = lambda name: {step: 2.0 * (1 + 2 * off * (name == "curve-bf16" and step % 2)) for step in range(1, steps + 1)}
            found = self.trained(training.curve, losses, curve_steps=steps, curve_batch=64)
            return found["bf16 beside f32"], self.met("curve")
        self.assertEqual([curve(off) for off in (0.0, 0.0099, -0.0099)], [("passed", True)] * 3)
        self.assertEqual([curve(off) for off in (0.0101, -0.0101, float("nan"))], [("failed", False)] * 3)
        # Fewer steps are not what is asked for.
        self.assertEqual(curve(0.0, steps=498), ("passed", None))

    def test_losses_of_large_models(self):
        nan, inf = float("nan"), float("inf")
        for losses, asked, status, met in [
                ({}, 200, "passed", True), ({200: nan}, 200, "failed", False), ({7: inf}, 200, "failed", False), ({1: None}, 200, "failed", False),
                ({}, 199, "passed", None), ({7: nan}, 199, "failed", False), ({201: 1.0}, 200, "failed", False)]:
            made = {step: 0.5 for step in range(1, asked + 1)} | losses
            found = self.trained(training.large, lambda name: made, large=["vit-l16"], large_steps=asked, large_batch=64)
            self.assertEqual((found, self.met("large vit-l16")), ({"vit-l16": status}, met), losses)

        def none(_):
            raise NoTime("no time left")
        found = self.trained(training.large, none, large=["vit-h14"], large_steps=200, large_batch=64)
        self.assertEqual((found, self.met("large vit-h14")), ({"vit-h14": "no time"}, None))

    def test_operations_alone_over_a_step(self):
        self.path(self.folder.name)
        for share, met in [(0.969, False), (0.971, None), (1.5, None)]:
            times.busy(self.run_of(), {}, {"breakdown": [{"operation": "norm", "seconds": share}], "seconds": 1.0})
            self.assertEqual(self.met("busy"), met, share)


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
        checks.fixtures(run, results)
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
            for precision in ("f32", "bf16"):
                row = self.report.rows()[f"parity {precision}"]
                self.assertEqual((row["found"], row["met"]), (f"{count} of {count} pass", True))

    def test_what_was_not_replayed_is_not_known_and_what_fails_is_missed(self):
        count, first = len(checks.fixture_paths()), checks.fixture_paths()[0].stem
        for failure, met, says in [(Failure("off by 1"), False, f"{count - 1} of {count} pass, not {first} f32"),
                                   (NoTime("no time left"), None, f"{count - 1} of {count} pass, not {first} f32 (no time)")]:
            run, fails = self.run_of(), [failure]
            run.ours = lambda *words: list(map(str, words))

            def command(words):
                if fails:
                    raise fails.pop()
                return "parity: 3 tensors\n"
            run.command = command
            checks.fixtures(run, {})
            rows = self.report.rows()
            self.assertEqual((rows["parity f32"]["found"], rows["parity f32"]["met"]), (says, met))
            self.assertEqual(rows["parity bf16"]["met"], True)
        run.left = lambda: 0.0
        checks.fixtures(run, {})
        row = self.report.rows()["parity bf16"]
        self.assertEqual(row["met"], None)
        self.assertTrue(row["found"].startswith(f"0 of {count} pass, not "), row)


# Trains as `pcae pretrain` does, with a checkpoint after each step, until it is interrupted. `ends` says whether CUDA heeds that, and
# `late` whether only after all steps; `off` how much larger its losses are.
TRAINER = """#!{python}
import json, pathlib, signal, sys, time
told = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder = pathlib.Path(told.get("--out") or told["--resume"])
last, metrics, stop = folder / "checkpoints/last.safetensors", folder / "metrics.jsonl", False

def heed(*_):
    global stop
    stop = told["--backend"] == "cpu" or {ends}
signal.signal(signal.SIGINT, heed)
last.parent.mkdir(parents=True, exist_ok="--resume" in told)
done = int(last.read_text()) if "--resume" in told else 0
(folder / "steps").write_text(told["--steps"]) if "--steps" in told else None
for step in range(done + 1, int((folder / "steps").read_text()) + 1):
    loss = (1 + ({off} if told["--backend"] == "cuda" else 0)) / step
    with metrics.open("a") as file:
        print(json.dumps({{"step": step, "loss": loss}}), json.dumps({{"step": step, "lr": 1.0}}), sep="\\n", file=file)
    last.with_suffix(".new").write_text(str(step))
    last.with_suffix(".new").replace(last)
    time.sleep(0.005)
    if stop and (step == 40 or not {late}):
        sys.exit(130)
"""


class Resumed(Quiet):
    def resumed(self, off=0.0, ends=True, late=False):
        """What is found of such a trainer, and the target's row."""
        run, results = self.run_of(pictures=1), {}
        run.scratch = pathlib.Path(self.folder.name)
        (run.scratch / "pcae").write_text(TRAINER.format(python=sys.executable, off=off, ends=ends, late=late))
        (run.scratch / "pcae").chmod(0o755)
        run.ours, run.env, run.command = lambda *words: [run.scratch / "pcae", *words], os.environ, command
        run.interrupted = types.MethodType(Session.interrupted, run)
        training.resumed(run, results)
        return {name: one["status"] for name, one in results.items()}, self.report.rows()["parity resume"]

    def test_a_run_goes_on_with_the_other_backend(self):
        found, row = self.resumed(off=0.9e-4)
        self.assertEqual(found, {"a run on cpu": "passed", "from cpu to cuda": "passed", "from cuda to cpu": "passed"})
        self.assertEqual(row["met"], True)
        self.assertEqual(row["found"].count("losses within 9.0e-05"), 2)

    def test_other_losses_are_a_failure(self):
        found, row = self.resumed(off=1.1e-4)
        self.assertEqual(found, {"a run on cpu": "passed", "from cpu to cuda": "failed", "from cuda to cpu": "failed"})
        self.assertEqual(row["met"], False)

    def test_a_run_that_nothing_interrupts_proves_nothing(self):
        found, row = self.resumed(ends=False)
        self.assertEqual(found["from cuda to cpu"], "failed")
        self.assertIn("an exit code of 130 after an interrupt, found 0", row["found"])
        self.assertEqual(row["met"], False)

    def test_a_run_without_time_is_not_known(self):
        run = self.run_of(pictures=1)
        run.scratch, run.ours, run.left = pathlib.Path(self.folder.name), lambda *words: [*words], lambda: 0.0
        training.resumed(run, {})
        row = self.report.rows()["parity resume"]
        self.assertEqual((row["found"], row["met"]), ("a run on cpu: no time", None))
        run.left = lambda: 9.0

        def command(words):
            raise NoTime("pcae: no time left") if late else Failure("pcae: exit code 1")
        run.command = command
        for late, met in [(True, None), (False, False)]:
            training.resumed(run, {})
            self.assertEqual(self.report.rows()["parity resume"]["met"], met)

    def test_a_run_that_is_interrupted_at_its_end_proves_nothing(self):
        found, row = self.resumed(late=True)
        self.assertEqual(found["from cpu to cuda"], "failed")
        self.assertIn("found 40, 40 before the resume", row["found"])


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


class Breakdown(Quiet):
    HELP = """      --what <WHAT>
          Possible values:
          - infer:    A classifier's forward, fine-tuned or not
          - finetune: A step of finetune
      --precision <PRECISION>
          - fp8:  8 bits
"""

    def breakdown(self, help, fails=lambda told: None, slow=lambda told: False):
        """What is found of a program with such a help, what is asked of it, and the target's row. A copy makes 1e12 bytes a second."""
        self.path(self.folder.name)
        run, results, asked = self.run_of(breakdown_batch=256, infer_batch=[1, 128]), {}, []
        run.scratch, run.ours = pathlib.Path(self.folder.name), lambda *words: list(map(str, words))

        def command(words):
            if words[1:] == ["--help"]:
                return help
            words = list(map(str, words))
            told = dict(zip(words, words[1:]))
            self.assertIn("--breakdown", words)
            settings = ("--what", "--batch-size", "--method", "--mask-ratio", "--drop-ratio", "--teacher-precision")
            asked.append(" ".join(told[name] for name in settings if name in told))
            if failure := fails(told):
                raise failure
            kernel = {"kernel": "add", "launches": 1.0, "seconds": 60e-6 if slow(told) else 40e-6, "bytes": 40e6}
            result = {"breakdown": [], "seconds": 1.0, "kernels": [kernel]}
            pathlib.Path(told["--json"]).write_text(json.dumps({"machine": {"copy_gbytes_per_s": {"cuda": 1000.0}}, "results": [result]}))
        run.command = command
        times.breakdown(run, results)
        self.asked = asked
        return {name: one["status"] for name, one in results.items()}, self.report.rows()["bandwidth"]

    def test_all_that_launches_kernels_is_taken_apart(self):
        found, row = self.breakdown(self.HELP)
        self.assertEqual(self.asked, ["step 256 pcae 0.85", "infer 128 0.0", "infer 128 0.4", "step 256 mae 0.75", "step 256 pcae 0.85 fp8",
                                      "finetune 256 0.4"])
        self.assertEqual(set(found.values()), {"passed"})
        self.assertEqual(list(found).count("busy"), 1)
        self.assertEqual((row["found"], row["met"]), ("100 % add (step, batch 256), of 6, 0 too short to judge", True))
        # One that knows neither.
        self.breakdown(self.HELP.replace("- finetune:", "").replace("fp8", ""))
        self.assertEqual(self.asked, ["step 256 pcae 0.85", "infer 128 0.0", "infer 128 0.4", "step 256 mae 0.75"])

    def test_a_slow_kernel_of_any_of_them_is_told(self):
        for name, slow in [("forward, drop 0.4, batch 128", lambda told: told.get("--drop-ratio") == "0.4" and told["--what"] == "infer"),
                           ("fine-tuning step, batch 256", lambda told: told["--what"] == "finetune"),
                           ("MAE step, batch 256", lambda told: told.get("--method") == "mae"),
                           ("step, fp8 teacher, batch 256", lambda told: "--teacher-precision" in told)]:
            _, row = self.breakdown(self.HELP, slow=slow)
            self.assertEqual(row["met"], False)
            self.assertTrue(row["found"].endswith(f"below: add ({name}) 67 %"), row)

    def test_a_device_without_fp8_leaves_nothing_open(self):
        old = Failure("error: expected compute capability 8.9 (Ada, Hopper) or newer, found 8.0")
        found, row = self.breakdown(self.HELP, fails=lambda told: old if "--teacher-precision" in told else None)
        self.assertEqual(found["step, fp8 teacher, batch 256"], "not available")
        self.assertEqual((row["found"], row["met"]), ("100 % add (step, batch 256), of 5, 0 too short to judge", True))

    def test_one_that_fails_or_has_no_time_leaves_it_open(self):
        for failure, status in [(Failure("no memory on the device"), "failed"), (NoTime("no time left"), "no time")]:
            found, row = self.breakdown(self.HELP, fails=lambda told: failure if told.get("--method") == "mae" else None)
            self.assertEqual(found["MAE step, batch 256"], status)
            self.assertTrue(row["found"].endswith("no kernels are told of MAE step, batch 256"), row)
            self.assertIsNone(row["met"])


class Bandwidth(Quiet):
    def found(self, **kernels):
        """The target's row, of reports of `pcae bench`: kernels as launches, seconds of all and bytes of all. A copy makes 1e12 bytes a second."""
        reports = {}
        for name, told in kernels.items():
            each = [{"kernel": kernel, "launches": launches, "seconds": seconds, "share": 0.1} | ({"bytes": size} if size else {})
                    for kernel, (launches, seconds, size) in (told or {}).items()]
            report = {"machine": {"copy_gbytes_per_s": {"cuda": 1000.0}}, "results": [{"breakdown": []}]}
            if told is not None:
                report["results"][0]["kernels"] = each
            reports[name] = report
        self.results = {}
        times.bandwidth(self.run_of(), self.results, reports)
        row = self.report.rows()["bandwidth"]
        return row["found"], row["met"]

    def test_the_slowest_of_the_long_ones_decides(self):
        # A launch of 20 us by a copy, and one of 9, which takes 90.
        step = {"gelu_of": (2.0, 50e-6, 40e6), "products": (1.0, 1.0, None), "norm": (2.0, 180e-6, 18e6)}
        self.assertEqual(self.found(step=step, infer={"gelu_of": (1.0, 40e-6, 40e6)}),
                         ("80 % gelu_of (step), of 2, 1 too short to judge", True))
        self.assertEqual(self.results["bandwidth"]["short"].keys(), {"norm (step)"})
        self.assertEqual(self.found(step=step, infer={"gelu_of": (1.0, 40e-6, 20e6), "add": (1.0, 20e-6, 10e6)}),
                         ("50 % gelu_of (infer), of 3, 1 too short to judge; below: gelu_of (infer) 50 %, add (infer) 50 %", False))
        lines = [line.split() for line in self.text().splitlines()]
        self.assertEqual(sum("norm" in line for line in lines), 2)
        self.assertEqual([self.found(step={"add": (1.0, 40e-6, 40e6 * share)})[1] for share in (0.79, 0.81)], [False, True])
        # A launch of 9.9 us by a copy, and one of 10.1.
        self.assertEqual([self.found(step={"add": (1.0, 1.0, size)})[1] for size in (9.9e6, 10.1e6)], [None, False])
        for name in ("gelu_of (step)", "gelu_of (infer)", "norm (step)", "add (infer)"):
            self.assertIn(name, self.text())
        self.assertIn("10.0 % of a copy's bandwidth: norm (step), a launch of which a copy makes in 9.0 us; not judged", self.text())
        self.assertNotIn("products", self.text())

    def test_a_report_without_kernels_leaves_it_open_unless_others_miss(self):
        fast, slow = {"gelu_of": (1.0, 40e-6, 40e6)}, {"gelu_of": (1.0, 80e-6, 40e6)}
        found, met = self.found(step=fast, infer=None)
        self.assertTrue(found.endswith("; no kernels are told of infer"), found)
        self.assertIsNone(met)
        self.assertEqual(self.found(step=slow, infer=None)[1], False)
        self.assertEqual(self.found(step=None, infer={}), ("no kernels are told of step, infer", None))
        self.assertEqual(self.found(step={"add": (1.0, 1e-6, 1e3)}), ("all 1 are too short to judge", None))
        times.bandwidth(self.run_of(), {}, {"step, batch 256": None})
        self.assertEqual(self.report.rows()["bandwidth"]["found"], "no kernels are told of step, batch 256")


# What a step leaves in a trace, in nanoseconds from when it begins: a table, start, end, node of a graph, kind of a copy. Kernels overlap,
# the last thing reaches into the next step, and what crosses the bus fills the gap. Something runs for 960 of 1000.
STEP = [("KERNEL", 0, 600, 70, None), ("KERNEL", 600, 900, 71, None), ("KERNEL", 850, 940, 72, None),
        ("MEMCPY", 895, 1000, 73, 1), ("MEMCPY", 940, 950, 74, 8), ("MEMSET", 990, 1005, 75, None)]
# Of a measurement of the peak, which is much longer.
PRODUCT = [("KERNEL", 0, 6000, None, None)]

NSYS = """#!{python}
import json, os, pathlib, sqlite3, subprocess, sys
# Its own end where the command begins.
count = next(count for count, word in enumerate(sys.argv[2:]) if not word.startswith("-"))
options, command = dict(word.split("=", 1) for word in sys.argv[2:2 + count]), sys.argv[2 + count:]
output = options["--output"]
if sys.argv[1] == "profile":
    assert options["--cuda-graph-trace"] == "node" and options["--trace"] == "cuda", options
    assert output.endswith(".nsys-rep")
    subprocess.run(command, env=os.environ | {{"TRACED": "1"}}, check=True)
    rows = json.loads(pathlib.Path({rows!r}).read_text())
    batch = command[command.index("--batch-size") + 1]
    pathlib.Path(output).write_text(json.dumps(rows.get(batch, rows["usual"])))
else:
    assert sys.argv[1] == "export" and options["--type"] == "sqlite", sys.argv
    if options.get("--force-overwrite") == "true":
        pathlib.Path(output).unlink(missing_ok=True)
    database = sqlite3.connect(output)
    for table, *row in json.loads(pathlib.Path(*command).read_text()):
        copies = ", copyKind INT" if table == "MEMCPY" else ""
        database.execute(f"CREATE TABLE IF NOT EXISTS CUPTI_ACTIVITY_KIND_{{table}} (start INT, end INT, graphNodeId INT"
                         f"{{copies}}, deviceId INT)")
        row = [*row[:3], *(row[3:] if copies else []), 0]
        database.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_{{table}} VALUES ({{','.join('?' * len(row))}})", row)
    database.commit()
"""

# A row of so many steps by batch size, which take longer under nsys.
PCAE = """#!{python}
import json, os, pathlib, sys
told = dict(zip(sys.argv, sys.argv[1:]))
assert told["--repeats"] == "1" and "--breakdown" not in told, told
seconds = {seconds} + {added} * bool(os.environ.get("TRACED"))
calls = {calls}.get(told["--batch-size"], {calls}["usual"])
pathlib.Path(told["--json"]).write_text(json.dumps({{"results": [{{"seconds": seconds, "calls": calls}}]}}))
"""


class Busy(Quiet):
    PARTS = [{"operation": "linear forward", "seconds": 0.3}, {"operation": "selection", "seconds": 0.2},
             {"operation": "transfer", "seconds": 9.0}]

    def test_operations_alone_bound_how_busy_it_is(self):
        self.path(self.folder.name)
        for seconds, met, says in [(1.0, False, "at most 50.0 %"), (0.4, None, "at most 100.0 %")]:
            times.busy(self.run_of(), {}, {"breakdown": self.PARTS, "seconds": seconds})
            row = self.report.rows()["busy"]
            self.assertEqual(row["met"], met)
            self.assertTrue(row["found"].startswith(says), row)
            self.assertIn("nsys, which would tell, was not found", row["found"])

    def traced(self, rows, calls=10, added=0.0, seconds=1e-6, alone=0.4, **others):
        """What is found of such a trace, others of some batch sizes, of so many steps that are so long without nsys."""
        folder = pathlib.Path(self.folder.name)
        self.path(folder)
        (folder / "rows").write_text(json.dumps({"usual": rows}))
        for name, text in [("nsys", NSYS), ("pcae", PCAE)]:
            (folder / name).write_text(text.format(python=sys.executable, rows=str(folder / "rows"), added=added, seconds=seconds - added,
                                                   calls={"usual": calls} | others))
            (folder / name).chmod(0o755)
        run, results = self.run_of(breakdown_batch=256), {}
        run.scratch, run.ours = folder, lambda *words: [folder / "pcae", *words]
        run.command = command
        times.busy(run, results, {"breakdown": self.PARTS, "seconds": alone})
        return results["busy"], self.report.rows()["busy"]

    @staticmethod
    def trace(row=10, step=STEP, waits=0):
        """Steps with a gap after each, a measurement of the peak, and a row of steps, the first of which waits. It ends at 5 behind the last."""
        found, now = [], 0
        for what, takes in [(step, 3000)] * 3 + [(PRODUCT, 6000 + waits)] + [(step, 1000)] * row:
            found.extend((table, start + now, end + now, *more) for table, start, end, *more in what)
            now += takes
        return found

    def test_what_ran_in_the_last_part_of_a_row_of_steps_is_busy(self):
        result, row = self.traced(self.trace())
        self.assertEqual((result["calls"], result["batch"]), (10, 256))
        self.assertAlmostEqual(1e9 * result["step"], 1000, 3)
        self.assertAlmostEqual(1e9 * result["ran"], 960, 3)
        self.assertEqual(row["met"], False)
        self.assertTrue(row["found"].startswith("96.0 % by nsys, 96.0 % less"), row)
        self.assertTrue(row["found"].endswith("batch 256, 10 steps)"), row)
        for more, met in [(9, False), (11, True)]:
            _, row = self.traced(self.trace(step=STEP + [("KERNEL", 960, 960 + more, 77, None)]))
            self.assertEqual(row["met"], met, row)

    def test_what_crosses_the_ends_of_the_part_counts_up_to_them(self):
        # Where something runs anyway, or behind the end; uploads at any time.
        end = max(end for _, _, end, _, kind in self.trace() if kind != 1)
        more = [("KERNEL", end - 8060, end - 7965, None, None), ("KERNEL", end - 2, end + 2, None, None),
                ("MEMCPY", end - 400, end + 900, 73, 1), ("MEMCPY", end - 50, end + 300, 76, 2), ("KERNEL", end + 500, end + 600, None, None)]
        result, _ = self.traced(self.trace() + more)
        self.assertAlmostEqual(1e9 * result["ran"], 960, 3)
        inside = ("KERNEL", end - 1050, end - 1030, None, None)  # 950 to 970 of a step, in its gap
        result, _ = self.traced(self.trace() + more + [inside])
        self.assertAlmostEqual(1e9 * result["ran"], 960 + 20 / 8, 3)

    def test_that_the_first_steps_wait_counts_for_nothing(self):
        result, _ = self.traced(self.trace(waits=2000), seconds=1.2e-6)
        # Of 9.6 steps, the first of which is cut at 405; the last one ends 5 later.
        self.assertAlmostEqual(1e9 * result["ran"], 1200 * (9 * 960 + 555 + 5) / 9600, 3)

    def test_what_tracing_adds_leaves_it_open(self):
        _, row = self.traced(self.trace(), added=20e-9)
        self.assertTrue(row["found"].startswith("96.0 % by nsys, 98.0 % less"), row)
        self.assertIsNone(row["met"])
        # 10 more run.
        _, row = self.traced(self.trace(step=STEP + [("KERNEL", 960, 970, 77, None)]), added=20e-9)
        self.assertTrue(row["found"].startswith("97.0 % by nsys"), row)
        self.assertEqual(row["met"], True)
        # A step that is faster under nsys says nothing of what that adds.
        _, row = self.traced(self.trace(), added=-20e-9)
        self.assertTrue(row["found"].startswith("96.0 % by nsys, 96.0 % less"), row)

    def test_few_long_steps_tell_nothing(self):
        result, _ = self.traced(self.trace(), calls=4, **{"64": 10})
        self.assertEqual((result["calls"], result["batch"]), (10, 64))
        result, row = self.traced(self.trace(), calls=4)
        self.assertEqual((result["status"], row["met"]), ("not available", None))
        self.assertTrue(row["found"].endswith("nsys: no row of 5 steps"), row)

    def test_without_graphs_the_bound_is_what_there_is(self):
        plain = [(*one[:3], None, one[4]) for one in self.trace()]
        result, row = self.traced(plain, alone=1.0)
        self.assertEqual((result["status"], row["met"]), ("not available", False))
        self.assertIn("expected kernels of graphs on one device, found them on 0", row["found"])

    def test_a_trace_that_does_not_tell_graphs_is_a_failure(self):
        path = pathlib.Path(self.folder.name) / "old.sqlite"
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, deviceId INT, streamId INT)")
            database.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 7)", [(0, 10), (10, 20)])
        database.close()
        with self.assertRaisesRegex(Failure, "found them on 0"):
            nsys.busy(path, 1e-9, 20)


if __name__ == "__main__":
    unittest.main()
