"""Quantized weights on a GPU: the kernels against float32 matrices, and the bytes per second they read.

    python -m benchmarks.gpu_blocks [--out results.jsonl]

Every number is of one run: a copy and a sum that say what the memory can do, the same product with bf16 weights, then
ours. Matrices take turns, so that none is read from the cache. Exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from edge.engine import cuda_blocks
from edge.engine.cuda_ops import CudaOps
from edge.engine.torch_blocks import BLOCK, Blocks

CUDA = torch.device("cuda")
CHECKED = ((16384, 2048), (2048, 16384), (2048, 2048), (512, 8192), (256, 2048), (2048, 256))
ODD = ((1, 1), (5, 70), (37, 224), (1000, 33), (130, 4000))
TIMED = ((16384, 2048), (2048, 16384), (262400, 2048), (2048, 2048), (512, 2048), (256, 2048))
TOKENS = (1, 2, 8, 9, 300)
# Bytes that matrices which take turns have together: several times any cache.
ROTATED = 400 << 20
LAUNCHES = 40
EXACT, ROUNDED = 1e-6, 1e-2


def random_blocks(rows: int, cols: int, bits: int, seed: int = 0) -> Blocks:
    """Random codes, scales of either sign; zero codes beyond ``cols``."""
    random = torch.Generator(CUDA).manual_seed(seed)
    nb, bias = -(-cols // BLOCK), 1 << (bits - 1)
    codes = torch.randint(0, 2 * bias, (rows, nb * BLOCK), dtype=torch.uint8, device=CUDA, generator=random)
    codes[:, cols:] = bias
    if bits == 4:
        low, high = codes.view(rows, nb, 2, BLOCK // 2).unbind(2)
        codes = (low | (high << 4)).view(rows, -1)
    else:
        codes ^= bias
    scales = torch.randn((rows, nb), device=CUDA, generator=random) * 0.02
    return Blocks(codes, scales.half(), bits, rows, cols)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over that of ``wanted``; infinite where anything is not finite."""
    value = float((found.double() - wanted).norm() / wanted.norm())
    return value if math.isfinite(value) else math.inf


def checks(rows: int, cols: int, bits: int) -> dict[str, bool]:
    """Every operation on one matrix against its dequantized form."""
    ops, weight = CudaOps(CUDA), random_blocks(rows, cols, bits)
    dense = weight.dequantize()
    passed = {"widen": True}
    for dtype in (torch.float32, torch.bfloat16):
        first = rows // 3
        out = torch.full((rows - first, cols), float("nan"), dtype=dtype, device=CUDA)
        cuda_blocks.widen(weight, out, first)
        passed["widen"] &= torch.equal(out, dense[first:].to(dtype))
    ids = torch.randint(0, rows, (50,), device=CUDA)
    passed["embed"] = torch.equal(ops.embed(weight, ids), dense[ids])
    beyond = ops.embed(weight, torch.tensor([rows, -1], device=CUDA))
    passed["ids"] = bool(beyond.isnan().all())
    for t in TOKENS:
        x = torch.randn((t, cols), device=CUDA)
        most = EXACT if t <= cuda_blocks.MOST_TOKENS else ROUNDED
        passed[f"t{t}"] = error(ops.linear(x, weight), x.double() @ dense.double().T) < most
    passed["graph"] = captured(ops, weight, dense)
    return passed


def captured(ops: CudaOps, weight: Blocks, dense: torch.Tensor) -> bool:
    """A lookup and a product recorded once, replayed with other inputs."""
    ids = torch.zeros(1, dtype=torch.int64, device=CUDA)
    x = torch.zeros((1, weight.cols), device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear(x + ops.embed(weight, ids), weight)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        ids.random_(0, weight.rows)
        graph.replay()
        wanted = (x + dense[ids]).double() @ dense.double().T
        if error(out, wanted) >= EXACT:
            return False
    return True


def timed(calls: Sequence[Callable[[], Any]], launches: int = LAUNCHES) -> float:
    """Seconds of one call, the median over replays of a graph in which ``calls`` take turns."""
    for call in calls[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    taken = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3 / launches)
    return statistics.median(taken[2:])


def bandwidth() -> tuple[float, float]:
    """Bytes per second of a copy within the device, read and written, and of a sum, which only reads."""
    a = torch.randn((1 << 28,), device=CUDA)
    b = torch.empty_like(a)
    return 2 * a.nbytes / timed([lambda: b.copy_(a)], 10), a.nbytes / timed([a.sum], 10)


def turns(rows: int, cols: int, nbytes: int) -> int:
    """Matrices that take turns."""
    return max(1, min(LAUNCHES, -(-ROTATED // nbytes)))


def decode_seconds(rows: int, cols: int, bits: int) -> tuple[int, float]:
    """Bytes of a matrix of 4, 8 or 16 bits, and seconds of its product with one token."""
    ops, x = CudaOps(CUDA), torch.randn((1, cols), device=CUDA)
    count = turns(rows, cols, rows * cols * bits // 8)
    if bits == 16:
        dense = [torch.randn((rows, cols), device=CUDA).bfloat16() for _ in range(count)]
        return dense[0].nbytes, timed([lambda w=w: ops.linear(x, w) for w in dense])  # type: ignore[misc]
    held = [random_blocks(rows, cols, bits, seed) for seed in range(count)]
    return held[0].nbytes, timed([lambda w=w: ops.linear(x, w) for w in held])  # type: ignore[misc]


def prefill_seconds(rows: int, cols: int, bits: int, t: int) -> float:
    """Seconds of a product with many tokens."""
    ops, x = CudaOps(CUDA), torch.randn((t, cols), device=CUDA)
    weight = random_blocks(rows, cols, bits) if bits < 16 else torch.randn((rows, cols), device=CUDA).bfloat16()
    return timed([lambda: ops.linear(x, weight)], 10)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    out, failed = parser.parse_args(argv).out, False
    common = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    def report(case: str, **facts: Any) -> None:
        print(f"{case:<10}", *(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()))
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps({"case": case, **facts, **common}) + "\n")

    for rows, cols in (*CHECKED, *ODD):
        for bits in (4, 8):
            passed = checks(rows, cols, bits)
            wrong = [name for name, ok in passed.items() if not ok]
            failed |= bool(wrong)
            report("check", rows=rows, cols=cols, bits=bits, ok=not wrong, wrong=wrong)
    copied, ceiling = bandwidth()
    report("memory", copy_gbps=copied / 1e9, read_gbps=ceiling / 1e9)
    for rows, cols in TIMED:
        for bits in (16, 8, 4):
            nbytes, seconds = decode_seconds(rows, cols, bits)
            facts = {"gbps": nbytes / seconds / 1e9, "of_read": nbytes / seconds / ceiling}
            report("decode", rows=rows, cols=cols, bits=bits, us=seconds * 1e6, **facts)
    for rows, cols in ((16384, 2048), (2048, 16384)):
        for bits in (16, 8, 4):
            report("prefill", rows=rows, cols=cols, bits=bits, t=512, us=prefill_seconds(rows, cols, bits, 512) * 1e6)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
