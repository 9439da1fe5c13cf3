#!/usr/bin/env python3
"""Everything that can only be found out on a GPU, in one command: parity, tests, sanitizer, and times beside PyTorch.

    pcae-backend-cuda/gpu/bundle                     # where Rust is; then take target/gpu along
    python3 gpu/run.py --out results                 # where the GPU is: Linux, Python 3.11 or newer, no network, half an hour
    python3 gpu/run.py --out results --parts step --minutes 9.5 --add     # in pieces: what is there stays
    python3 gpu/run.py --rehearse $(sh pcae-backend-cuda/tests/emulator/build)     # without a GPU: do the commands work?

Writes `report.json` and `report.log`, anew after each command, so that a run that is ended leaves what it has. A part that fails does
not stop the others; one without time left says so. The last lines are the targets: expected, found, met? The exit code is 0 if no part
failed, whether targets are met or not.

| part | what |
|---|---|
| device | what the driver, the sanitizer and PyTorch are; what PyTorch's matrix product and copy reach |
| parity | every golden fixture in f32 and bf16, those of PCAE in bf16 with a teacher in fp8 too; a run that goes on with the other backend |
| tests | the backend's test programs |
| sanitizer | compute-sanitizer over the small fixtures, uploads, graphs, a teacher in fp8, the queue, what kernels are made of; memcheck over products |
| breakdown | where the time goes of steps (PCAE, with an fp8 teacher too, MAE, fine-tuning) and of a forward, dense or with drop ratio 0.4, by `pcae bench --breakdown`; each kernel's bandwidth; how busy the GPU is, by nsys |
| infer | a forward dense and with drop ratio 0.4, tuned or not, and PyTorch's variants, taking turns |
| step | PCAE and MAE steps, tuned or not, PCAE with an fp8 teacher, and PyTorch's variants (`peer.py`): at every batch size, then at the best |
| curve | mean loss of 500 steps in bf16 beside f32 |
| large | 200 steps of ViT-L/16 and ViT-H/14 on generated pictures |

How it times. In every round each contender gives one sample, one after the other, the order turned by one each round. Ours is
`pcae bench` in a fresh process; PyTorch's variants each keep a process, which waits for its turn. A sample is an untimed call and
then the median of as many as fit into `--seconds`; of ours each is the mean of several, of a step of those that fit into a second. Figures are medians over the rounds, with the least and the greatest; a ratio is
that of the medians, with the least and the greatest of any one round. A contender that has no memory for a batch size is left out there,
and so are teachers in fp8 where the device's compute capability is below 8.9. Between batch sizes no process of PyTorch's stays alive.
A kernel's bandwidth is judged where a copy of what a launch moves takes 10 us or more. Where nsys is in PATH or where CUDA puts it, it traces
a row of five steps or more: in the last 80 % of it, the part of the time in which something runs is how busy the GPU is. Copies over the bus
do not count. Without nsys there is an upper bound, which can only miss the target.
A graph that was refused, or a product of a ViT-B/16 that our plain kernel did, fails the part. What no time was left for fails its part too,
but is no target missed. Libraries of CUDA and compute-sanitizer may be of a toolkit, or packages of the Python that has torch (`--python`).
"""
import argparse
import os
import pathlib
import signal
import sys
import tempfile

import checks
import times
import training
from contenders import VARIANTS
from session import HERE, Session, whole
from times import DECODERS

# Weights of the parts, by which the time that is left is shared between those that are still to come, and what they do.
PARTS = {
    "device": (2, checks.device),
    "parity": (2, checks.parity),
    "tests": (3, checks.tests),
    "sanitizer": (6, checks.sanitizer),
    "breakdown": (6, times.breakdown),
    "infer": (9, times.infer),
    "step": (18, times.step),
    "curve": (2, training.curve),
    "large": (6, training.large),
}


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
    p.add_argument("--add", action="store_true", help="keep what an earlier run of the same program has found there")
    p.add_argument("--parts", type=some(PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)} [default: all]")
    p.add_argument("--minutes", type=float, help="for all parts together, shared by their weights [default: 30]")
    p.add_argument("--model", choices=list(DECODERS), help="of step, infer and breakdown [default: vit-b16]")
    p.add_argument("--precision", choices=["f32", "bf16"], default="bf16", help="of step, infer, breakdown and large [default: bf16]")
    p.add_argument("--batch-size", type=separated(int), help="of step, those near 256 first [default: 64,128,256,512]")
    p.add_argument("--breakdown-batch", type=int, help="of the step that is taken apart [default: 256]")
    p.add_argument("--infer-batch", type=separated(int), help="of infer [default: 1,256]")
    p.add_argument("--variants", type=some(VARIANTS), help="of PyTorch: eager, compile, graphs, autotune, or nothing [default: eager,compile,graphs]")
    p.add_argument("--rounds", type=int, help="[default: 5]")
    p.add_argument("--seconds", type=float, help="timed in a sample, at least one call [default: 1]")
    p.add_argument("--only-tests", type=separated(str), help="some of the test programs [default: all]")
    p.add_argument("--curve-steps", type=int, help="[default: 500]")
    p.add_argument("--curve-batch", type=int, help="[default: 64]")
    p.add_argument("--large", type=some(DECODERS), help="[default: vit-l16,vit-h14]")
    p.add_argument("--large-steps", type=int, help="[default: 200]")
    p.add_argument("--large-batch", type=int, help="[default: 64]")
    p.add_argument("--pictures", type=int, help="that are generated for large [default: 256]")
    p.add_argument("--python", default=sys.executable, help="the one that has torch [default: this one]")
    p.add_argument("--pcae", type=pathlib.Path, help="our program [default: the one beside this script]")
    p.add_argument("--test-programs", type=pathlib.Path, metavar="DIR", help="[default: tests, beside this script]")
    p.add_argument("--rehearse", metavar="DIR", help="everything tiny, on the emulator in this folder, PyTorch on the CPU if it is there")
    args = p.parse_args()
    usual = dict(minutes=30, model="vit-b16", batch_size=[64, 128, 256, 512], breakdown_batch=256, infer_batch=[1, 256],
                 variants=["eager", "compile", "graphs"], rounds=5, seconds=1.0, curve_steps=500, curve_batch=64,
                 large=["vit-l16", "vit-h14"], large_steps=200, large_batch=64, pictures=256)
    tiny = dict(minutes=240, model="vit-micro", batch_size=[2, 3], breakdown_batch=2, infer_batch=[1, 2], variants=["eager"], rounds=2,
                seconds=0.0, curve_steps=2, curve_batch=2, large=["vit-micro"], large_steps=2, large_batch=2, pictures=8)
    for name, value in (tiny if args.rehearse else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.rehearse:
        args.rehearse = os.path.abspath(args.rehearse)
    return args


def main():
    args = parse()
    faults = whole()
    if faults:
        raise SystemExit(f"error: {HERE}: {'; '.join(faults)}; run bundle again, and take all of it along")
    # By an exception, so that what was started is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="pcae-gpu-") as scratch:
        return Session(args, pathlib.Path(scratch)).run(PARTS)


if __name__ == "__main__":
    sys.exit(main())
