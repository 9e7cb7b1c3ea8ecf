"""Mixtures of experts and per-head matrices on a GPU: the kernels against the CPU, and the bytes per second they read.

    python -m benchmarks.gpu_experts [--only speed recorded heads experts] [--out results.jsonl]

Every number is of one run: a sum that says what the memory can do, then a mixture of Qwen3-30B-A3B's shape. Layers take
turns, so that no expert is read from the cache. Exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_blocks import CUDA, ROTATED, bandwidth, error, random_blocks, timed
from edge.engine import cuda_experts
from edge.engine.cuda_ops import CudaOps
from edge.engine.torch import TorchEngine
from edge.engine.torch_blocks import Blocks
from edge.engine.torch_experts import Stack, grouped, route, selected
from edge.engine.torch_ops import TorchOps
from edge.engine.torch_weights import DTYPE
from loaders.formats.quant import BITS
from loaders.formats.recipe import recipes, stored_as
from loaders.network.spec import Attention, Experts, Gated, LatentAttention, Layer, Model, Rope, Router, Temperature
from loaders.network.tensors import flat, tensors

CPU = torch.device("cpu")
KINDS = ("float32", "bf16", "f16", "int8", "int4")
STORED = {"float32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# (experts, active, width, dim): of real models' kinds, and of no kind that fits blocks of anything.
CHECKED = ((128, 8, 768, 2048), (16, 1, 512, 640), (8, 2, 96, 64), (6, 3, 37, 70), (5, 5, 1, 33), (32, 4, 130, 257))
ROUTERS = (
    Router("softmax"),
    Router("softmax", True),
    Router("sigmoid", on_input=True),
    Router("sigmoid", True, 2.5, True),
)
GROUPED = (Router("sigmoid", True, 2.5, True, 8, 4), Router("sigmoid", True, 1.0, True, 4, 1))
TIMED = Experts(128, 8, 768, "silu", Router("softmax", True))
DIM = 2048
EXACT, ROUNDED = 2e-6, 1.5e-2


def stack(count: int, rows: int, cols: int, kind: str, seed: int) -> Stack:
    """Random matrices [count, rows, cols]."""
    if kind in BITS:
        return random_blocks(count * rows, cols, BITS[kind], seed)
    random = torch.Generator(CUDA).manual_seed(seed)
    return (torch.randn((count, rows, cols), device=CUDA, generator=random) * 0.05).to(STORED[kind])


def dense(held: Stack, count: int) -> torch.Tensor:
    """The same as float32 on the CPU."""
    if isinstance(held, Blocks):
        return held.dequantize().view(count, -1, held.cols).cpu()
    return held.float().cpu()


def mixture(shape: tuple[int, int, int, int], kind: str, router: Router, t: int) -> dict[str, bool]:
    """One layer of experts, chosen and computed on the device, against the CPU's reference."""
    experts, active, width, dim = shape
    spec = Experts(experts, active, width, "silu" if t % 2 else "gelu_tanh", router)
    torch.manual_seed(t)
    logits, x = torch.randn(t, experts) * 2, torch.randn(t, dim)
    bias = torch.randn(experts) * 0.3 if router.bias else None
    shapes = (("gate", width, dim), ("up", width, dim), ("down", dim, width))
    held = {name: stack(experts, rows, cols, kind, seed) for seed, (name, rows, cols) in enumerate(shapes)}
    wide = {name: dense(each, experts) for name, each in held.items()}
    weights = route(logits, bias, active, router)
    wanted = grouped(TorchOps(CPU), x, weights, **wide, spec=spec).double().to(CUDA)
    ops, on_gpu = CudaOps(CUDA), None if bias is None else bias.to(CUDA)
    routed = ops.route(logits.to(CUDA), on_gpu, experts, active, router)
    found = ops.experts(x.to(CUDA), routed, **held, spec=spec)
    again = ops.experts(x.to(CUDA), weights.to(CUDA), **held, spec=spec)
    most = EXACT if t <= 8 else ROUNDED
    shares, chosen = weights.to(CUDA).topk(active, -1)
    plain = selected(ops, x.to(CUDA), chosen, shares, **held, spec=spec) if t <= 8 else wanted
    return {
        "route": bool((routed.cpu() - weights).abs().max() < 1e-6),
        "experts": error(found, wanted) < most,
        "dense": error(again, wanted) < most,
        "selected": error(plain, wanted) < 1e-2,
    }


