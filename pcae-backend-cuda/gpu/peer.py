#!/usr/bin/env python3
"""The method in plain PyTorch, as fast as PyTorch's usual means make it: what the CUDA backend is timed against.

    python3 peer.py --check tests/fixtures/pcae_small.safetensors     # is this the method? on the CPU in f64, then in f32
    python3 peer.py --check tests/fixtures/pcae_small.safetensors --variant compile

Needs torch, and safetensors for --check. `run.py` starts it with --worker.

A step is teacher with progressive selection, student, decoder, cosine loss, backward, fused AdamW and moving average by
`torch._foreach_lerp_`, with bf16 autocast, `scaled_dot_product_attention`, the loss read after each step. The next pictures (f32,
pinned) go to the device on a stream of their own while the step runs. Only the patches that are needed are embedded, and only the
patches that are predicted leave the decoder. Inference is a classifier of 1000 classes, with or without tokens dropped, its weights
in bf16, its pictures on the device; it ends when the device has finished.
"""
import argparse
import json
import math
import pathlib
import statistics
import sys
import time

import torch

from models import Classifier, Encoder, Pretrainer, patchify, random_masking

# patch_size, embed_dim, depth, num_heads, image edge, channels: `VitConfig::preset`.
MODELS = {
    "vit-micro": (4, 96, 4, 3, 28, 1),
    "vit-b16": (16, 768, 12, 12, 224, 3),
    "vit-l16": (16, 1024, 24, 16, 224, 3),
    "vit-h14": (14, 1280, 32, 16, 224, 3),
}
VARIANTS = {"eager": None, "compile": "default", "graphs": "reduce-overhead", "autotune": "max-autotune"}
KEEP_RATIO, MOMENTUM = 0.5, 0.9999


def config(model):
    patch, dim, depth, heads, edge, chans = MODELS[model]
    return dict(patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, img_size=[edge, edge], in_chans=chans,
                mlp_ratio=4.0)


