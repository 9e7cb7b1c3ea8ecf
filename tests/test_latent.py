"""Latent attention as the engine computes it, absorbed, beside the naive form that expands keys and values per head.

The naive form starts from the matrix a checkpoint holds, each head's rows for keys and then for values, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.budget.price import kv_bytes
from edge.engine.kv import KVCache
from edge.engine.torch_ops import TorchOps
from loaders.network import blocks
from loaders.network.spec import Gated, LatentAttention, Layer, Model, Rope, Yarn
from loaders.network.tensors import tensors

CPU = torch.device("cpu")
YARN = Yarn(factor=8.0, original=16, attention=1.3, fast=4.0, slow=0.5)
# No two sizes alike, so that none can be taken for another.
PLAIN = LatentAttention(3, 10, 7, 5, 4, 0.31, Rope(100.0, 6), eps=1e-3)
ATTENTION: dict[str, LatentAttention] = {
    "halves": PLAIN,
    "interleaved": replace(PLAIN, rope=replace(PLAIN.rope, interleaved=True)),
    "direct queries": replace(PLAIN, q_rank=None),
    "stretched": replace(PLAIN, scale=0.31 * 1.1**2, rope=Rope(100.0, 8, YARN, interleaved=True)),
    "stretched, direct": replace(PLAIN, q_rank=None, rope=Rope(100.0, 8, YARN)),
    "one head": replace(PLAIN, heads=1, kv_rank=9, nope_dim=2, v_dim=11, rope=Rope(10.0, 4)),
}
DIM, TOKENS = 13, 21
PASSES: dict[str, list[int]] = {
    "prefill": [TOKENS],
    "chunks": [8, 8, 5],
    "one by one": [1] * TOKENS,
    "mixed": [5, 1, 1, 9, 1, 4],
}
Floats = npt.NDArray[np.float64]


def model_of(*attention: LatentAttention) -> Model:
    layers = tuple(Layer(a, Gated(8, "silu")) for a in attention)
    return Model("test", 16, DIM, layers, 0.5, True, 512)


class Naive:
    """One layer's weights as a checkpoint has them, and what they compute."""

    def __init__(self, a: LatentAttention, seed: int) -> None:
        self.a, self.rng = a, np.random.default_rng(seed)
        queries = a.heads * (a.nope_dim + a.rope.dim)
        if a.q_rank is None:
            self.q = self.matrix(queries, DIM)
        else:
            self.q_a, self.q_norm, self.q_b = (
                self.matrix(a.q_rank, DIM), self.vector(a.q_rank), self.matrix(queries, a.q_rank),
            )  # fmt: skip
        self.kv_a, self.kv_norm = self.matrix(a.kv_rank + a.rope.dim, DIM), self.vector(a.kv_rank)
        self.kv_b = self.matrix(a.heads * (a.nope_dim + a.v_dim), a.kv_rank)
        self.o = self.matrix(DIM, a.heads * a.v_dim)

    def matrix(self, out: int, width: int) -> Floats:
        return self.rng.standard_normal((out, width)).astype(np.float32).astype(np.float64) * 2.0 / math.sqrt(width)

    def vector(self, n: int) -> Floats:
        return self.rng.uniform(0.5, 1.5, n).astype(np.float32).astype(np.float64)

    def normed(self, x: Floats, weight: Floats) -> Floats:
        return np.stack([row / math.sqrt(float(row @ row) / len(row) + self.a.eps) * weight for row in x])

    def angles(self) -> list[float]:
        """Per pair; a stretched one lies between its own angle and that divided by the factor."""
        rope = self.a.rope
        found = [rope.theta ** (-2 * i / rope.dim) for i in range(rope.dim // 2)]
        if rope.scaling is None:
            return found
        assert rope.scaling == YARN
        ends = [
            rope.dim * math.log(YARN.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (YARN.fast, YARN.slow)
        ]
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), rope.dim - 1)
        shares = [min(1.0, max(0.0, (i - low) / (high - low))) for i in range(rope.dim // 2)]
        assert any(0.0 < share < 1.0 for share in shares)
        return [f * (1 - share) + f / YARN.factor * share for f, share in zip(found, shares, strict=True)]

    def turned(self, x: Floats, position: int) -> Floats:
        """One head's rotated part, pair by pair."""
        out, half = x.copy(), len(x) // 2
        size = 1.0 if self.a.rope.scaling is None else YARN.attention
        for i, angle in enumerate(self.angles()):
            one, two = (2 * i, 2 * i + 1) if self.a.rope.interleaved else (i, i + half)
            z = complex(x[one], x[two]) * complex(math.cos(angle * position), math.sin(angle * position)) * size
            out[one], out[two] = z.real, z.imag
        return out

    def forward(self, x: Floats) -> Floats:
        """x [t, dim] -> [t, dim]: every head has keys and values of its own, but for the rotated part of a key."""
        a, tokens = self.a, len(x)
        q = x @ self.q.T if a.q_rank is None else self.normed(x @ self.q_a.T, self.q_norm) @ self.q_b.T
        q = q.reshape(tokens, a.heads, a.nope_dim + a.rope.dim)
        both = x @ self.kv_a.T
        expanded = self.normed(both[:, : a.kv_rank], self.kv_norm) @ self.kv_b.T
        expanded = expanded.reshape(tokens, a.heads, a.nope_dim + a.v_dim)
        shared = np.stack([self.turned(both[t, a.kv_rank :], t) for t in range(tokens)])
        out = np.zeros((tokens, a.heads, a.v_dim))
        for h in range(a.heads):
            keys = np.concatenate((expanded[:, h, : a.nope_dim], shared), axis=1)
            for t in range(tokens):
                query = np.concatenate((q[t, h, : a.nope_dim], self.turned(q[t, h, a.nope_dim :], t)))
                scores = keys[: t + 1] @ query * a.scale
                weights = np.exp(scores - scores.max())
                out[t, h] = weights @ expanded[: t + 1, h, a.nope_dim :] / weights.sum()
        result: Floats = out.reshape(tokens, -1) @ self.o.T
        return result

    def weights(self) -> dict[str, torch.Tensor]:
        """By canonical name: what expands keys is turned round, head by head."""
        a = self.a
        split = self.kv_b.reshape(a.heads, a.nope_dim + a.v_dim, a.kv_rank)
        found = {
            "kv_a": self.kv_a, "kv_norm": self.kv_norm, "o": self.o,
            "k_b": split[:, : a.nope_dim].transpose(0, 2, 1), "v_b": split[:, a.nope_dim :],
        }  # fmt: skip
        if a.q_rank is None:
            found["q"] = self.q
        else:
            found.update(q_a=self.q_a, q_a_norm=self.q_norm, q_b=self.q_b)
        return {f"attn.{name}": torch.from_numpy(np.ascontiguousarray(x)).float() for name, x in found.items()}


def absorbed(naive: Naive, x: Floats, sizes: Sequence[int], spare: int = 0) -> tuple[Floats, KVCache]:
    """The engine's form, in passes of so many tokens, and the cache it leaves."""
    a, weights, start = naive.a, naive.weights(), 0
    cache, ops, found = KVCache(model_of(a), len(x) + spare, torch.float32, CPU), TorchOps(CPU), []
    for size in sizes:
        cache.begin(size)
        ops.begin()
        part, positions = torch.from_numpy(x[start : start + size]).float(), cache.positions
        kv = blocks.keys_values(ops, a, weights.__getitem__, part, positions, cache, 0, 0.5)
        found.append(blocks.attention(ops, a, weights.__getitem__, part, positions, kv, 0.5))
        cache.end()
        start += size
    return torch.cat(found).double().numpy(), cache


def close(found: Floats, wanted: Floats) -> None:
    """Float32 beside float64, in units of the largest value."""
    assert found.shape == wanted.shape
    assert np.abs(wanted).max() > 0.1
    assert np.abs(found - wanted).max() <= 5e-6 * max(1.0, np.abs(wanted).max())


def tokens(n: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("kind", ATTENTION)
def test_absorbed_is_naive(kind: str) -> None:
    naive, x = Naive(ATTENTION[kind], 0), tokens(TOKENS)
    wanted = naive.forward(x)
    for sizes in PASSES.values():
        close(absorbed(naive, x, sizes, spare=3)[0], wanted)


@st.composite
def attentions(draw: st.DrawFn) -> LatentAttention:
    """Small sizes, mostly different, of every kind."""
    stretched = draw(st.booleans())
    rope = Rope(100.0, 8, YARN) if stretched else Rope(draw(st.sampled_from((10.0, 1e4))), 2 * draw(st.integers(1, 5)))
    sizes = [draw(st.integers(1, 12)) for _ in range(4)]
    return LatentAttention(
        sizes[0], draw(st.none() | st.integers(1, 12)), sizes[1], sizes[2], sizes[3],
        draw(st.floats(0.05, 0.7)), replace(rope, interleaved=draw(st.booleans())), eps=1e-3,
    )  # fmt: skip


@given(attentions(), st.lists(st.just(1) | st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_absorbed_is_naive_whatever_the_sizes(a: LatentAttention, sizes: list[int], seed: int) -> None:
    naive, x = Naive(a, seed), tokens(sum(sizes), seed + 1)
    found, wanted = absorbed(naive, x, sizes)[0], naive.forward(x)
    assert np.abs(found - wanted).max() <= 2e-5 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("wrong", [
    {"scale": 0.2}, {"eps": 1e-2}, {"rope": Rope(90.0, 6)}, {"rope": Rope(100.0, 6, interleaved=True)},
])  # fmt: skip
def test_the_naive_form_tells_differences(wrong: dict[str, Any]) -> None:
    """Each number counts: the comparison above would fail for any other."""
    naive, x = Naive(PLAIN, 0), tokens(TOKENS)
    wanted = naive.forward(x)
    naive.a = replace(PLAIN, **wrong)
    assert np.abs(absorbed(naive, x, [TOKENS])[0] - wanted).max() > 1e-3


def test_the_weights_are_those_of_the_table() -> None:
    for a in ATTENTION.values():
        table = {name: shape for name, shape in tensors(model_of(a)).items() if ".attn." in name}
        found = {f"layers.0.{name}": tuple(w.shape) for name, w in Naive(a, 0).weights().items()}
        assert found == table


# ------------------------------------------------------------------------------------------------------------ the cache


def held(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached from a cache, by whatever path."""
    if id(value) in seen or isinstance(value, (str, bytes, torch.dtype, torch.device, Model)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from held(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from held(item, seen)
    elif hasattr(value, "__dict__"):
        yield from held(vars(value), seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_holds_one_entry_per_token_and_layer(dtype: torch.dtype) -> None:
    """And nothing else: no expanded keys, no second copy of what is both key and value."""
    context, kinds = 40, (PLAIN, ATTENTION["stretched"], ATTENTION["one head"])
    model = model_of(*kinds)
    cache = KVCache(model, context, dtype, CPU)
    cache.begin(6)
    for i, a in enumerate(kinds):
        cache.append_latent(i, torch.randn(6, a.kv_rank + a.rope.dim), a.kv_rank)
    cache.end()
    storages = {}
    for tensor in held(cache, set()):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    positions = cache.positions.untyped_storage()
    assert storages.pop(positions.data_ptr()) == positions.nbytes() == 6 * 8
    entries = sum(a.kv_rank + a.rope.dim for a in kinds)
    assert sum(storages.values()) == context * entries * dtype.itemsize
    assert len(storages) == len(kinds)
    assert sum(storages.values()) == kv_bytes(model, context, "bf16" if dtype == torch.bfloat16 else "float32")


def test_deepseek_keeps_576_values() -> None:
    """Of 128 heads with keys of 192 and values of 128: 40,960."""
    a = LatentAttention(128, 1536, 512, 128, 128, 1.0, Rope(1e4, 64))
    cache = KVCache(model_of(a), 10, torch.bfloat16, CPU)
    assert {t.untyped_storage().nbytes() for t in cache.layers[0] if isinstance(t, torch.Tensor)} == {10 * 576 * 2}
    assert a.heads * (a.nope_dim + a.rope.dim + a.v_dim) == 40_960


def test_entries_are_the_normed_latent_and_the_rotated_key() -> None:
    naive, x = Naive(ATTENTION["interleaved"], 0), tokens(TOKENS)
    a, both = naive.a, x @ naive.kv_a.T
    _, cache = absorbed(naive, x, PASSES["mixed"])
    entries = cache.layers[0][0]
    assert isinstance(entries, torch.Tensor)
    latents = naive.normed(both[:, : a.kv_rank], naive.kv_norm)
    turned = np.stack([naive.turned(both[t, a.kv_rank :], t) for t in range(TOKENS)])
    close(entries[0].double().numpy(), np.concatenate((latents, turned), axis=1))
