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
from torch import nn
from torch.nn import functional as F

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


def full(x):
    """Statistics, selection and loss are in f32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def take(x, ids):
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def standardise(t):
    return (t - t.mean(-1, keepdim=True)) / torch.sqrt(t.var(-1, keepdim=True) + 1e-6)


def least_similar(x, count):
    """The `count` tokens least like the mean token."""
    u = F.normalize(full(x), dim=-1)
    scores = (u * u.mean(1, keepdim=True)).sum(-1)
    return scores.argsort(dim=1, stable=True)[:, :count]


def split(images, patch):
    b, c, h, w = images.shape
    return images.reshape(b, c, h // patch, patch, w // patch, patch)


def patchify(images, patch):
    """Each patch as a convolution's kernel sees it: channel, row, column."""
    return split(images, patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pixel_patches(images, patch):
    """Each patch as MAE predicts it: row, column, channel."""
    return split(images, patch).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def random_masking(noise, mask_ratio):
    order = noise.argsort(dim=1, stable=True)
    keep = int(noise.shape[1] * (1 - mask_ratio))
    return order[:, :keep].contiguous(), order[:, keep:].contiguous()


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, d, ps = cfg, cfg["embed_dim"], cfg["patch_size"]
        self.num_patches = (cfg["img_size"][0] // ps) * (cfg["img_size"][1] // ps)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(cfg["in_chans"], d, ps, ps)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.num_patches, d) * 0.02, requires_grad=False)
        self.blocks = nn.ModuleList(Block(d, cfg["num_heads"], cfg["mlp_ratio"]) for _ in range(cfg["depth"]))
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def embed(self, patches, ids):
        """Only the patches `ids`; all in their order if there are none."""
        proj, pos = self.patch_embed.proj, self.pos_embed[0, 1:]
        if ids is not None:
            patches, pos = take(patches, ids), pos[ids]
        return F.linear(patches, proj.weight.flatten(1), proj.bias) + pos

    def with_class(self, x):
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], 1, -1), x], 1)

    def student(self, patches, ids):
        x = self.with_class(self.embed(patches, ids))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    @torch.no_grad()
    def teacher(self, patches, ids):
        """Its tokens, and the patches that each stage keeps."""
        x, stages = self.embed(patches, ids), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.cfg["drop_layers"]:
                kept = least_similar(x, int(x.shape[1] * self.cfg["keep_ratio"]))
                x, ids = take(x, kept), ids.gather(1, kept)
                stages.append(ids)
        return self.norm(x), stages


class Classifier(Encoder):
    """Mean pooling; `drop_ratio` of the patch tokens go after each of `drop_layers`."""

    def __init__(self, cfg, num_classes):
        super().__init__(cfg)
        del self.norm
        self.fc_norm = nn.LayerNorm(cfg["embed_dim"], eps=1e-6)
        self.head = nn.Linear(cfg["embed_dim"], num_classes)

    def forward(self, images):
        cfg, x = self.cfg, self.with_class(self.embed(patchify(images, self.cfg["patch_size"]), None))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in cfg["drop_layers"] and cfg["drop_ratio"] > 0:
                patches = x[:, 1:]
                count = math.ceil(patches.shape[1] * (1 - cfg["drop_ratio"]) - 1e-9)
                x = torch.cat([x[:, :1], take(patches, least_similar(patches, count))], 1)
        return self.head(self.fc_norm(x[:, 1:].mean(1)))


class Pretrainer(Encoder):
    def __init__(self, cfg):
        super().__init__(cfg)
        d, e, ps = cfg["embed_dim"], cfg["decoder_embed_dim"], cfg["patch_size"]
        self.decoder_embed = nn.Linear(d, e)
        self.mask_token = nn.Parameter(torch.randn(1, 1, e) * 0.02)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + self.num_patches, e) * 0.02, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(e, cfg["decoder_num_heads"], cfg["mlp_ratio"])
                                            for _ in range(cfg["decoder_depth"]))
        self.decoder_norm = nn.LayerNorm(e, eps=1e-6)
        self.decoder_pred = nn.Linear(e, d if cfg["task"] == "pcae" else cfg["in_chans"] * ps * ps)

    def decode(self, latent, keep, ids):
        x = self.decoder_embed(latent)
        b, k = ids.shape
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(b, k, -1)], 1)
        x = x + self.decoder_pos_embed[0][torch.cat([torch.zeros_like(keep[:, :1]), 1 + keep, 1 + ids], 1)]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, -k:]))

    def loss(self, teacher, images, keep, remove):
        patch = self.cfg["patch_size"]
        patches = patchify(images, patch)
        latent = self.student(patches, keep)
        if self.cfg["task"] == "pcae":
            target, stages = teacher.teacher(patches, remove)
            pred = full(self.decode(latent, keep, stages[-1] if stages else remove))
            return 1 - F.cosine_similarity(pred, standardise(full(target)), dim=-1).mean()
        target = take(pixel_patches(images, patch), remove)
        target = standardise(target) if self.cfg["norm_pix"] else target
        return F.mse_loss(full(self.decode(latent, keep, remove)), target)


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


def limits():
    """What a matrix product and a copy reach here, by PyTorch: the peaks that shares are given of."""
    found = {}
    for name, dtype in [("bf16", torch.bfloat16), ("f32", torch.float32)]:
        torch.backends.cuda.matmul.allow_tf32 = False
        size = 8192 if name == "bf16" else 4096
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        found[f"{name}_gflops"] = 2 * size ** 3 / best(lambda: a @ b) / 1e9
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found["copy_gbytes_per_s"] = 2 * source.numel() / best(lambda: target.copy_(source)) / 1e9
    return found


def best(call):
    """Seconds of a call: the best of rounds of ten, after the clock has risen."""
    times = []
    for _ in range(10):
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
    p.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = p.parse_args()
    if arguments.check:
        for path in arguments.check:
            check(path, arguments.variant)
    elif arguments.limits:
        print(json.dumps(limits()))
    elif arguments.worker:
        worker(json.loads(arguments.worker))
    else:
        p.error("expected --check, --limits or --worker; run.py is the command that times")


if __name__ == "__main__":
    main()
