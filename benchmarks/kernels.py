"""The native kernels beside the memory they read from: GB/s and weights per second, per format, shape and thread count.

    python -m benchmarks.kernels [--shapes 16384x2048,2048x16384,262400x2048] [--threads 1,2] [--vectors 1] [--json]

The read bandwidth is that of a plain sum with as many threads, taken in turns with the kernel. The best of several runs
counts; figures do not travel between machines.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from edge.engine.native import blocks
from edge.engine.native.blocks import BLOCK, Matrix

SHAPES = "16384x2048,2048x16384,262400x2048"
NAMES = {4: "int4", 8: "int8", 16: "bf16"}
# Floats of a tile that rows are dequantized into: it stays in the cache.
TILE = 1 << 18
# Floats of the plain sum: far more than any cache holds.
READ = 1 << 26


def best(*runs: Callable[[], Any], seconds: float = 2.0) -> list[float]:
    """Seconds of the fastest of at least five runs of each; they take turns, so that other load meets all of them."""
    fastest, stop, turns = [float("inf")] * len(runs), time.perf_counter() + seconds, 0
    while turns < 6 or time.perf_counter() < stop:
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if turns:
                fastest[i] = min(fastest[i], time.perf_counter() - start)
        turns += 1
    return fastest


def random_matrix(bits: int, rows: int, cols: int) -> Matrix:
    """Any bytes are codes; bf16 ones without the exponents of infinity."""
    codes = torch.randint(0, 64, (rows, cols * bits // 8), dtype=torch.uint8).numpy()
    scales = None if bits == 16 else np.full((rows, cols // BLOCK), 0.01, np.float16)
    view = {4: np.uint8, 8: np.int8, 16: np.uint16}[bits]
    return Matrix.of(codes.view(view), scales, bits, cols)


def stored_bytes(bits: int, rows: int, cols: int) -> int:
    return rows * cols * bits // 8 + (0 if bits == 16 else rows * (cols // BLOCK) * 2)


def tiles(m: Matrix) -> tuple[int, Callable[[], None]]:
    """Weights, and a run that dequantizes that many tile by tile into memory that is used again."""
    rows = max(1, min(m.rows, TILE // m.cols))
    count = max(1, min(m.rows // rows, 64))
    out = torch.empty(rows * m.cols)

    def run() -> None:
        for i in range(count):
            m.dequantize(i * rows, (i + 1) * rows, out.data_ptr())

    return count * rows * m.cols, run


def measure(bits: int, rows: int, cols: int, threads: int, vectors: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    data, m = torch.ones(READ), random_matrix(bits, rows, cols)
    x, y = torch.randn(vectors, cols), torch.empty(vectors, rows)
    size = stored_bytes(bits, rows, cols)
    tiled, dequantize = tiles(m)
    wall, multiply, expand = best(data.sum, lambda: m.multiply(x.data_ptr(), vectors, cols, y.data_ptr()), dequantize)
    return {
        **{"format": NAMES[bits], "shape": f"{rows}x{cols}", "threads": threads, "vectors": vectors},
        **{"gbps": size / multiply / 1e9, "read_gbps": data.nbytes / wall / 1e9},
        **{"of_bandwidth": size / multiply * wall / data.nbytes},
        **{"gweights_per_s": rows * cols / multiply / 1e9, "dequantize_gweights_per_s": tiled / expand / 1e9},
    }


def call_overhead() -> float:
    """Seconds of one call on a matrix of one block, Python included."""
    m = random_matrix(4, 1, BLOCK)
    x, y = torch.randn(BLOCK), torch.empty(1)

    def run() -> None:
        for _ in range(1000):
            m.multiply(x.data_ptr(), 1, BLOCK, y.data_ptr())

    return best(run)[0] / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--vectors", type=int, default=1)
    parser.add_argument("--path", choices=("auto", "portable"), default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    path = blocks.use(options.path)
    for shape in options.shapes.split(","):
        rows, cols = (int(n) for n in shape.split("x"))
        for threads in (int(n) for n in options.threads.split(",")):
            for bits in NAMES:
                case = {"path": path, **measure(bits, rows, cols, threads, options.vectors)}
                print(json.dumps(case) if options.json else line(case), flush=True)
    overhead = call_overhead() * 1e6
    print(json.dumps({"call_us": overhead}) if options.json else f"one call: {overhead:.1f} us")


def line(case: dict[str, Any]) -> str:
    return (
        f"{case['format']} {case['shape']:>12} {case['threads']} threads: {case['gbps']:5.1f} GB/s,"
        f" {case['of_bandwidth']:4.0%} of the {case['read_gbps']:.1f} a sum reads;"
        f" {case['gweights_per_s']:5.1f} G weights/s"
        f" (dequantize {case['dequantize_gweights_per_s']:.1f})"
    )


if __name__ == "__main__":
    main()
