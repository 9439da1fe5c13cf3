"""Does it compute what it must: the machine, golden fixtures, test programs, sanitizer."""
import glob
import json
import os
import re
import shutil
import time

from session import HERE, NO_FP8, Failure, fixture_paths
from training import resumed

SMALL_FIXTURES = ["pcae_small", "mae_small", "classify_ptr"]
# A teacher in fp8 is for some devices, and for some widths, which not all fixtures have.
REFUSALS = [NO_FP8, "widths of multiples of 16, for a teacher in fp8"]
FAILED_MARK = 99
SANITIZER_PLACES = ["/usr/local/cuda*/bin/compute-sanitizer", "/opt/nvidia/*/compute-sanitizer"]
SANITIZERS = ["memcheck", "racecheck", "synccheck"]
# Test programs, of which tests, and under what: what no small fixture goes through, which are uploads beside the step, steps as graphs, a
# teacher in fp8, the queue by itself, and what kernels are written with. Of products only which memory they touch is ours.
SANITIZED = [("pixels", [], SANITIZERS), ("graphs", [], SANITIZERS), ("fp8", [], SANITIZERS), ("units", ["queue::"], SANITIZERS),
             ("units", ["gemm::"], ["memcheck"]), ("primitives", [], SANITIZERS)]


def device(run, results):
    def driver():
        tool = shutil.which("nvidia-smi")
        if not tool:
            raise Failure("there is no nvidia-smi")
        asked = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,compute_cap"
        says = run.command([tool, f"--query-gpu={asked}", "--format=csv,noheader"]).strip()
        return {"says": says, "device": says}

    def ours():
        # The fastest command that computes something on the device; the first start compiles the kernels.
        began = time.monotonic()
        run.command(run.ours("parity", fixture_paths()[0], "--backend", "cuda", "--precision", "f32"))
        return {"says": f"the first start, with kernels to compile, took {time.monotonic() - began:.1f} s",
                "libraries": run.env["LD_LIBRARY_PATH"]}

    def torch():
        found = run.has_torch()
        return {"says": json.dumps(found)} | found

    def peaks():
        found = run.limits()
        return {"says": ", ".join(f"{name} {value:.0f}" for name, value in found.items())} | found

    if not run.args.rehearse:
        run.each(results, "driver", driver)
    run.each(results, "pcae", ours)
    if run.args.variants:
        run.each(results, "torch", torch)
        run.each(results, "limits", peaks)
    tool = sanitizer_tool(run)
    run.report.say(f"  compute-sanitizer: {tool or 'not found'}")


def parity(run, results):
    fixtures(run, results)
    resumed(run, results)


def fixtures(run, results):
    cases = {"f32": ["f32"], "bf16": ["bf16"], "bf16, fp8 teacher": ["bf16", "--teacher-precision", "fp8"]}
    for path in fixture_paths():
        for case, words in cases.items():
            if "fp8" in words and not path.stem.startswith("pcae"):
                continue  # has no teacher

            def replay():
                try:
                    output = run.command(run.ours("parity", path, "--backend", "cuda", "--precision", *words))
                except Failure as failure:
                    if any(refusal in str(failure) for refusal in REFUSALS):
                        return {"status": "not available", "says": str(failure)}
                    raise
                lines = output.strip().splitlines()
                return {"says": lines[-1] if lines else "", "output": output}
            run.each(results, f"{path.stem} {case}", replay)
    for precision in ("f32", "bf16"):
        run.report.all_of(f"parity {precision}", {name: one for name, one in results.items() if name.endswith(f" {precision}")})


def test_programs(run, names):
    """Their paths, of all if no names are given."""
    folder = run.args.test_programs or HERE / "tests"
    found = {path.name: path for path in sorted(folder.glob("*")) if path.is_file() and os.access(path, os.X_OK)}
    missing = [name for name in names or [] if name not in found]
    if missing or not found:
        raise Failure(f"no test programs {', '.join(missing)} in {folder}; run bundle again")
    return {name: path for name, path in found.items() if not names or name in names}


