#!/usr/bin/env python3
"""Everything that can only be found out on a GPU, in one command: parity, tests, sanitizer, and times beside PyTorch.

    pcae-backend-cuda/gpu/bundle                     # where Rust is; then take target/gpu along
    python3 gpu/run.py --out results                 # where the GPU is: Linux, Python 3.11 or newer, no network, ten minutes
    python3 gpu/run.py --parts large,curve --minutes 9
    python3 gpu/run.py --rehearse $(sh pcae-backend-cuda/tests/emulator/build)     # without a GPU: do the commands work?

Writes `report.json` and `report.log`, anew after each command, so that a run that is ended leaves what it has. A part that fails does
not stop the others; one without time left says so. The exit code is 0 if no part failed.

| part | what |
|---|---|
| device | what the driver, the sanitizer and PyTorch are; what PyTorch's matrix product and copy reach |
| parity | every golden fixture in f32 and bf16 |
| tests | the backend's test programs |
| sanitizer | compute-sanitizer's memcheck, racecheck and synccheck over the small fixtures, uploads and graphs |
| step | a PCAE step, an MAE step, and PyTorch's variants (`peer.py`), taking turns |
| infer | a forward dense and with drop ratio 0.4, and PyTorch's variants, taking turns |
| breakdown | where the time of a step and of a forward goes, as `pcae bench --breakdown` tells |
| curve | losses of 500 steps in bf16 beside f32 (not by default) |
| large | 200 steps of ViT-L/16 and ViT-H/14 on generated pictures (not by default) |

How it times. In every round each contender gives one sample, one after the other, the order turned by one each round. Ours is
`pcae bench` in a fresh process; PyTorch's variants each keep a process, which waits for its turn. A sample is an untimed call and
then the median of as many as fit into `--seconds`. Figures are medians over the rounds, with the least and the greatest; a ratio is
that of the medians, with the least and the greatest of any one round.
"""
import argparse
import ctypes
import glob
import json
import math
import os
import pathlib
import platform
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import zlib

HERE = pathlib.Path(__file__).resolve().parent
# Weights of the parts: how the time that is left is shared between those that are still to come.
PARTS = {"device": 3, "parity": 2, "tests": 3, "sanitizer": 3, "step": 7, "infer": 7, "breakdown": 2, "curve": 3, "large": 7}
DEFAULT_PARTS = ["device", "parity", "tests", "sanitizer", "step", "infer", "breakdown"]
SMALL_FIXTURES = ["pcae_small", "mae_small", "classify_ptr"]
# Width, blocks and heads of the decoders: the method's, as wide as the encoder, and MAE's.
DECODERS = {"vit-micro": [96, 2, 3], "vit-b16": [768, 2, 12], "vit-l16": [1024, 2, 16], "vit-h14": [1280, 2, 16]}
MAE_DECODER = [512, 8, 16]
PCAE_MASK, MAE_MASK = 0.85, 0.75
DROP_RATIOS = [0.0, 0.4]
VARIANTS = ["eager", "compile", "graphs", "autotune"]
FAILED_MARK = 99


