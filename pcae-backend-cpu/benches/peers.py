#!/usr/bin/env python3
"""Times the same vision transformer here, in ONNX Runtime, OpenVINO and PyTorch, and prints ratios.

Optional: no test needs it and CI never runs it.

    # requirements: Linux, Python 3.10 or newer, about 6 GB of disk (PyPI's torch brings CUDA's libraries)
    python3 -m venv peers && peers/bin/pip install torch onnx onnxscript onnxruntime openvino numpy safetensors
    cargo build --release
    peers/bin/python pcae-backend-cpu/benches/peers.py                      # everything, about ten minutes
    peers/bin/python pcae-backend-cpu/benches/peers.py --what infer --model vit-ti16 --batch-size 1 --threads 1
    peers/bin/python pcae-backend-cpu/benches/peers.py --check tests/fixtures   # are the torch models here right?

How it measures. Each contender runs in a process of its own that may use as many CPUs as the case has threads. In every
round each contender gives one sample, one after the other, the order turned by one each round; whoever is not on turn is
stopped by SIGSTOP, so that no idle thread pool spins beside the others. A sample is one untimed call and then the median of
as many timed ones as fit in `--seconds`. Ours comes from `pcae bench` as a user has it, in a fresh process each round; the
others keep their process for all rounds of a case, with two more untimed calls at its start. Figures are medians over the
rounds with the least and the greatest in brackets; a ratio is that of the medians, its brackets the least and the greatest
ratio of any one round.

What is compared. Inference: 1000 classes, class token, mean of the patches, `fc_norm`; the pictures are in memory, the logits
are read back. ONNX Runtime runs PyTorch's own export with all of its optimisations (f32 only: its CPU kernels have no bf16;
the further fusions of `onnxruntime.transformers` made vit-ti16 slower); OpenVINO its conversion of the torch module, with the
latency hint and the inference precision as asked; PyTorch runs eagerly, bf16 as `model.bfloat16()`, which was faster than
autocast. A step: teacher, student, decoder, loss, backward, fused AdamW, moving average, loss read back, in plain `torch.nn`;
bf16 is autocast. `torch.compile` is not measured. Logits are held against those of torch in f32 before anything is timed.
"""
import argparse
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]

# patch_size, embed_dim, depth, num_heads, image edge, channels: `VitConfig::preset`, and the small model of the default run's
# kind at the size that PyTorch was measured at before.
MODELS = {
    "vit-micro": (4, 96, 4, 3, 28, 1),
    "vit-micro-128x6": (4, 128, 6, 4, 28, 1),
    "vit-ti16": (16, 192, 12, 3, 224, 3),
    "vit-s16": (16, 384, 12, 6, 224, 3),
    "vit-b16": (16, 768, 12, 12, 224, 3),
}
INFER, STEP = "infer", "step"
DEFAULT_MODELS = {INFER: ["vit-b16", "vit-ti16"], STEP: ["vit-b16", "vit-micro-128x6"]}
OURS = "pcae"
PEERS = {INFER: ["onnxruntime", "openvino", "torch"], STEP: ["torch"]}
KEEP_RATIO = 0.5


def vit_config(model):
    patch, dim, depth, heads, edge, chans = MODELS[model]
    return dict(patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, img_size=[edge, edge], in_chans=chans,
                mlp_ratio=4.0)


