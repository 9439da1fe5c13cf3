"""Runs an ONNX file on raw little-endian f32 pictures in ONNX Runtime: `MODEL IMAGES SHAPE OUT...`, an OUT for each output."""
import sys

import numpy
import onnxruntime

model, images, shape, *outs = sys.argv[1:]
pictures = numpy.fromfile(images, "<f4").reshape([int(size) for size in shape.split(",")])
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
for out, values in zip(outs, session.run(None, {"images": pictures}), strict=True):
    values.tofile(out)
print(onnxruntime.__version__)
