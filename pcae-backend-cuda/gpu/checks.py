"""Does it compute what it must: the machine, golden fixtures, test programs, sanitizer."""
import glob
import json
import os
import re
import shutil
import time

from session import HERE, NO_FP8, Failure, fixture_paths

SMALL_FIXTURES = ["pcae_small", "mae_small", "classify_ptr"]
# A teacher in fp8 is for some devices, and for some widths, which not all fixtures have.
REFUSALS = [NO_FP8, "widths of multiples of 16, for a teacher in fp8"]
FAILED_MARK = 99


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
        each = {name: one["status"] for name, one in results.items() if name.endswith(f" {precision}")}
        wrong = [name for name, status in each.items() if status != "passed"]
        says = f"{len(each) - len(wrong)} of {len(each)} pass" + (f", not {', '.join(wrong)}" if wrong else "")
        run.report.found(f"parity {precision}", says, not wrong)


def tests(run, results):
    folder = run.args.test_programs or HERE / "tests"
    programs = sorted(path for path in folder.glob("*") if path.is_file() and os.access(path, os.X_OK))
    if not programs:
        raise Failure(f"no test programs in {folder}; run bundle again")
    for program in programs:
        if run.args.only_tests and program.name not in run.args.only_tests:
            continue

        def test():
            # One at a time: some compare times or memory of the whole device.
            output = run.command([program, "--skip", "on_the_emulator", "--nocapture", "--test-threads", "1"])
            if "skipped: no CUDA device" in output:
                raise Failure(f"{program.name} found no CUDA device")
            summary = re.findall(r"test result: ok\. (\d+) passed", output)
            if not summary or int(summary[-1]) == 0:
                raise Failure(f"{program.name} ran no test")
            return {"says": f"{summary[-1]} tests", "tests": int(summary[-1])}
        run.each(results, program.name, test)


def sanitizer_tool(run):
    if run.args.rehearse:
        # Runs what it is given, and finds nothing: the emulator has checks of its own.
        stand_in = run.scratch / "compute-sanitizer"
        stand_in.write_text("#!/bin/sh\nshift 4\n\"$@\" || exit\necho '========= ERROR SUMMARY: 0 errors'\n")
        stand_in.chmod(0o755)
        return stand_in
    places = ["/usr/local/cuda*/bin/compute-sanitizer", "/opt/nvidia/*/compute-sanitizer"]
    found = [path for place in places for path in sorted(glob.glob(place))]
    return shutil.which("compute-sanitizer") or (found[-1] if found else None)


def sanitizer(run, results):
    tool = sanitizer_tool(run)
    if not tool:
        run.report.say("  skipped: there is no compute-sanitizer here")
        return "skipped"
    paths = {path.stem: path for path in fixture_paths()}
    runs = {f"{name} {precision}": run.ours("parity", paths[name], "--backend", "cuda", "--precision", precision)
            for name in SMALL_FIXTURES for precision in ("f32", "bf16")}
    # What no small fixture goes through: uploads beside the step, steps as graphs, a teacher in fp8, and the queue by itself.
    folder = run.args.test_programs or HERE / "tests"
    some = {"pixels": [], "graphs": [], "fp8": [], "units": ["queue::"]}
    runs |= {name: [folder / name, *filters, "--skip", "on_the_emulator", "--test-threads", "1"]
             for name, filters in some.items() if (folder / name).is_file()}
    if run.args.rehearse:
        runs = dict([*runs.items()][::3])
    for check in ("memcheck", "racecheck", "synccheck"):
        for name, command in runs.items():
            def sanitize():
                output = run.command([tool, "--tool", check, "--error-exitcode", FAILED_MARK, *command])
                lines = [line for line in output.splitlines() if "SUMMARY" in line]
                # Hazards that are warnings alone leave the exit code as it is.
                if not lines or not re.search(r": 0 (errors|hazards)", lines[-1]):
                    raise Failure(f"{check}: expected a summary without errors, found {lines[-1:] or 'none'}")
                if "instrumented API call" in output:
                    raise Failure(f"{check} saw no use of the device")
                return {"says": lines[-1].strip("= ")}
            run.each(results, f"{check} {name}", sanitize)
    return None