def heads(count: int, rows: int, cols: int, kind: str) -> dict[str, bool]:
    """Per-head products of few and of many tokens."""
    held, passed = stack(count, rows, cols, kind, 1), {}
    for t in (1, 3, 8, 40):
        x = torch.randn((t, count, cols), device=CUDA)
        wanted = torch.einsum("thi,hoi->tho", x.double(), dense(held, count).to(CUDA).double())
        passed[f"t{t}"] = error(CudaOps(CUDA).head_linear(x, held), wanted) < (EXACT if t <= 8 else ROUNDED)
    return passed


def small() -> Model:
    """A mixture of every kind over latent, chunked and unrotated attention."""
    rope, norms = Rope(10_000.0, 16, interleaved=True), ("attn_in", "ffn_in")
    shared = Gated(80, "silu")
    latent = LatentAttention(4, 48, 64, 32, 40, 0.15, rope)
    chunked = Attention(4, 2, 32, 0.18, Rope(10_000.0, 32), qk_norm="unweighted", chunk=8)
    global_ = Attention(4, 2, 32, 0.18, None, temperature=Temperature(0.1, 4))
    layers = (
        Layer(latent, Experts(16, 4, 96, "silu", Router("sigmoid", True, 2.5, True, 4, 2), shared), norms),
        Layer(chunked, Experts(8, 1, 96, "silu", Router("sigmoid", on_input=True), shared), norms),
        Layer(global_, Experts(8, 3, 70, "silu", Router("softmax", True)), norms),
        Layer(latent, Gated(96, "silu"), norms),
    )
    return Model("small", 320, 128, layers, 1e-6, False, 128)


def random_weights(model: Model, precision: str) -> dict[str, Stack]:
    """Random tensors in the formats they would be kept in; norms near one."""
    recipe, found = recipes(precision)[0], {}
    for seed, (name, shape) in enumerate(tensors(model).items()):
        stored = stored_as(name, shape, recipe)
        if stored in BITS:
            found[name] = random_blocks(*flat(shape), BITS[stored], seed)
        else:
            values = torch.randn(shape, device=CUDA) * 0.1 + (1.0 if "norm" in name else 0.0)
            found[name] = values.to(DTYPE[stored])
    return found


def steps(model: Model, weights: dict[str, Stack], recorded: bool, device: torch.device, kv: str) -> np.ndarray:
    """Logits of a prefill and of decoded tokens past several chunks."""
    engine = TorchEngine(model, weights, None, context=64, chunk=16, kv=kv, device=device)
    engine.graphs = recorded
    ids = np.random.default_rng(0).integers(0, model.vocab, 40)
    out = [engine.forward(ids[:5], "last")]
    out.extend(engine.forward(ids[i : i + 1], "last") for i in range(5, 40))
    out.append(engine.logits(ids))
    return np.concatenate(out)