def step_config(model, method, mask_ratio):
    """The step of `pcae bench`: the paper's decoder, or MAE's for the large pictures."""
    cfg = vit_config(model) | dict(task=method, mask_ratio=mask_ratio, keep_ratio=KEEP_RATIO, norm_pix=True)
    depth = cfg["depth"]
    cfg["drop_layers"] = [i * depth // 3 for i in range(3)]
    if method == "mae" and cfg["img_size"][0] == 224:
        return cfg | dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
    return cfg | dict(decoder_embed_dim=cfg["embed_dim"], decoder_depth=2, decoder_num_heads=cfg["num_heads"])


# ---------------------------------------------------------------- the models in torch

def torch_models():
    """The modules, loaded where torch is: ONNX Runtime's and OpenVINO's processes do not load it."""
    import torch

    sys.path.insert(0, str(ROOT / "pcae-backend-cuda" / "gpu"))
    import models

    class Classifier(models.Classifier):
        """All tokens, embedded by the convolution that is usual for it: what exporters know best."""

        def forward(self, images):
            x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
            for block in self.blocks:
                x = block(x)
            return self.head(self.fc_norm(x[:, 1:].mean(1)))

    return models.Encoder, Classifier, models.Pretrainer, models.random_masking


def check(folder):
    """Holds the modules above against the golden fixtures."""
    import torch
    from safetensors import safe_open

    Encoder, Classifier, Pretrainer, random_masking = torch_models()
    for name, expected in [("pcae_small", "loss"), ("mae_small", "loss"), ("classify_dense", "logits")]:
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            cfg = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        part = lambda prefix: {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
        with torch.no_grad():
            if cfg["task"] == "classify":
                model = Classifier(cfg, cfg["num_classes"])
                model.load_state_dict(part("param."))
                found = model(tensors["input.images"])
            else:
                model, teacher = Pretrainer(cfg), Encoder(cfg)
                model.load_state_dict(part("param."))
                if cfg["task"] == "pcae":
                    teacher.load_state_dict(part("teacher."))
                keep, remove = random_masking(tensors["input.noise"], cfg["mask_ratio"])
                found = model.loss(teacher, tensors["input.images"], keep, remove)
        want = tensors[f"expect.{expected}"]
        error = ((found - want).norm() / want.norm()).item()
        print(f"{name}: {expected} differs from the fixture by {error:.1e}")
        if not error < 1e-5:
            raise SystemExit(f"error: {name}: expected less than 1e-5; the torch module is not the model of the fixture")


# ---------------------------------------------------------------- a contender's process

def export(case, folder):
    """Writes what ONNX Runtime and OpenVINO read, a batch of pictures, and what torch computes from it."""
    import numpy as np
    import openvino
    import torch

    _, Classifier, _, _ = torch_models()
    torch.manual_seed(0)
    cfg = vit_config(case["model"])
    model = Classifier(cfg, 1000).eval()
    images = torch.randn(case["batch"], cfg["in_chans"], *cfg["img_size"])
    with torch.inference_mode():
        np.savez(folder / "batch.npz", images=images.numpy(), logits=model(images).numpy())
    with torch.no_grad():
        torch.onnx.export(model, (images,), folder / "model.onnx", input_names=["images"], output_names=["logits"],
                          dynamo=True, external_data=False, verbose=False)
        converted = openvino.convert_model(model, example_input=images, input=list(images.shape))
    openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)


def close(found, folder, precision):
    """Fails if `found` is not what torch computes in f32; bf16 rounds every activation to 8 bits."""
    import numpy as np

    want = np.load(folder / "batch.npz")["logits"]
    error = float(np.linalg.norm(found - want) / np.linalg.norm(want))
    limit = 1e-4 if precision == "f32" else 5e-2
    if not error < limit:
        raise SystemExit(f"error: expected torch's logits within {limit}, found a difference of {error:.1e}")


def build(contender, case, folder):
    """A function that does the case once."""
    threads, precision = case["threads"], case["precision"]
    if contender == "onnxruntime":
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        images = np.load(folder / "batch.npz")["images"]
        call = lambda: session.run(None, {"images": images})[0]
        close(call(), folder, precision)
        return call
    if contender == "openvino":
        import numpy as np
        import openvino

        core = openvino.Core()
        compiled = core.compile_model(core.read_model(folder / "model.xml"), "CPU", {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision, "ENABLE_CPU_PINNING": False})
        request, images = compiled.create_infer_request(), np.load(folder / "batch.npz")["images"]
        call = lambda: request.infer([images], share_inputs=True)[0]
        close(call(), folder, precision)
        return call

    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    Encoder, Classifier, Pretrainer, random_masking = torch_models()
    if case["what"] == INFER:
        import numpy as np

        model = Classifier(vit_config(case["model"]), 1000).eval()
        images = torch.from_numpy(np.load(folder / "batch.npz")["images"])
        dtype = torch.float32 if precision == "f32" else torch.bfloat16
        model = model.to(dtype)

        @torch.inference_mode()
        def call():
            return model(images.to(dtype)).float().numpy()
        close(call(), folder, precision)
        return call

    cfg = step_config(case["model"], case["method"], case["mask_ratio"])
    model, teacher = Pretrainer(cfg), Encoder(cfg).requires_grad_(False)
    encoder = [(teacher.get_parameter(name), value) for name, value in model.named_parameters()
               if value.requires_grad and not name.startswith(("decoder_", "mask_"))]
    for old, new in encoder:
        old.copy_(new.detach())
    trained = [value for value in model.parameters() if value.requires_grad]
    decays = lambda value: value.squeeze().dim() > 1
    optimizer = torch.optim.AdamW(
        [{"params": [value for value in trained if decays(value)], "weight_decay": 0.05},
         {"params": [value for value in trained if not decays(value)], "weight_decay": 0.0}],
        lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
    averaged, followed = [old for old, _ in encoder], [new for _, new in encoder]
    images = torch.randn(case["batch"], cfg["in_chans"], *cfg["img_size"])
    keep, remove = random_masking(torch.rand(case["batch"], model.num_patches), cfg["mask_ratio"])

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model.loss(teacher, images, keep, remove)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cfg["task"] == "pcae":
            with torch.no_grad():
                torch._foreach_lerp_(averaged, followed, 1e-4)
        return loss.item()
    return step


def worker(contender, case, folder):
    """Answers each line on standard input, a time in seconds, with the times of as many calls as fit."""
    call = build(contender, case, folder)
    for _ in range(2):
        call()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, times = float(line), []
        call()
        while not times or sum(times) + times[-1] < seconds:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        print(statistics.median(times), flush=True)


# ---------------------------------------------------------------- the parent

def cpus(threads):
    """As many CPUs as there are threads, of different cores as long as there are such."""
    first, siblings, seen = [], [], set()
    for cpu in sorted(os.sched_getaffinity(0)):
        path = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = path.read_text() if path.exists() else str(cpu)
        (siblings if core in seen else first).append(cpu)
        seen.add(core)
    return set((first + siblings)[:threads])


def environment(threads):
    return os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


class Peer:
    """A contender that keeps its process; stopped while it is not on turn."""

    def __init__(self, contender, case, folder):
        command = [sys.executable, __file__, "--worker", json.dumps([contender, case, str(folder)])]
        allowed = cpus(case["threads"])
        self.contender = contender
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment(case["threads"]),
                                        preexec_fn=lambda: os.sched_setaffinity(0, allowed))
        self.answer("ready")
        self.process.send_signal(signal.SIGSTOP)

    def answer(self, expected=None):
        line = self.process.stdout.readline().strip()
        if not line or (expected and line != expected):
            raise SystemExit(f"error: {self.contender} ended without a figure; its message is above")
        return line

    def sample(self, seconds):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        took = float(self.answer())
        self.process.send_signal(signal.SIGSTOP)
        return took

    def close(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


class Ours:
    """`pcae bench` in a fresh process each time."""

    contender = OURS

    def __init__(self, program, case, folder):
        self.case, self.json, self.took = case, folder / "ours.json", None
        model, settings = case["model"], []
        if model == "vit-micro-128x6":
            model, settings = "vit-micro", ["embed_dim=128", "depth=6", "num_heads=4"]
        self.command = [str(program), "bench", "--what", case["what"], "--model", model,
                        "--batch-size", str(case["batch"]), "--threads", str(case["threads"]),
                        "--precision", case["precision"], "--json", str(self.json)]
        if case["what"] == STEP:
            cfg = step_config(case["model"], case["method"], case["mask_ratio"])
            self.command += ["--method", case["method"], "--mask-ratio", str(case["mask_ratio"])]
            settings += [f"{key}={cfg[key]}" for key in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")]
        for setting in settings:
            self.command += ["--set", setting]

    def sample(self, seconds):
        repeats = max(1, int(seconds / self.took)) if self.took else 1
        allowed = cpus(self.case["threads"])
        done = subprocess.run(self.command + ["--repeats", str(repeats)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, preexec_fn=lambda: os.sched_setaffinity(0, allowed))
        if done.returncode:
            raise SystemExit(f"error: {' '.join(self.command)} failed:\n{done.stderr}")
        report = json.loads(self.json.read_text())
        result = report["results"][0]
        self.took = self.case["batch"] / result["images_per_s"]
        self.gflop_per_image = result["gflops"] / result["images_per_s"]
        peaks = report["machine"]["peak_gflops"].get(self.case["precision"], {})
        self.peak = peaks.get(str(self.case["threads"]))
        return self.took

    def close(self):
        pass


def spread(values):
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def measure(case, arguments, folder):
    """All rounds of one case: a result for each contender, ours first."""
    contenders = [peer for peer in PEERS[case["what"]] if peer in arguments.peers
                  and not (peer == "onnxruntime" and case["precision"] == "bf16")]
    ours = Ours(arguments.pcae, case, folder)
    ours.sample(0)  # tells how many calls fit in a sample; not counted
    running = [ours]
    try:
        for contender in contenders:
            running.append(Peer(contender, case, folder))
        rates, peaks = {one.contender: [] for one in running}, []
        for turn in range(arguments.rounds):
            for one in running[turn % len(running):] + running[:turn % len(running)]:
                rates[one.contender].append(case["batch"] / one.sample(arguments.seconds))
            if ours.peak:
                peaks.append(ours.peak)
    finally:
        for one in running:
            one.close()
    peak = statistics.median(peaks) if peaks else None
    results = []
    for contender, values in rates.items():
        result = case | {"contender": contender, "images_per_s": spread(values), "samples": values, "peak_gflops": peak}
        result["share_of_peak"] = peak and result["images_per_s"]["median"] * ours.gflop_per_image / peak
        ratio = spread([a / b for a, b in zip(rates[OURS], values)])
        ratio["median"] = statistics.median(rates[OURS]) / statistics.median(values)
        result["ours_over_this"] = ratio
        results.append(result)
    return results


def cases(arguments):
    everything = len(os.sched_getaffinity(0))
    for what in arguments.what:
        for model in arguments.model or DEFAULT_MODELS[what]:
            for threads in arguments.threads or ([1, everything] if what == INFER else [everything]):
                small = MODELS[model][4] != 224
                for batch in arguments.batch_size or ([1, 8] if what == INFER else [64 if small else 16]):
                    for method in arguments.method if what == STEP else [None]:
                        for precision in arguments.precision:
                            case = dict(what=what, model=model, batch=batch, threads=threads or everything,
                                        precision=precision)
                            if what == STEP:
                                mask = 0.75 if method == "mae" or small else 0.85
                                case |= dict(method=method, mask_ratio=mask)
                            yield case


def machine():
    from importlib.metadata import PackageNotFoundError, version

    names = [line.split(":", 1)[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] or [platform.processor()]
    versions = {"python": platform.python_version()}
    for package in ("torch", "onnxruntime", "openvino"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], stdout=subprocess.PIPE, text=True)
    return {"cpu": names[0], "cpus": len(os.sched_getaffinity(0)), "system": platform.platform(),
            "load_before": os.getloadavg(), "versions": versions, "commit": commit.stdout.strip() or None}


def line(result):
    rate, ratio, share = result["images_per_s"], result["ours_over_this"], result["share_of_peak"]
    what = result.get("method") or result["what"]
    of_peak = f"{100 * share:5.1f} %" if share else "-"
    ratios = "" if result["contender"] == OURS else \
        f"{ratio['median']:6.2f} ({ratio['least']:.2f}-{ratio['greatest']:.2f})"
    return (f"{what:<6} {result['model']:<16} {result['batch']:>5} {result['threads']:>7} {result['precision']:<5} "
            f"{result['contender']:<12} {rate['median']:>9.2f} ({rate['least']:.2f}-{rate['greatest']:.2f})".ljust(87)
            + f"{of_peak:>8} {ratios}")


def pcae_over_mae(results):
    """How much faster a PCAE step is than an MAE step, for each contender that did both."""
    key = lambda result: tuple(result[name] for name in ("model", "batch", "threads", "precision", "contender"))
    mae = {key(result): result for result in results if result.get("method") == "mae"}
    for result in results:
        other = mae.get(key(result))
        if result.get("method") == "pcae" and other:
            rates = [one["images_per_s"]["median"] for one in (result, other)]
            yield f"pcae step over mae step, {', '.join(map(str, key(result)))}: {rates[0] / rates[1]:.2f}"


def parse():
    separated = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    choices = lambda allowed: lambda text: [allowed[allowed.index(part)] for part in text.split(",")]
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Lists are separated by commas.")
    p.add_argument("--what", type=choices([INFER, STEP]), default=[INFER, STEP], help="infer, step [default: both]")
    p.add_argument("--model", type=choices(list(MODELS)), help=f"{', '.join(MODELS)} [default: infer {DEFAULT_MODELS[INFER]}, "
                   f"step {DEFAULT_MODELS[STEP]}]")
    p.add_argument("--method", type=choices(["pcae", "mae"]), default=["pcae", "mae"], help="of a step [default: both]")
    p.add_argument("--batch-size", type=separated(int), help="[default: infer 1,8; step 16, of the small model 64]")
    p.add_argument("--threads", type=separated(int), help="0 for all [default: infer 1,0; step 0]")
    p.add_argument("--precision", type=choices(["f32", "bf16"]), default=["f32", "bf16"], help="[default: f32,bf16]")
    p.add_argument("--peers", type=choices(PEERS[INFER]), default=PEERS[INFER], help=f"[default: {','.join(PEERS[INFER])}]")
    p.add_argument("--rounds", type=int, default=5, help="[default: 5]")
    p.add_argument("--seconds", type=float, default=0.5, help="timed in a sample, at least one call [default: 0.5]")
    p.add_argument("--pcae", type=pathlib.Path, default=ROOT / "target/release/pcae", help="our program")
    p.add_argument("--json", type=pathlib.Path, default=pathlib.Path("peers.json"), help="[default: peers.json]")
    p.add_argument("--check", type=pathlib.Path, metavar="FIXTURES", help="only hold the torch models against golden fixtures")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    return p.parse_args()


def main():
    arguments = parse()
    if arguments.worker:
        contender, case, folder = json.loads(arguments.worker)
        return (export(case, pathlib.Path(folder)) if contender == "export" else
                worker(contender, case, pathlib.Path(folder)))
    if arguments.check:
        return check(arguments.check)
    if not arguments.pcae.is_file():
        raise SystemExit(f"error: --pcae '{arguments.pcae}': no such file; run `cargo build --release` first")
    report = {"machine": machine(), "results": []}
    facts = report["machine"]
    print(f"{facts['cpu']}, {facts['cpus']} CPUs, load {facts['load_before'][0]:.2f}, commit {facts['commit']}; "
          + ", ".join(f"{name} {text}" for name, text in facts["versions"].items()))
    print(f"{'what':<6} {'model':<16} {'batch':>5} {'threads':>7} {'prec':<5} {'contender':<12} {'images/s':>9} "
          f"(of {arguments.rounds} rounds)".ljust(87) + f"{'of peak':>8} ours over this")
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases(arguments):
            folder = pathlib.Path(temporary) / f"{case['model']}-{case['batch']}"
            if not folder.exists():
                folder.mkdir()
                if case["what"] == INFER:
                    subprocess.run([sys.executable, __file__, "--worker", json.dumps(["export", case, str(folder)])],
                                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            results = measure(case, arguments, folder)
            report["results"] += results
            print("\n".join(map(line, results)), flush=True)
            facts["load_after"] = os.getloadavg()
            arguments.json.write_text(json.dumps(report, indent=1))
    for comparison in pcae_over_mae(report["results"]):
        print(comparison)
    print(f"load at the end {facts['load_after'][0]:.2f}; figures in {arguments.json}")


if __name__ == "__main__":
    main()