class Report:
    """What was found, on disk at any time."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.text = folder / "report.json", folder / "report.log"
        self.text.write_text("")
        self.data = {"parts": {}, "targets": []}

    def say(self, text):
        print(text, flush=True)
        self.note(text)

    def note(self, text):
        with self.text.open("a") as file:
            file.write(text.rstrip("\n") + "\n")

    def save(self):
        new = self.json.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1))
        new.replace(self.json)


class Failure(Exception):
    """A part failed, or one of its commands."""


def children(command, **settings):
    # A group of its own, to be ended together with what it started.
    return subprocess.Popen([str(word) for word in command], text=True, process_group=0, **settings)


def end(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def fixture_paths():
    for folder in (HERE / "fixtures", HERE.parents[1] / "tests/fixtures"):
        paths = sorted(folder.glob("*.safetensors"))
        if paths:
            return paths
    raise Failure(f"no fixtures beside {HERE}; run bundle again")


def driver_major():
    """The newest CUDA that the driver knows, as 13; 13 where there is none to ask."""
    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        pass
    return number.value // 1000 or 13


def library_folders(driver):
    """Folders of NVRTC and cuBLASLt, of a toolkit or of PyTorch's wheels, and of the driver where ldconfig lacks it.

    Of CUDA 13 where the driver is for that, else of CUDA 12: cuBLASLt needs a driver of its own version.
    """
    site = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    patterns = [f"{folder}/nvidia/*/lib" for folder in site if folder]
    patterns += ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib", "/usr/local/nvidia/lib64"]
    folders = sorted(path for pattern in patterns for path in glob.glob(pattern))
    having = lambda name: [folder for folder in folders if os.path.exists(f"{folder}/{name}")]
    found = []
    for major in (13, 12):
        nvrtc, cublas = having(f"libnvrtc.so.{major}"), having(f"libcublasLt.so.{major}")
        if major <= driver and nvrtc and cublas:
            found = nvrtc + cublas
            break
    return list(dict.fromkeys(found + having("libcuda.so.1")))


class Run:
    def __init__(self, arguments, scratch):
        self.args, self.scratch, self.report = arguments, scratch, Report(arguments.out)
        self.began, self.part_ends = time.monotonic(), 0.0
        self.peaks, self.torch = None, None
        before = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
        found = [arguments.rehearse] if arguments.rehearse else []
        self.env = os.environ | {"LD_LIBRARY_PATH": ":".join(found + before + library_folders(driver_major()))}
        if arguments.rehearse:
            # Its images are for one version of the emulator.
            self.env["PCAE_CACHE"] = f"{arguments.rehearse}/images"

    # ------------------------------------------------------------ commands

    def left(self):
        return self.part_ends - time.monotonic()

    def command(self, command, env=None, accepts=(0,)):
        """Standard output and error of a command, which has to end well before the part's time is over."""
        words = " ".join(map(str, command))
        began = time.monotonic()
        process = children(command, env=env or self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=max(1.0, self.left()))
            failed = None if process.returncode in accepts else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            end(process)
            output, _ = process.communicate()
            failed = "no time left"
        except BaseException:  # this script is ended: so is what it started
            end(process)
            raise
        took = time.monotonic() - began
        self.report.note(f"$ {words}\n{output.rstrip()}\n[{failed or 'passed'}, {took:.1f} s]\n")
        if failed:
            lines = [line for line in output.splitlines() if line.strip()]
            raise Failure(f"{words}: {failed}" + (f": {lines[-1].strip()}" if lines else ""))
        return output

    def each(self, results, name, do):
        """Does one thing of a part; what fails is noted and the rest goes on."""
        began = time.monotonic()
        if self.left() < 1:
            result = {"status": "no time"}
        else:
            try:
                result = {"status": "passed"} | (do() or {})
            except Failure as failure:
                result = {"status": "failed", "reason": str(failure)}
        result["seconds"] = round(time.monotonic() - began, 2)
        results[name] = result
        self.report.say(f"  {name}: {result['status']} {result.get('says') or result.get('reason') or ''}"
                        f" ({result['seconds']} s)")
        self.report.save()

    def ours(self, *words):
        return [HERE / "pcae" if self.args.pcae is None else self.args.pcae, *words]

    # ------------------------------------------------------------ parts

    def run(self):
        args, report = self.args, self.report
        commit = HERE / "commit"
        report.data |= {
            "commit": commit.read_text().strip() if commit.is_file() else None,
            "rehearsal": bool(args.rehearse),
            "arguments": {name: str(value) if isinstance(value, pathlib.Path) else value
                          for name, value in vars(args).items()},
            "system": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        report.say(f"commit {report.data['commit']}, {report.data['at']}"
                   + (", a REHEARSAL on the emulator: no figure means anything" if args.rehearse else ""))
        for number, part in enumerate(args.parts):
            began = time.monotonic()
            left = self.began + 60 * args.minutes - began
            weights = [PARTS[name] for name in args.parts[number:]]
            self.part_ends = began + left * weights[0] / sum(weights)
            report.say(f"== {part}, at most {max(0.0, self.left()):.0f} s")
            entry = {"status": "running", "results": {}}
            report.data["parts"][part] = entry
            try:
                if self.left() < 1:
                    raise Failure("no time left; give --parts and --minutes")
                status = getattr(self, part)(entry["results"])
            except Failure as failure:
                status = "failed"
                entry["reason"] = str(failure)
            except Exception as error:  # a fault of this script must not cost the other parts
                status = "failed"
                entry["reason"] = f"{type(error).__name__}: {error}"
            each = [one.get("status") for one in entry["results"].values()]
            bad = any(one in ("failed", "no time") for one in each)
            entry["status"] = status or ("failed" if bad else "passed")
            entry["seconds"] = round(time.monotonic() - began, 1)
            report.say(f"== {part}: {entry['status']} {entry.get('reason', '')} ({entry['seconds']} s)")
            report.save()
        report.say("\nsummary")
        for part, entry in report.data["parts"].items():
            counts = [one.get("status") for one in entry["results"].values()]
            report.say(f"  {part:<10} {entry['status']:<8} {entry['seconds']:>6} s  {counts.count('passed')} of {len(counts)}"
                       f" passed {entry.get('reason', '')}")
        for target in report.data["targets"]:
            report.say(f"  {'met ' if target['met'] else 'MISS'} {target['what']}: expected {target['expected']},"
                       f" found {target['found']:.3f}")
        report.save()
        return 1 if any(entry["status"] == "failed" for entry in report.data["parts"].values()) else 0

    def target(self, what, expected, found):
        if self.args.rehearse:
            return  # a ratio to the emulator says nothing
        self.report.data["targets"].append({"what": what, "expected": f"at least {expected}", "found": found,
                                            "met": found >= expected})

    def device(self, results):
        def driver():
            tool = shutil.which("nvidia-smi")
            if not tool:
                raise Failure("there is no nvidia-smi")
            asked = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,compute_cap"
            says = self.command([tool, f"--query-gpu={asked}", "--format=csv,noheader"]).strip()
            return {"says": says, "device": says}

        def ours():
            # The fastest command that computes something on the device; the first start compiles the kernels.
            began = time.monotonic()
            self.command(self.ours("parity", fixture_paths()[0], "--backend", "cuda", "--precision", "f32"))
            return {"says": f"the first start, with kernels to compile, took {time.monotonic() - began:.1f} s",
                    "libraries": self.env["LD_LIBRARY_PATH"]}

        def torch():
            found = self.has_torch()
            return {"says": json.dumps(found)} | found

        def peaks():
            found = self.limits()
            return {"says": ", ".join(f"{name} {value:.0f}" for name, value in found.items())} | found

        if not self.args.rehearse:
            self.each(results, "driver", driver)
        self.each(results, "pcae", ours)
        self.each(results, "torch", torch)
        if not self.args.rehearse:
            self.each(results, "limits", peaks)
        tool = self.sanitizer_tool()
        self.report.say(f"  compute-sanitizer: {tool or 'not found'}")

    def parity(self, results):
        for path in fixture_paths():
            for precision in ("f32", "bf16"):
                def replay():
                    output = self.command(self.ours("parity", path, "--backend", "cuda", "--precision", precision))
                    lines = output.strip().splitlines()
                    return {"says": lines[-1] if lines else "", "output": output}
                self.each(results, f"{path.stem} {precision}", replay)

    def tests(self, results):
        folder = self.args.test_programs or HERE / "tests"
        programs = sorted(path for path in folder.glob("*") if path.is_file() and os.access(path, os.X_OK))
        if not programs:
            raise Failure(f"no test programs in {folder}; run bundle again")
        for program in programs:
            if self.args.only_tests and program.name not in self.args.only_tests:
                continue

            def test():
                # One at a time: some compare times or memory of the whole device.
                output = self.command([program, "--skip", "on_the_emulator", "--nocapture", "--test-threads", "1"])
                if "skipped: no CUDA device" in output:
                    raise Failure(f"{program.name} found no CUDA device")
                summary = re.findall(r"test result: ok\. (\d+) passed", output)
                if not summary or int(summary[-1]) == 0:
                    raise Failure(f"{program.name} ran no test")
                return {"says": f"{summary[-1]} tests", "tests": int(summary[-1])}
            self.each(results, program.name, test)

    @staticmethod
    def sanitizer_tool():
        places = ["/usr/local/cuda*/bin/compute-sanitizer", "/opt/nvidia/*/compute-sanitizer"]
        found = [path for place in places for path in sorted(glob.glob(place))]
        return shutil.which("compute-sanitizer") or (found[-1] if found else None)

    def sanitizer(self, results):
        tool = self.sanitizer_tool()
        if not tool:
            self.report.say("  skipped: there is no compute-sanitizer here")
            return "skipped"
        paths = {path.stem: path for path in fixture_paths()}
        runs = {f"{name} {precision}": self.ours("parity", paths[name], "--backend", "cuda", "--precision", precision)
                for name in SMALL_FIXTURES for precision in ("f32", "bf16")}
        # What no fixture goes through: uploads beside the step, and steps as graphs.
        folder = self.args.test_programs or HERE / "tests"
        runs |= {name: [folder / name, "--skip", "on_the_emulator", "--test-threads", "1"]
                 for name in ("pixels", "graphs") if (folder / name).is_file()}
        for check in ("memcheck", "racecheck", "synccheck"):
            for name, command in runs.items():
                def sanitize():
                    output = self.command([tool, "--tool", check, "--error-exitcode", FAILED_MARK, *command])
                    lines = [line for line in output.splitlines() if "SUMMARY" in line]
                    # Hazards that are warnings alone leave the exit code as it is.
                    if not lines or not re.search(r": 0 (errors|hazards)", lines[-1]):
                        raise Failure(f"{check}: expected a summary without errors, found {lines[-1:] or 'none'}")
                    if "instrumented API call" in output:
                        raise Failure(f"{check} saw no use of the device")
                    return {"says": lines[-1].strip("= ")}
                self.each(results, f"{check} {name}", sanitize)
        return None

    # ------------------------------------------------------------ times

    def has_torch(self):
        if self.torch is None:
            code = ("import json, torch; print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
                    "'device': torch.cuda.get_device_name(0) if torch.cuda.is_available() else None}))")
            output = self.command([self.args.python, "-c", code], env=os.environ)
            self.torch = json.loads(output.strip().splitlines()[-1])
        if not (self.args.rehearse or self.torch["device"]):
            raise Failure(f"PyTorch {self.torch['torch']} sees no CUDA device")
        return self.torch

    def limits(self):
        if self.peaks is None:
            output = self.command([self.args.python, HERE / "peer.py", "--limits"], env=os.environ)
            self.peaks = json.loads(output.strip().splitlines()[-1])
        return self.peaks

    def peers(self, cases):
        """PyTorch's variants of each case, none if there is no PyTorch."""
        if not self.args.variants:
            return []
        try:
            self.has_torch()
        except Failure as failure:
            self.report.say(f"  without PyTorch: {failure}")
            return []
        device = "cpu" if self.args.rehearse else "cuda"
        # Where there are several cases a variant of each.
        return [Peer(self, f"torch {variant}{label}", case | {"variant": variant, "device": device})
                for label, case in cases for variant in self.args.variants]

    def has_fp8(self):
        """Whether the device's tensor cores take fp8: what PCAE refuses is no failure of this run."""
        tool = shutil.which("nvidia-smi")
        if self.args.rehearse or not tool:
            return False
        says = self.command([tool, "--query-gpu=compute_cap", "--format=csv,noheader"])
        return float(says.split()[0]) >= 8.9

    def step(self, results):
        args = self.args
        for batch in args.batch_size:
            case = dict(what="step", model=args.model, batch=batch, precision=args.precision)
            pcae = case | dict(method="pcae", mask_ratio=PCAE_MASK, decoder=DECODERS[args.model])
            mae = case | dict(method="mae", mask_ratio=MAE_MASK, decoder=args.mae_decoder)
            contenders = [Ours(self, "pcae", pcae), Ours(self, "mae", mae)] + self.peers([("", pcae)])
            if args.precision == "bf16" and self.has_fp8():
                contenders.append(Ours(self, "pcae fp8 teacher", pcae | dict(teacher="fp8")))
            found = self.race(f"step, {args.model}, batch {batch}, {args.precision}", contenders)
            results |= {f"batch {batch}, {name}": one for name, one in found.items()}
            self.report.save()
            self.compare(results, f"batch {batch}, ", found, [("pcae", "mae", 2.0), ("pcae fp8 teacher", "mae", 2.25)], "pcae", 1.5)
        if not args.rehearse:
            self.shares(results)

    def infer(self, results):
        args = self.args
        for batch in args.infer_batch:
            cases = [(f" drop {ratio}", dict(what="infer", model=args.model, batch=batch, precision=args.precision,
                                             drop_ratio=ratio)) for ratio in DROP_RATIOS]
            contenders = [Ours(self, f"pcae{label}", case) for label, case in cases] + self.peers(cases)
            found = self.race(f"infer, {args.model}, batch {batch}, {args.precision}", contenders)
            results |= {f"batch {batch}, {name}": one for name, one in found.items()}
            self.report.save()
            dense, less = (f"pcae{label}" for label, _ in cases)
            self.compare(results, f"batch {batch}, ", found, [(less, dense, 1.75)], None, None)
            for label, _ in cases:
                these = {name: one for name, one in found.items() if name.endswith(label)}
                self.compare(results, f"batch {batch}, ", these, [], f"pcae{label}", 1.0)

    def breakdown(self, results):
        args = self.args
        for what, batch in [("step", args.batch_size[0]), ("infer", args.infer_batch[-1])]:
            def bench():
                path = self.scratch / f"breakdown-{what}.json"
                self.command(self.ours("bench", "--backend", "cuda", "--what", what, "--model", args.model, "--mask-ratio",
                                       PCAE_MASK, "--batch-size", batch, "--precision", args.precision, "--repeats", args.rounds,
                                       "--breakdown", "--json", path))
                return {"bench": json.loads(path.read_text())}
            self.each(results, f"{what}, batch {batch}", bench)

    def race(self, title, contenders):
        """All rounds: a result for each contender."""
        self.report.say(f"  {title}")
        results, running = {}, []
        try:
            for one in contenders:
                one.start()
            for one in contenders:
                try:
                    one.ready()
                    running.append(one)
                except Failure as failure:
                    results[one.name] = {"status": "failed", "reason": str(failure)}
                    self.report.say(f"    {one.name}: {failure}")
                    one.close()
            rates = {one.name: [] for one in running}
            longest = 0.0
            for turn in range(self.args.rounds):
                began = time.monotonic()
                if turn and self.left() < 1.2 * longest:
                    self.report.say(f"    after {turn} of {self.args.rounds} rounds: no time left")
                    break
                order = running[turn % len(running):] + running[:turn % len(running)] if running else []
                for one in order:
                    try:
                        rates[one.name].append(one.case["batch"] / one.sample(self.args.seconds))
                    except Failure as failure:
                        results[one.name] = {"status": "failed", "reason": str(failure)}
                        self.report.say(f"    {one.name}: {failure}")
                        running.remove(one)
                longest = max(longest, time.monotonic() - began)
        finally:
            for one in contenders:
                one.close()
        for one in running:
            results[one.name] = {"status": "passed", "images_per_s": spread(rates[one.name]),
                                 "samples": rates[one.name], "case": one.case} | one.facts
            rate = results[one.name]["images_per_s"]
            self.report.say(f"    {one.name:<24} {rate['median']:>11.2f} images/s ({rate['least']:.2f}-{rate['greatest']:.2f},"
                            f" {len(rates[one.name])} rounds)")
        return results

    def compare(self, results, prefix, found, pairs, ours, least):
        """Ratios of pairs of contenders, and of `ours` over the fastest of PyTorch's variants."""
        torch = {name: one["images_per_s"]["median"] for name, one in found.items()
                 if name.startswith("torch") and one["status"] == "passed"}
        if ours and torch:
            pairs = pairs + [(ours, max(torch, key=torch.get), least)]
        for above, below, expected in pairs:
            if any(found.get(name, {}).get("status") != "passed" for name in (above, below)):
                continue
            samples = [found[name]["samples"] for name in (above, below)]
            ratio = spread([a / b for a, b in zip(*samples)])
            ratio["median"] = statistics.median(samples[0]) / statistics.median(samples[1])
            name = f"{prefix}{above} over {below}"
            results[name] = {"status": "passed", "ratio": ratio}
            self.report.say(f"    {above} over {below}: {ratio['median']:.2f} ({ratio['least']:.2f}-{ratio['greatest']:.2f})")
            self.target(f"{found[above]['case']['what']}, {name}", expected, ratio["median"])

    def shares(self, results):
        """The share of the peak that PyTorch's matrix product reaches here, of the best batch."""
        ours = [one for name, one in results.items() if name.endswith(", pcae") and one["status"] == "passed"]
        if not ours:
            return
        best = max(ours, key=lambda one: one["images_per_s"]["median"])
        gflops = best["images_per_s"]["median"] * best["gflop_per_image"]
        try:
            peak = self.limits()[f"{self.args.precision}_gflops"]
        except Failure as failure:
            self.report.say(f"  without a peak: {failure}")
            return
        results["share of peak"] = {"status": "passed", "batch": best["case"]["batch"], "gflops": gflops, "of": peak,
                                    "share": gflops / peak}
        self.report.say(f"    pcae, batch {best['case']['batch']}: {gflops:.0f} GFLOP/s, {100 * gflops / peak:.1f} % of {peak:.0f}")
        self.target("step, share of PyTorch's matrix product", 0.45, gflops / peak)

    # ------------------------------------------------------------ training

    def train(self, name, *words):
        """A short run of training; its losses by step."""
        folder = self.scratch / name
        command = self.ours("pretrain", "--backend", "cuda", "--out", folder, "--set", "eval_every=0",
                            "--set", "save_every=1000000", *words)
        try:
            self.command(command)
            lines = (folder / "metrics.jsonl").read_text().splitlines()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        records = [json.loads(line) for line in lines]
        return {record["step"]: record["loss"] for record in records if "loss" in record}

    def curve(self, results):
        steps, model = str(self.args.curve_steps), "vit-micro"
        losses = {}
        for precision in ("f32", "bf16"):
            def train():
                losses[precision] = self.train(f"curve-{precision}", "--model", model, "--steps", steps, "--precision", precision)
                last = max(losses[precision])
                return {"says": f"loss {losses[precision][last]:.4f} after {last} steps", "losses": losses[precision]}
            self.each(results, precision, train)
        if len(losses) < 2:
            return

        def within():
            both = sorted(losses["f32"].keys() & losses["bf16"].keys())
            differences = {step: abs(losses["bf16"][step] / losses["f32"][step] - 1) for step in both}
            worst = max(differences, key=differences.get)
            says = f"at most {100 * differences[worst]:.2f} %, at step {worst}"
            if not differences[worst] <= 0.01:
                raise Failure(f"expected the losses within 1 % of those of f32, found {says}")
            return {"says": says}
        self.each(results, "bf16 beside f32", within)

    def large(self, results):
        pictures = self.scratch / "pictures"
        write_pictures(pictures, 256)
        for model in self.args.large:
            def train():
                losses = self.train(model, "--model", model, "--data", pictures, "--steps", str(self.args.large_steps),
                                    "--batch-size", str(self.args.large_batch), "--mask-ratio", str(PCAE_MASK),
                                    "--workers", str(min(8, os.cpu_count() or 1)), "--precision", self.args.precision)
                last = max(losses, default=0)
                wrong = [step for step, loss in losses.items() if loss is None or not math.isfinite(loss)]
                if last != self.args.large_steps or wrong:
                    raise Failure(f"expected {self.args.large_steps} steps with finite losses, found {last}, not finite: {wrong}")
                return {"says": f"loss {losses[min(losses)]:.4f} -> {losses[last]:.4f}", "losses": losses}
            self.each(results, model, train)


# ---------------------------------------------------------------- contenders

class Ours:
    """`pcae bench` in a fresh process each time."""

    def __init__(self, run, name, case):
        self.run, self.name, self.case, self.took, self.facts = run, name, case, None, {}
        self.json = run.scratch / f"{name.replace(' ', '-')}.json"
        self.command = run.ours("bench", "--backend", "cuda", "--what", case["what"], "--model", case["model"],
                                "--batch-size", case["batch"], "--precision", case["precision"], "--json", self.json)
        if case["what"] == "infer":
            self.command += ["--drop-ratio", case["drop_ratio"]]
        else:
            width, depth, heads = case["decoder"]
            self.command += ["--method", case["method"], "--mask-ratio", case["mask_ratio"]]
            if "teacher" in case:
                self.command += ["--teacher-precision", case["teacher"]]
            for setting in (f"decoder_embed_dim={width}", f"decoder_depth={depth}", f"decoder_num_heads={heads}"):
                self.command += ["--set", setting]

    def start(self):
        pass

    def ready(self):
        self.sample(0)  # tells how many calls fit in a sample; not counted

    def sample(self, seconds):
        repeats = min(1000, max(1, int(seconds / self.took))) if self.took else 1
        self.run.command(self.command + ["--repeats", repeats])
        result = json.loads(self.json.read_text())["results"][0]
        self.took = self.case["batch"] / result["images_per_s"]
        self.facts = {"gflop_per_image": result["gflops"] / result["images_per_s"],
                      "planned_bytes": result.get("planned_bytes"), "share_of_peak": result.get("share_of_peak")}
        return self.took

    def close(self):
        pass


class Peer:
    """A variant of PyTorch's, in a process of its own."""

    def __init__(self, run, name, case):
        self.run, self.name, self.case, self.facts, self.process = run, name, case, {}, None
        self.errors = run.scratch / f"{name.replace(' ', '-')}.err"

    def start(self):
        command = [self.run.args.python, HERE / "peer.py", "--worker", json.dumps(self.case)]
        with self.errors.open("w") as errors:
            self.process = children(command, env=os.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line.strip())
        self.lines.put(None)

    def answer(self):
        try:
            line = self.lines.get(timeout=max(1.0, self.run.left()))
        except queue.Empty:
            raise Failure("no time left") from None
        if line is None:
            said = [line for line in self.errors.read_text().splitlines() if line.strip()]
            self.run.report.note("\n".join(said))
            raise Failure(f"ended: {said[-1] if said else 'without a word'}")
        return line

    def ready(self):
        while self.answer() != "ready":
            pass

    def sample(self, seconds):
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        found = json.loads(self.answer())
        self.facts = {"memory_bytes": found["memory"]}
        return found["seconds"]

    def close(self):
        if self.process:
            end(self.process)
            for pipe in (self.process.stdin, self.process.stdout):
                try:
                    pipe.close()
                except (BrokenPipeError, ValueError):
                    pass


def spread(values):
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def write_pictures(folder, count):
    """Pictures of 256 x 256 pixels in coloured squares, each different."""
    folder.mkdir()
    squares, edge = 16, 16

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    size = squares * edge
    header = size.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    for number in range(count):
        rows = b""
        for _ in range(squares):
            colours = os.urandom(3 * squares)
            row = b"".join(colours[3 * i:3 * i + 3] * edge for i in range(squares))
            rows += (b"\0" + row) * edge
        png = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b""))
        (folder / f"{number:04}.png").write_bytes(png)