def recorded(precision: str) -> dict[str, bool]:
    """Replayed steps against eager ones, and in float32 against the CPU."""
    torch.manual_seed(0)
    model = small()
    weights, kv = random_weights(model, precision), "float32" if precision == "float32" else "bf16"
    with torch.inference_mode():
        eager, replayed = (steps(model, weights, graphs, CUDA, kv) for graphs in (False, True))
        most = 1e-5 if kv == "float32" else 2e-2
        passed = {"finite": bool(np.isfinite(eager).all()), "replay": off(replayed, eager) < most}
        if precision == "float32":
            on_cpu = {name: w.cpu() for name, w in weights.items() if isinstance(w, torch.Tensor)}
            passed["cpu"] = off(steps(model, dict(on_cpu), False, CPU, kv), eager) < 1e-4
    return passed


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, by the largest value."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def layer_seconds(kind: str, t: int) -> tuple[int, float, float]:
    """Active bytes of one mixture, seconds of it for t tokens, and of its router."""
    ops, spec = CudaOps(CUDA), TIMED
    shapes = ((spec.width, DIM), (spec.width, DIM), (DIM, spec.width))
    held = [stack(spec.experts, rows, cols, kind, seed) for seed, (rows, cols) in enumerate(shapes)]
    active = sum(each.nbytes for each in held) * spec.active // spec.experts
    # Other experts every time: few layers hold as many bytes as caches need to be emptied.
    turns = max(2, min(16, -(-ROTATED // active)))
    x = torch.randn((t, DIM), device=CUDA)
    logits = [torch.randn((t, spec.experts), device=CUDA) for _ in range(turns)]
    weights = [route(each, None, spec.active, spec.router) for each in logits]
    picked = [(w.topk(spec.active, -1).indices.int(), w.topk(spec.active, -1).values.contiguous()) for w in weights]
    if t > 8:
        return active, eager_seconds(lambda: ops.experts(x, weights[0], *held, spec)), 0.0
    calls = [lambda p=p: cuda_experts.experts(x, *p, *held, spec) for p in picked]  # type: ignore[misc]
    routing = timed([lambda z=each: ops.route(z, None, spec.experts, spec.active, spec.router) for each in logits])  # type: ignore[misc]
    return active, timed(calls), routing


def heads_seconds(kind: str, rows: int, cols: int) -> tuple[int, float]:
    """Bytes of the matrices of 128 heads, and seconds of their product with one token."""
    ops, x = CudaOps(CUDA), torch.randn((1, 128, cols), device=CUDA)
    held = [stack(128, rows, cols, kind, seed) for seed in range(16)]
    return held[0].nbytes, timed([lambda h=h: ops.head_linear(x, h) for h in held])  # type: ignore[misc]


def eager_seconds(call: Any) -> float:
    """Seconds of a call that waits for the host, the best of several."""
    taken = []
    for _ in range(6):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3)
    return min(taken)


class Report:
    """Lines for people, JSON lines for later, and whether every check held."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.failed = out, False
        self.common = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    def __call__(self, case: str, passed: dict[str, bool] | None = None, **facts: Any) -> None:
        if passed is not None:
            wrong = [name for name, ok in passed.items() if not ok]
            self.failed |= bool(wrong)
            facts = {**facts, "ok": not wrong, "wrong": wrong}
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
        print(f"{case:<9}", *shown, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(json.dumps({"case": case, **facts, **self.common}) + "\n")


def check_experts(report: Report) -> None:
    """Every shape in every precision; of the large one only some routers."""
    for shape, kind in product(CHECKED, KINDS):
        grouping = (r for r in GROUPED if not shape[0] % 8 and shape[0] // r.groups * r.active_groups >= shape[1])
        passed: dict[str, bool] = {}
        for i, (router, t) in enumerate(product((*ROUTERS, *grouping), (1, 4, 50))):
            if shape[0] < 100 or i % 5 == 0:
                each = mixture(shape, kind, router, t)
                passed.update({f"{name} {router} t{t}": ok for name, ok in each.items()})
        report("experts", passed, shape=shape, kind=kind)


def check_heads(report: Report) -> None:
    """Shapes of a latent layer, and odd ones."""
    for kind in KINDS:
        passed = {}
        for count, rows, cols in ((16, 512, 128), (16, 128, 512), (5, 3, 70), (3, 1, 33)):
            passed.update({f"{count} {rows} {cols} {t}": ok for t, ok in heads(count, rows, cols, kind).items()})
        report("heads", passed, kind=kind)


def check_recorded(report: Report) -> None:
    """A whole small model."""
    for precision in ("float32", "bf16", "int8", "int4"):
        report("recorded", recorded(precision), precision=precision)


def speed(report: Report) -> None:
    """What a layer takes."""
    ceiling = bandwidth()[1]
    report("memory", read_gbps=ceiling / 1e9)
    for kind, t in product(("bf16", "int8", "int4"), (1, 4, 512)):
        nbytes, seconds, routing = layer_seconds(kind, t)
        facts = {"gbps": nbytes / seconds / 1e9, "of_read": nbytes / seconds / ceiling} if t == 1 else {}
        report("layer", kind=kind, t=t, us=seconds * 1e6, route_us=routing * 1e6, **facts)
    for kind, (rows, cols) in product(("bf16", "int8", "int4"), ((512, 128), (128, 512))):
        nbytes, seconds = heads_seconds(kind, rows, cols)
        report("per_head", kind=kind, rows=rows, cols=cols, us=seconds * 1e6, of_read=nbytes / seconds / ceiling)


PARTS = {"speed": speed, "recorded": check_recorded, "heads": check_heads, "experts": check_experts}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything, or what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    options = parser.parse_args(argv)
    report = Report(options.out)
    for part in options.only:
        PARTS[part](report)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
