"""Mixtures of experts and per-head products: routers against transformers, only the chosen computed, all formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.engine.torch_blocks import Blocks
from edge.engine.torch_experts import Stack, choose, grouped, route, selected
from edge.engine.torch_ops import TorchOps
from loaders.errors import Usage
from loaders.formats.quant import quantize
from loaders.network import blocks
from loaders.network.spec import Experts, Gated, Router

CPU = torch.device("cpu")
KINDS = ("float32", "bf16", "int8", "int4")
BITS = {"int8": 8, "int4": 4}
QWEN, LLAMA = Router("softmax", True), Router("sigmoid", on_input=True)
DEEPSEEK = Router("sigmoid", True, 2.5, True, 4, 2)


def stack(count: int, rows: int, cols: int, kind: str, seed: int = 0) -> Stack:
    """Random matrices [count, rows, cols] as the engine keeps them."""
    x = np.random.default_rng(seed).standard_normal((count * rows, cols), np.float32) * 0.2
    if kind in BITS:
        codes, scales = quantize(x, kind)
        return Blocks(torch.from_numpy(codes), torch.from_numpy(scales), BITS[kind], count * rows, cols)
    held = torch.from_numpy(x).view(count, rows, cols)
    return held if kind == "float32" else held.bfloat16()


def dense(held: Stack, count: int) -> torch.Tensor:
    """The values it stands for, float64 [count, rows, cols]."""
    return (held.dequantize().view(count, -1, held.cols) if isinstance(held, Blocks) else held).double()


def layer(spec: Experts, dim: int, kind: str) -> dict[str, Stack]:
    shapes = {"gate": (spec.width, dim), "up": (spec.width, dim), "down": (dim, spec.width)}
    return {name: stack(spec.experts, *shape, kind, seed) for seed, (name, shape) in enumerate(shapes.items())}


def naive(x: torch.Tensor, weights: torch.Tensor, held: dict[str, Stack], spec: Experts) -> torch.Tensor:
    """One token and one expert at a time, float64."""
    wide, out = {name: dense(each, spec.experts) for name, each in held.items()}, torch.zeros(x.shape).double()
    for token in range(len(x)):
        for expert in range(spec.experts):
            share = float(weights[token, expert])
            if share == 0.0:
                continue
            inner = x[token].double() * (share if spec.router.on_input else 1.0)
            gate, up = wide["gate"][expert] @ inner, wide["up"][expert] @ inner
            act = (
                torch.nn.functional.silu(gate)
                if spec.activation == "silu"
                else torch.nn.functional.gelu(gate, approximate="tanh")
            )
            out[token] += (wide["down"][expert] @ (act * up)) * (1.0 if spec.router.on_input else share)
    return out


def close(found: torch.Tensor, wanted: torch.Tensor, most: float = 1e-5) -> bool:
    return bool((found.double() - wanted).abs().max() <= most * wanted.abs().max().clamp_min(1e-30))


def tolerance(kind: str) -> float:
    """Only where a CPU multiplies bfloat16 itself are activations rounded."""
    return 2e-2 if kind == "bf16" and TorchOps(CPU).fast else 1e-5


def logits_of(shape: tuple[int, int], seed: int, ties: bool) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32) * 3)
    return x.round() if ties else x


def router_of(kind: str, experts: int, active: int, **changes: Any) -> torch.nn.Module:
    """Transformers' own, with the identity for weights: it then routes the logits it is given."""
    if kind == "qwen":
        from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

        config = qwen.Qwen3MoeConfig(hidden_size=experts, num_experts=experts, num_experts_per_tok=active, **changes)
        module: torch.nn.Module = qwen.Qwen3MoeTopKRouter(config)
    elif kind == "deepseek":
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

        config = deepseek.DeepseekV3Config(
            hidden_size=experts, n_routed_experts=experts, num_experts_per_tok=active, **changes
        )
        module = deepseek.DeepseekV3TopkRouter(config)
    else:
        from transformers.models.llama4 import modeling_llama4 as llama

        config = llama.Llama4TextConfig(hidden_size=experts, num_local_experts=experts, num_experts_per_tok=active)
        module = llama.Llama4Router(config)
    with torch.no_grad():
        module.weight.copy_(torch.eye(experts))
    return module