# ---------------------------------------------------------------- the command line

def parse():
    separated = lambda kind: lambda text: [kind(part) for part in text.split(",") if part]

    def some(allowed):
        def check(text):
            found = [part for part in text.split(",") if part]
            for part in found:
                if part not in allowed:
                    raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}, found {part!r}")
            return found
        return check
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Lists are separated by commas.")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."), help="folder of report.json and report.log [default: .]")
    p.add_argument("--parts", type=some(PARTS), default=DEFAULT_PARTS, help=f"some of {','.join(PARTS)} [default: {','.join(DEFAULT_PARTS)}]")
    p.add_argument("--minutes", type=float, default=9.5, help="for all parts together, shared by their weights [default: 9.5]")
    p.add_argument("--model", choices=list(DECODERS), help="of step and infer [default: vit-b16]")
    p.add_argument("--precision", choices=["f32", "bf16"], default="bf16", help="of step, infer and large [default: bf16]")
    p.add_argument("--batch-size", type=separated(int), help="of step [default: 256]")
    p.add_argument("--infer-batch", type=separated(int), help="of infer [default: 1,256]")
    p.add_argument("--variants", type=some(VARIANTS), help="of PyTorch: eager, compile, graphs, autotune [default: eager,compile,graphs]")
    p.add_argument("--rounds", type=int, help="[default: 5]")
    p.add_argument("--seconds", type=float, help="timed in a sample, at least one call [default: 1]")
    p.add_argument("--only-tests", type=separated(str), help="some of the test programs [default: all]")
    p.add_argument("--curve-steps", type=int, help="[default: 500]")
    p.add_argument("--large", type=some(DECODERS), help="[default: vit-l16,vit-h14]")
    p.add_argument("--large-steps", type=int, help="[default: 200]")
    p.add_argument("--large-batch", type=int, help="[default: 64]")
    p.add_argument("--python", default=sys.executable, help="the one that has torch [default: this one]")
    p.add_argument("--pcae", type=pathlib.Path, help="our program [default: the one beside this script]")
    p.add_argument("--test-programs", type=pathlib.Path, metavar="DIR", help="[default: tests, beside this script]")
    p.add_argument("--rehearse", metavar="DIR", help="everything tiny, on the emulator in this folder, PyTorch on the CPU")
    args = p.parse_args()
    usual = dict(model="vit-b16", batch_size=[256], infer_batch=[1, 256], variants=["eager", "compile", "graphs"], rounds=5,
                 seconds=1.0, curve_steps=500, large=["vit-l16", "vit-h14"], large_steps=200, large_batch=64)
    tiny = dict(model="vit-micro", batch_size=[2], infer_batch=[1], variants=["eager"], rounds=2, seconds=0.0, curve_steps=2,
                large=["vit-micro"], large_steps=2, large_batch=2)
    for name, value in (tiny if args.rehearse else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.rehearse:
        args.rehearse = os.path.abspath(args.rehearse)
    # MAE's own, or for small pictures the method's.
    args.mae_decoder = DECODERS["vit-micro"] if args.model == "vit-micro" else MAE_DECODER
    return args


def main():
    args = parse()
    # By an exception, so that what was started is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="pcae-gpu-") as scratch:
        return Run(args, pathlib.Path(scratch)).run()


if __name__ == "__main__":
    sys.exit(main())