def step_config(case):
    """The step of `pcae bench`: tokens dropped at three evenly spaced blocks, from the first."""
    cfg = config(case["model"])
    width, depth, heads = case["decoder"]
    return cfg | dict(task=case["method"], mask_ratio=case["mask_ratio"], keep_ratio=KEEP_RATIO, norm_pix=True,
                      drop_layers=[i * cfg["depth"] // 3 for i in range(3)], decoder_embed_dim=width, decoder_depth=depth,
                      decoder_num_heads=heads, ema_momentum=MOMENTUM, lr=1e-4, weight_decay=0.05)


def compiled(function, variant):
    mode = VARIANTS[variant]
    return function if mode is None else torch.compile(function, mode=mode, dynamic=False)


class Step:
    """Everything between two batches. The teacher starts as the student, unless it is loaded with something else."""

    def __init__(self, cfg, device, variant, autocast):
        self.cfg, self.device, self.autocast = cfg, device, autocast
        self.model, self.teacher = Pretrainer(cfg).to(device), None
        if cfg["task"] == "pcae":
            self.teacher = Encoder(cfg).to(device).requires_grad_(False)
            self.teacher.load_state_dict({name: value for name, value in self.model.state_dict().items()
                                          if not name.startswith(("decoder_", "mask_"))})
        self.loss = compiled(self.model.loss, variant)
        self.prepare()

    def prepare(self):
        """The optimizer, of the parameters as they are now."""
        trained = [value for value in self.model.parameters() if value.requires_grad]
        decays = lambda value: value.squeeze().dim() > 1
        cfg = self.cfg
        self.optimizer = torch.optim.AdamW(
            [{"params": [value for value in trained if decays(value)], "weight_decay": cfg["weight_decay"]},
             {"params": [value for value in trained if not decays(value)], "weight_decay": 0.0}],
            lr=cfg["lr"], betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.averaged, self.followed = [], []
        for name, value in self.teacher.named_parameters() if self.teacher else ():
            if name != "pos_embed":
                self.averaged.append(value)
                self.followed.append(self.model.get_parameter(name).detach())

    def __call__(self, images, keep, remove):
        # What the last step gave is used up: CUDA graphs may write over it.
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.teacher, images, keep, remove)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged:
            torch._foreach_lerp_(self.averaged, self.followed, 1 - self.cfg["ema_momentum"])
        return loss.detach()


# ---------------------------------------------------------------- is it the method?

def relative(found, want):
    want = want.to(found.dtype)
    return ((found - want).norm() / want.norm()).item()


def check(path, variant):
    """Replays a golden fixture with the modules and the step that are timed. Fixtures are rounded to f32."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        cfg = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    task = cfg["task"]
    if task not in ("pcae", "mae", "classify"):
        raise SystemExit(f"error: {path}: expected a fixture of pcae, mae or classify, found {task}")
    part = lambda prefix, dtype: {name.removeprefix(prefix): value.to(dtype) for name, value in tensors.items()
                                  if name.startswith(prefix)}
    for dtype, limit in [(torch.float64, 1e-6), (torch.float32, 1e-4)]:
        errors, images = {}, tensors["input.images"].to(dtype)
        if task == "classify":
            model = Classifier(cfg, cfg["num_classes"]).to(dtype).eval()
            model.load_state_dict(part("param.", dtype))
            with torch.no_grad():
                errors["logits"] = relative(compiled(model, variant)(images), tensors["expect.logits"])
        else:
            step = Step(cfg, "cpu", variant, autocast=False)
            for module, prefix in [(step.model, "param."), (step.teacher, "teacher.")]:
                if module:
                    module.to(dtype).load_state_dict(part(prefix, dtype))
            step.prepare()
            keep, remove = random_masking(tensors["input.noise"], cfg["mask_ratio"])
            ids = [("ids_keep", keep), ("ids_remove", remove)]
            if task == "pcae":
                _, stages = step.teacher.teacher(patchify(images, cfg["patch_size"]), remove)
                ids += [(f"stage{stage}.ids", found) for stage, found in enumerate(stages)]
            for name, found in ids:
                if not torch.equal(found, tensors[f"expect.{name}"]):
                    raise SystemExit(f"error: {path}: {name} are not those of the fixture in {dtype}")
            errors["loss"] = relative(step(images, keep, remove), tensors["expect.loss"])
            for prefix, module in [("step.", step.model), ("ema.", step.teacher)]:
                for name, want in part(prefix, dtype).items():
                    found = module.get_parameter(name).detach()
                    if dtype == torch.float32 and name.endswith("attn.qkv.bias"):
                        # A key's bias has no gradient but rounding, of which AdamW's first step makes as much as of any other.
                        found, want = (torch.cat(value.chunk(3)[::2]) for value in (found, want))
                    errors[prefix + name] = relative(found, want)
            for number, noise in enumerate(tensors.get("input.noise_steps", [])):
                # The first of the steps in a row is the one above, on the same noise.
                if number > 0:
                    found = step(images, *random_masking(noise, cfg["mask_ratio"]))
                    errors[f"losses[{number}]"] = relative(found, tensors["expect.losses"][number])
        worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
        print(f"{pathlib.Path(path).name}, {variant}, {dtype}: {len(errors)} tensors"
              f"{'' if task == 'classify' else ', the same ids'}, worst {worst} {errors[worst]:.1e}")
        if not errors[worst] < limit:
            raise SystemExit(f"error: {path}: expected {worst} within {limit:.0e}; this is not the method of the fixture")


# ---------------------------------------------------------------- a contender's process

def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def build(case):
    """A function that does the case once, and returns when it is done."""
    device, bf16 = case["device"], case["precision"] == "bf16"
    torch.manual_seed(0)
    # f32 means f32, as it does in ours.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if case["what"] == "infer":
        cfg = config(case["model"])
        depth = cfg["depth"]
        cfg |= dict(drop_ratio=case["drop_ratio"], drop_layers=[0, depth * 7 // 12, depth * 10 // 12])
        dtype = torch.bfloat16 if bf16 else torch.float32
        model = Classifier(cfg, 1000).to(device, dtype).eval()
        images = torch.randn(case["batch"], cfg["in_chans"], *cfg["img_size"], device=device, dtype=dtype)
        forward = compiled(model, case["variant"])

        @torch.inference_mode()
        def call():
            torch.compiler.cudagraph_mark_step_begin()
            forward(images)
            wait(device)
        return call

    cfg = step_config(case)
    step = Step(cfg, device, case["variant"], autocast=bf16)
    host = torch.randn(case["batch"], cfg["in_chans"], *cfg["img_size"])
    keep, remove = random_masking(torch.rand(case["batch"], step.model.num_patches), cfg["mask_ratio"])
    keep, remove = keep.to(device), remove.to(device)
    if device != "cuda":
        return lambda: step(host, keep, remove).item()
    host, upload = host.pin_memory(), torch.cuda.Stream()
    buffers, turn = [host.to(device), host.to(device)], 0

    def call():
        nonlocal turn
        now, coming, turn = buffers[turn], buffers[1 - turn], 1 - turn
        torch.cuda.current_stream().wait_stream(upload)
        # The step before has ended: its loss was read. So its pictures can be written over.
        with torch.cuda.stream(upload):
            coming.copy_(host, non_blocking=True)
        loss = step(now, keep, remove).item()
        if not math.isfinite(loss):
            raise SystemExit(f"error: the loss became {loss}")
    return call


def limits(tiny):
    """What a matrix product and a copy reach here, by PyTorch: the peaks that shares are given of. Or small ones on the CPU."""
    found, device = {}, "cpu" if tiny else "cuda"
    for name, dtype in [("bf16", torch.bfloat16), ("f32", torch.float32)]:
        torch.backends.cuda.matmul.allow_tf32 = False
        size = 64 if tiny else 8192 if name == "bf16" else 4096
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found[f"{name}_gflops"] = 2 * size ** 3 / best(lambda: a @ b, device) / 1e9
    source = torch.empty(1 << (20 if tiny else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_gbytes_per_s"] = 2 * source.numel() / best(lambda: target.copy_(source), device) / 1e9
    return found


def best(call, device):
    """Seconds of a call: the best of rounds of ten, after the clock has risen."""
    times = []
    for _ in range(10):
        if device != "cuda":
            began = time.perf_counter()
            for _ in range(10):
                call()
            times.append((time.perf_counter() - began) / 10)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e4)
    return min(times)


def worker(case):
    """Answers each line on standard input, a time in seconds, with the median seconds of as many calls as fit in it."""
    call = build(case)
    for _ in range(4):
        call()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, times = float(line), []
        call()
        while not times or sum(times) + times[-1] < seconds:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        if case["device"] == "cuda":
            memory = torch.cuda.max_memory_allocated()
            # The others need the memory that only a running step uses.
            torch.cuda.empty_cache()
        else:
            memory = None
        print(json.dumps({"seconds": statistics.median(times), "calls": len(times), "memory": memory}), flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", metavar="FIXTURE", nargs="+", help="hold the modules and the step against golden fixtures")
    p.add_argument("--variant", choices=list(VARIANTS), default="eager", help="of --check [default: eager]")
    p.add_argument("--limits", action="store_true", help="what a matrix product and a copy reach, as JSON")
    p.add_argument("--tiny", action="store_true", help="of --limits: small ones on the CPU, which say nothing")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = p.parse_args()
    if arguments.check:
        for path in arguments.check:
            check(path, arguments.variant)
    elif arguments.limits:
        print(json.dumps(limits(arguments.tiny)))
    elif arguments.worker:
        worker(json.loads(arguments.worker))
    else:
        p.error("expected --check, --limits or --worker; run.py is the command that times")


if __name__ == "__main__":
    main()
