#!/usr/bin/env python3
"""Cuts an IDX data set down to its first N training pictures; the held-out ones stay.

    python3 docs/results/subset.py /usr/share/datasets/fashion-mnist 6000 fashion-6000
"""
import gzip
import pathlib
import struct
import sys

source, count, target = pathlib.Path(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
target.mkdir(parents=True)
for path in sorted(source.glob("*-ubyte.gz")):
    data = gzip.open(path).read()
    if path.name.startswith("train"):
        dims = data[3]
        sizes = struct.unpack(f">{dims}I", data[4 : 4 + 4 * dims])
        item = 1
        for size in sizes[1:]:
            item *= size
        header = data[:4] + struct.pack(f">{dims}I", count, *sizes[1:])
        data = header + data[4 + 4 * dims :][: count * item]
    gzip.open(target / path.name, "wb").write(data)
