"""What every part uses: commands with a time limit, results on disk, and where libraries and PyTorch are."""
import ctypes
import glob
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time

from report import Report

HERE = pathlib.Path(__file__).resolve().parent
# Of what our program says on a device that is too old for a teacher in fp8.
NO_FP8 = "compute capability 8.9"
NO_TIME = "no time left"


class Failure(Exception):
    """A part failed, or one of its commands."""


class NoTime(Failure):
    """What was not done for lack of time, of which nothing is known."""


def attempt(do):
    """The result of one thing of a part."""
    try:
        return {"status": "passed"} | (do() or {})
    except NoTime as failure:
        return {"status": "no time", "reason": str(failure)}
    except Failure as failure:
        return {"status": "failed", "reason": str(failure)}


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


def whole(folder=HERE):
    """What is wrong with a bundle: files that are missing, or not as large as they were. Nothing of what is no bundle."""
    contents, faults = folder / "contents", []
    if contents.is_file():
        for line in contents.read_text().splitlines():
            size, name = line.split(" ", 1)
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != int(size):
                faults.append(f"{name} is missing" if found is None else f"{name}: expected {size} bytes, found {found}")
    return faults


def driver_major():
    """The newest CUDA that the driver knows, as 13; 13 where there is none to ask."""
    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        pass
    return number.value // 1000 or 13


def package_folders(python):
    """Where the Python that has torch looks for packages, those of its user among them, and then where this one does."""
    try:
        # Whatever its own start may print comes before.
        said = subprocess.run([python, "-c", "import json, sys; print(json.dumps(sys.path))"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60, check=True).stdout
        theirs = json.loads(said.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        theirs = []  # what needs it says so
    return list(dict.fromkeys(path for path in [*theirs, *sys.path] if os.path.isdir(path)))


def library_folders(driver, packages):
    """Folders of NVRTC and cuBLASLt, of a toolkit or of PyTorch's wheels, and of the driver where ldconfig lacks it.

    Of CUDA 13 where the driver is for that, else of CUDA 12: cuBLASLt needs a driver of its own version.
    """
    patterns = [f"{glob.escape(folder)}/nvidia/*/lib" for folder in packages]
    patterns += ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib", "/usr/local/nvidia/lib64"]
    folders = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    having = lambda name: [folder for folder in folders if os.path.exists(f"{folder}/{name}")]
    found = []
    for major in (13, 12):
        nvrtc, cublas = having(f"libnvrtc.so.{major}"), having(f"libcublasLt.so.{major}")
        if major <= driver and nvrtc and cublas:
            found = nvrtc + cublas
            break
    return list(dict.fromkeys(found + having("libcuda.so.1")))


class Session:
    """One run of the script."""

    def __init__(self, arguments, scratch):
        self.args, self.scratch = arguments, scratch
        commit = HERE / "commit"
        self.commit = commit.read_text().strip() if commit.is_file() else None
        self.report = Report(arguments.out, {"commit": self.commit, "rehearsal": bool(arguments.rehearse)}, arguments.add)
        self.began, self.part_ends = time.monotonic(), 0.0
        self.peaks, self.torch = None, None
        before = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
        found = [arguments.rehearse] if arguments.rehearse else []
        self.packages = package_folders(arguments.python)
        self.env = os.environ | {"LD_LIBRARY_PATH": ":".join(found + before + library_folders(driver_major(), self.packages))}
        if arguments.rehearse:
            # Its images are for one version of the emulator.
            self.env["PCAE_CACHE"] = f"{arguments.rehearse}/images"
        else:
            # Kernels are compiled once, whatever this user's home is. What is there is found by its source.
            self.env.setdefault("PCAE_CACHE", str(arguments.out.resolve() / "kernels"))

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
            failed = NO_TIME
        except BaseException:  # this script is ended: so is what it started
            end(process)
            raise
        took = time.monotonic() - began
        self.report.note(f"$ {words}\n{output.rstrip()}\n[{failed or 'passed'}, {took:.1f} s]\n")
        if failed:
            lines = [line for line in output.splitlines() if line.strip()]
            kind = NoTime if failed == NO_TIME else Failure
            raise kind(f"{words}: {failed}" + (f": {lines[-1].strip()}" if lines else ""))
        return output

    def interrupted(self, command, when):
        """Interrupts a command as soon as `when` says so; its exit code, 0 if it was quicker."""
        words, log = " ".join(map(str, command)), self.scratch / "interrupted.log"
        with log.open("w") as output:
            process = children(command, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not when():
                if self.left() < 1:
                    raise NoTime(f"{words}: {NO_TIME}")
                time.sleep(0.002)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=max(1.0, self.left()))
        except subprocess.TimeoutExpired:
            raise NoTime(f"{words}: {NO_TIME}") from None
        finally:
            end(process)
            self.report.note(f"$ {words}\n{log.read_text().rstrip()}\n[interrupted, exit code {process.returncode}]\n")
        return process.returncode

    def each(self, results, name, do):
        """Does one thing of a part; what fails is noted and the rest goes on."""
        began = time.monotonic()
        result = {"status": "no time"} if self.left() < 1 else attempt(do)
        result["seconds"] = round(time.monotonic() - began, 2)
        results[name] = result
        self.report.say(f"  {name}: {result['status']} {result.get('says') or result.get('reason') or ''}"
                        f" ({result['seconds']} s)")
        self.report.save()
        return result

    def ours(self, *words):
        return [HERE / "pcae" if self.args.pcae is None else self.args.pcae, *words]

    # ------------------------------------------------------------ PyTorch

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
            tiny = ["--tiny"] if self.args.rehearse else []
            output = self.command([self.args.python, HERE / "peer.py", "--limits", *tiny], env=os.environ)
            self.peaks = json.loads(output.strip().splitlines()[-1])
        return self.peaks

    # ------------------------------------------------------------ parts

    def run(self, parts):
        """Runs the asked-for parts, `parts` being a weight and a function of each. The exit code."""
        args, report = self.args, self.report
        report.data |= {
            "arguments": {name: str(value) if isinstance(value, pathlib.Path) else value
                          for name, value in vars(args).items()},
            "system": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        report.say(f"commit {self.commit}, {report.data['at']}"
                   + (", a REHEARSAL on the emulator: no figure means anything" if args.rehearse else ""))
        for number, part in enumerate(args.parts):
            began = time.monotonic()
            left = self.began + 60 * args.minutes - began
            weights = [parts[name][0] for name in args.parts[number:]]
            self.part_ends = began + left * weights[0] / sum(weights)
            report.say(f"== {part}, at most {max(0.0, self.left()):.0f} s")
            entry = {"status": "running", "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "results": {}}
            report.data["parts"][part] = entry
            try:
                if self.left() < 1:
                    raise Failure("no time left; give --parts and --minutes")
                status = parts[part][1](self, entry["results"])
            except Failure as failure:
                status = "failed"
                entry["reason"] = str(failure)
            except Exception as error:  # a fault of this script must not cost the other parts
                status = "failed"
                entry["reason"] = f"{type(error).__name__}: {error}"
            each = [one.get("status") for one in entry["results"].values()]
            bad = any(one in ("failed", "no time") for one in each)
            entry["status"] = "failed" if bad else status or "passed"
            entry["seconds"] = round(time.monotonic() - began, 1)
            report.say(f"== {part}: {entry['status']} {entry.get('reason', '')} ({entry['seconds']} s)")
            report.save()
        report.end()
        return 1 if any(report.data["parts"][part]["status"] == "failed" for part in args.parts) else 0