def tests(run, results):
    for name, program in test_programs(run, run.args.only_tests).items():
        def test():
            some = []
            if run.args.rehearse:
                # Does it run from here? CI runs all of them from where they were built.
                listed = re.findall(r"^(\S+): test$", run.command([program, "--list"]), re.MULTILINE)
                some = ["--exact", *[one for one in listed if one != "on_the_emulator"][:1]]
            # One at a time: some compare times or memory of the whole device.
            output = run.command([program, *some, "--skip", "on_the_emulator", "--nocapture", "--test-threads", "1"])
            if "skipped: no CUDA device" in output:
                raise Failure(f"{name} found no CUDA device")
            summary = re.findall(r"test result: ok\. (\d+) passed", output)
            if not summary or int(summary[-1]) == 0:
                raise Failure(f"{name} ran no test")
            return {"says": f"{summary[-1]} tests", "tests": int(summary[-1])}
        run.each(results, name, test)


def sanitizer_tool(run):
    if run.args.rehearse:
        # Runs what it is given, and finds nothing: the emulator has checks of its own.
        stand_in = run.scratch / "compute-sanitizer"
        stand_in.write_text("#!/bin/sh\ncase $1 in --help) exit; esac\nwhile case $1 in --*) true;; *) false; esac; do shift 2; done\n"
                            "\"$@\" || exit\necho '========= ERROR SUMMARY: 0 errors'\n")
        stand_in.chmod(0o755)
        return stand_in
    # The newest of a toolkit, or NVIDIA's package for Python: that for CUDA 13, as the one for 12 lacks programs that it starts.
    places = [*SANITIZER_PLACES, *(f"{glob.escape(folder)}/nvidia/*/compute-sanitizer/compute-sanitizer" for folder in run.packages)]
    found = [path for place in places for path in sorted(glob.glob(place), reverse=True) if os.access(path, os.X_OK)]
    return shutil.which("compute-sanitizer") or (found[0] if found else None)


def sanitizer_options(tool_help):
    """By tool. Libraries ask older drivers for functions that those lack, which is no error of ours. And what cuBLASLt's kernels do between
    threads the tools do not understand on every device: hazards are looked for in ours, none of which has such a name."""
    # Of the parts of one option all would have to match.
    vendor = [word for part in ("gemm", "nvjet", "cublas", "cutlass", "xmma", "splitK") for word in ("--kernel-name-exclude", f"kns={part}")]
    options = {"memcheck": ["--report-api-errors", "no"], "racecheck": vendor, "synccheck": vendor}
    # Older ones know less.
    return {check: words if words[0] in tool_help else [] for check, words in options.items()}


def sanitizer(run, results):
    tool = sanitizer_tool(run)
    if not tool:
        run.report.say("  skipped: there is no compute-sanitizer here")
        run.report.found("sanitizer", "not measured: there is no compute-sanitizer here", None)
        return "skipped"
    options = sanitizer_options(run.command([tool, "--help"]))
    paths = {path.stem: path for path in fixture_paths()}
    missing = [name for name in SMALL_FIXTURES if name not in paths]
    if missing:
        raise Failure(f"no fixtures {', '.join(missing)}; run bundle again")
    runs = {f"{name} {precision}": run.ours("parity", paths[name], "--backend", "cuda", "--precision", precision)
            for name in SMALL_FIXTURES for precision in ("f32", "bf16")}
    programs = test_programs(run, list({name for name, *_ in SANITIZED}))
    if run.args.rehearse:
        runs = dict([*runs.items()][::3])
    for check in SANITIZERS:
        commands = dict(runs)
        for name, filters, checked in SANITIZED[::3 if run.args.rehearse else 1]:
            if check in checked:
                commands[" ".join([name, *filters])] = [programs[name], *filters, "--skip", "on_the_emulator", "--test-threads", "1"]
        for name, command in commands.items():
            def sanitize():
                output = run.command([tool, "--tool", check, "--error-exitcode", FAILED_MARK, *options[check], *command])
                lines = [line for line in output.splitlines() if "SUMMARY" in line]
                # Hazards that are warnings alone leave the exit code as it is.
                if not lines or not re.search(r": 0 (errors|hazards)", lines[-1]):
                    raise Failure(f"{check}: expected a summary without errors, found {lines[-1:] or 'none'}")
                if "instrumented API call" in output:
                    raise Failure(f"{check} saw no use of the device")
                return {"says": lines[-1].strip("= ")}
            run.each(results, f"{check} {name}", sanitize)
    run.report.all_of("sanitizer", results)
    return None