def spread(weights: torch.Tensor, chosen: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(len(weights), experts).scatter_(1, chosen, weights)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("ties", [True, False])
def test_softmax_router_is_qwens(normalized: bool, ties: bool) -> None:
    logits = logits_of((40, 32), 1, ties)
    with torch.no_grad():
        _, weights, chosen = router_of("qwen", 32, 5, norm_topk_prob=normalized)(logits)
    assert torch.allclose(route(logits, None, 5, Router("softmax", normalized)), spread(weights, chosen, 32), atol=1e-6)


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("ties", [True, False])
def test_sigmoid_router_is_deepseeks(groups: int, kept: int, normalized: bool, ties: bool) -> None:
    logits = logits_of((40, 32), 2, ties)
    changes = {"n_group": groups, "topk_group": kept, "norm_topk_prob": normalized, "routed_scaling_factor": 2.5}
    module = router_of("deepseek", 32, 4, **changes)
    # Of both signs: a bias may push scores below what masked groups would count, were that zero.
    bias = logits_of((1, 32), 3, False)[0] - 2.0
    module.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
        _, weights, chosen = module(logits)
    found = route(logits, bias, 4, Router("sigmoid", normalized, 2.5, True, groups, kept))
    assert torch.allclose(found, spread(weights, chosen, 32), atol=1e-6)
    members = (found > 0).view(40, groups, -1).any(-1).sum(-1)
    assert int(members.max()) <= kept


@pytest.mark.parametrize("active", [1, 2])
def test_input_router_is_llamas(active: int) -> None:
    logits = logits_of((40, 16), 4, False)
    # Sigmoids of these are all 1: only the logits say who is chosen.
    logits[::2] += 60.0
    with torch.no_grad():
        wanted, _ = router_of("llama", 16, active)(logits)
    assert torch.allclose(route(logits, None, active, LLAMA), wanted, atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 1000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_as_many_are_chosen_as_are_active(t: int, experts: int, seed: int, ties: bool) -> None:
    active = 1 + seed % experts
    chosen, weights = choose(logits_of((t, experts), seed, ties), None, active, QWEN)
    assert chosen.shape == weights.shape == (t, active)
    assert all(len(set(row)) == active for row in chosen.tolist())
    assert torch.allclose(weights.sum(-1), torch.ones(t), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", [QWEN, LLAMA, DEEPSEEK])
@pytest.mark.parametrize(
    ("experts", "active", "t", "width", "dim"),
    [(8, 2, 1, 32, 64), (8, 3, 5, 33, 70), (4, 2, 40, 24, 96), (12, 1, 200, 16, 32), (8, 8, 2, 5, 40)],
)
def test_grouped_is_one_expert_at_a_time(
    kind: str, router: Router, experts: int, active: int, t: int, width: int, dim: int
) -> None:
    spec = Experts(experts, active, width, "silu" if t % 2 else "gelu_tanh", router)
    bias = torch.linspace(-0.2, 0.2, experts) if router.bias else None
    active = min(active, experts // router.groups * router.active_groups)
    weights = route(logits_of((t, experts), t, False), bias, active, router)
    x, held = logits_of((t, dim), 5, False), layer(spec, dim, kind)
    wanted = naive(x, weights, held, spec)
    assert close(grouped(TorchOps(CPU), x, weights, **held, spec=spec), wanted, tolerance(kind))
    shares, chosen = weights.topk(active, -1)
    assert close(selected(TorchOps(CPU), x, chosen, shares, **held, spec=spec), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 6, 30])
def test_everybody_on_one_expert(kind: str, t: int) -> None:
    spec = Experts(6, 1, 40, "silu", QWEN)
    weights = torch.zeros(t, 6)
    weights[:, 4] = 0.7
    x, held = logits_of((t, 64), 6, False), layer(spec, 64, kind)
    assert close(grouped(TorchOps(CPU), x, weights, **held, spec=spec), naive(x, weights, held, spec), tolerance(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 3, 40])
def test_only_the_chosen_are_touched(kind: str, t: int) -> None:
    spec = Experts(10, 2, 32, "silu", QWEN)
    logits = logits_of((t, 10), 7, False)
    logits[:, [0, 3, 9]] = -100.0
    held = layer(spec, 64, kind)
    for each in held.values():
        for expert in (0, 3, 9):
            part = each.part(expert, 10).scales if isinstance(each, Blocks) else each[expert]
            part.fill_(float("nan"))
    weights = route(logits, None, 2, QWEN)
    for found in (
        grouped(TorchOps(CPU), logits_of((t, 64), 8, False), weights, **held, spec=spec),
        selected(TorchOps(CPU), logits_of((t, 64), 8, False), *weights.topk(2, -1)[::-1], **held, spec=spec),
    ):
        assert found.isfinite().all()
    # And what is chosen is read: poison reaches the output.
    poisoned = torch.zeros(1, 10)
    poisoned[0, 3] = 1.0
    assert grouped(TorchOps(CPU), logits_of((1, 64), 8, False), poisoned, **held, spec=spec).isnan().any()


def test_each_expert_is_multiplied_once() -> None:
    calls: list[int] = []

    class Counting(TorchOps):
        def linear(self, x: torch.Tensor, weight: Stack) -> torch.Tensor:
            calls.append(len(x))
            return super().linear(x, weight)

    spec = Experts(16, 2, 8, "silu", QWEN)
    weights = route(logits_of((30, 16), 9, False), None, 2, QWEN)
    grouped(Counting(CPU), logits_of((30, 24), 9, False), weights, **layer(spec, 24, "float32"), spec=spec)
    assert len(calls) == 3 * int((weights > 0).any(0).sum())
    assert sum(calls) == 3 * 2 * 30


def test_nobody_chosen_is_nothing() -> None:
    spec = Experts(4, 1, 8, "silu", QWEN)
    out = grouped(TorchOps(CPU), torch.ones(3, 32), torch.zeros(3, 4), **layer(spec, 32, "int4"), spec=spec)
    assert torch.equal(out, torch.zeros(3, 32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", [QWEN, LLAMA, DEEPSEEK])
@pytest.mark.parametrize("t", [1, 7])
def test_the_shared_expert_is_added(kind: str, router: Router, t: int) -> None:
    spec, ops = Experts(8, 2, 40, "silu", router, Gated(48, "silu")), TorchOps(CPU)
    held = {f"experts.{name}": each for name, each in layer(spec, 64, kind).items()}
    held["experts.router"] = logits_of((8, 64), 1, False) * 0.1
    held["experts.bias"] = torch.linspace(-0.2, 0.2, 8)
    alone = {"gate": stack(1, 48, 64, kind, 7), "up": stack(1, 48, 64, kind, 8), "down": stack(1, 64, 48, kind, 9)}
    # A matrix is a stack of one: quantized the same thing, as values its first.
    shared = {name: each if isinstance(each, Blocks) else each[0] for name, each in alone.items()}
    held.update({f"shared.{name}": each for name, each in shared.items()})
    x = logits_of((t, 64), 5, False)
    logits = x @ held["experts.router"].t()
    weights = route(logits, held["experts.bias"] if router.bias else None, 2, router)
    stacks = {name: held[f"experts.{name}"] for name in ("gate", "up", "down")}
    wanted = naive(x, weights, stacks, spec)
    wanted += naive(x, torch.ones(t, 1), alone, Experts(1, 1, 48, "silu", QWEN))
    assert close(blocks.experts(ops, spec, held.__getitem__, x), wanted, tolerance(kind))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("cols", [64, 70])
def test_a_part_is_the_same_memory(kind: str, cols: int) -> None:
    whole = stack(5, 6, cols, kind)
    assert isinstance(whole, Blocks)
    for index in range(5):
        part = whole.part(index, 5)
        assert part.shape == (6, cols)
        assert torch.equal(part.dequantize(), whole.dequantize()[6 * index : 6 * index + 6])
        assert part.codes.data_ptr() == whole.codes[6 * index].data_ptr()
        assert part.scales.data_ptr() == whole.scales[6 * index].data_ptr()
        x = logits_of((2, cols), index, False)
        assert torch.allclose(part.product(x), whole.product(x)[:, 6 * index : 6 * index + 6], atol=1e-5)
    for index, count in ((5, 5), (-1, 5), (0, 0), (0, 4), (0, 31)):
        with pytest.raises(Usage):
            whole.part(index, count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 4, 20])
@pytest.mark.parametrize(("heads", "rows", "cols"), [(4, 16, 32), (3, 5, 70), (6, 33, 8), (1, 1, 1)])
def test_each_head_meets_its_own_matrix(kind: str, t: int, heads: int, rows: int, cols: int) -> None:
    held, x = stack(heads, rows, cols, kind), logits_of((t, heads, cols), 3, False)
    found = TorchOps(CPU).head_linear(x, held)
    assert found.shape == (t, heads, rows)
    assert found.dtype == torch.float32
    assert close(found, torch.einsum("thi,hoi->tho", x.double(), dense(held, heads)), tolerance(kind))
