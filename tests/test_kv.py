"""Every kind of cache beside one that keeps everything: full, ring, chunk and latent, in float32, bf16 and int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edge
from edge.budget.price import kv_bytes, kv_capacity, kv_scratch_bytes, kv_token_bytes
from edge.engine import kv_int8, torch_ops
from edge.engine.kv import KINDS, Keys, KVCache, Stored
from edge.engine.kv_int8 import Int8
from edge.engine.static import StaticCache
from edge.engine.torch_ops import TorchOps
from loaders.formats.quant import dequantize, quantize
from loaders.network.spec import AnyAttention, Attention, Gated, LatentAttention, Layer, Model, Rope
from tests.small import built

CPU = torch.device("cpu")
SCALE = 0.3
# Spans of 8 and 6 tokens: what a test runs is several times as long, and no multiple of either.
ATTENTION: dict[str, AnyAttention] = {
    "full": Attention(6, 2, 8, SCALE, None),
    "ring": Attention(6, 2, 32, SCALE, None, window=8),
    "chunk": Attention(4, 1, 64, SCALE, None, chunk=6),
    "latent": LatentAttention(4, None, 12, 4, 4, SCALE, Rope(1e4, 4)),
}
# Of the largest value. Sums over bfloat16 keys differ in their order, and queries are bfloat16 too.
TOLERANCE = {"float32": 2e-6, "bf16": 1.5e-2, "int8": 2e-5}
CASES = [(kind, precision) for kind in ATTENTION for precision in KINDS]


def model_of(*attention: AnyAttention) -> Model:
    """One layer for each."""
    layers = tuple(Layer(a, Gated(8, "silu")) for a in attention)
    return Model("test", 16, 8, layers, 1e-6, True, 512)


def heads_of(a: AnyAttention) -> tuple[int, int, int]:
    """(queries' heads, key heads, values of a key)."""
    return (a.heads, 1, a.entry) if isinstance(a, LatentAttention) else (a.heads, a.kv_heads, a.head_dim)


def naive_round(x: np.ndarray, precision: str) -> np.ndarray:
    """What a cache makes of keys [t, heads, dim], in float64."""
    if precision == "float32":
        return x.astype(np.float64)
    if precision == "bf16":
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        return rounded.astype(np.uint32).view(np.float32).astype(np.float64)
    dim = x.shape[-1]
    groups = x.astype(np.float32).reshape(-1, 32 if dim % 32 == 0 else dim)
    scale = (np.abs(groups).max(-1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float64)
    return (np.clip(np.rint(groups / np.where(scale > 0, scale, 1)), -127, 127) * scale).reshape(x.shape)


def naive(a: AnyAttention, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Each query over every key it may see, everything kept -> [t, heads * value dim]."""
    tokens, heads, _ = q.shape
    out = np.zeros((tokens, heads, v.shape[-1]))
    for t in range(tokens):
        first = 0
        if a.window is not None:
            first = max(0, t - a.window + 1)
        elif a.chunk is not None:
            first = t - t % a.chunk
        for h in range(heads):
            head = h // (heads // k.shape[1])
            scores = SCALE * k[first : t + 1, head] @ q[t, h]
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ v[first : t + 1, head] / weights.sum()
    return out.reshape(tokens, -1)


@dataclass
class Case:
    """Random queries, keys and values of one layer, and what attention over them comes to."""

    a: AnyAttention
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    wanted: np.ndarray

    def append(self, cache: KVCache | StaticCache, part: slice, layer: int = 0) -> Keys:
        """Some tokens into a cache."""
        if isinstance(self.a, LatentAttention):
            return cache.append_latent(layer, self.k[part, 0], self.a.kv_rank)
        return cache.append(layer, self.k[part], self.v[part], self.a.window, self.a.chunk)

    def close(self, found: torch.Tensor, part: slice, tolerance: float) -> None:
        """Whether attention over some tokens is right."""
        wanted = self.wanted[part]
        assert found.dtype == torch.float32
        assert tuple(found.shape) == wanted.shape
        assert np.abs(found.double().numpy() - wanted).max() <= tolerance * np.abs(self.wanted).max()


def sequence(kind: str, precision: str, tokens: int, seed: int = 0) -> Case:
    a, rng = ATTENTION[kind], np.random.default_rng(seed)
    heads, kv_heads, dim = heads_of(a)
    q, k, v = (rng.standard_normal((tokens, n, dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    stored = stored_as(kind, precision)
    ks, vs = naive_round(k, stored), naive_round(v, stored)
    if isinstance(a, LatentAttention):
        vs = ks[..., : a.kv_rank]
    seen = naive_round(q, "bf16") if stored == "bf16" else q
    return Case(a, torch.from_numpy(q), torch.from_numpy(k), torch.from_numpy(v), naive(a, seen, ks, vs))


def run(data: Case, cache: KVCache, sizes: Sequence[int], tolerance: float) -> None:
    """Passes of ``sizes`` tokens, each checked as it comes out."""
    ops = TorchOps(CPU)
    for size in sizes:
        part = slice(cache.start, cache.start + size)
        cache.begin(size)
        ops.begin()
        keys = data.append(cache, part)
        found = ops.attention(data.q[part], keys, cache.positions, SCALE, data.a.window, data.a.chunk)
        data.close(found, part, tolerance)
        cache.end()


def stored_as(kind: str, precision: str) -> str:
    """Latent entries are not quantized."""
    return "bf16" if kind == "latent" and precision == "int8" else precision


def tolerance_of(kind: str, precision: str) -> float:
    return TOLERANCE[stored_as(kind, precision)]


# --------------------------------------------------------------------------------------- any pieces give the same sums

TOKENS = 27
PIECES: dict[str, list[int]] = {
    "whole": [TOKENS],
    "chunks": [5, 5, 5, 5, 5, 2],
    "one by one": [1] * TOKENS,
    "up to the edge": [6, 2, 4, 6, 6, 3],
    "past the edge": [7, 1, 1, 5, 1, 9, 3],
    "at the edge": [5, 1, 1, 1, 3, 1, 8, 7],
    "steps, then many": [1, 1, 1, 16, 1, 1, 6],
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(("kind", "precision"), CASES)
def test_any_pieces_give_what_keeping_everything_gives(kind: str, precision: str, pieces: str) -> None:
    data = sequence(kind, precision, TOKENS)
    cache = KVCache(model_of(data.a), 32, KINDS[precision], CPU)
    run(data, cache, PIECES[pieces], tolerance_of(kind, precision))
    cache.reset()
    run(sequence(kind, precision, TOKENS, seed=1), cache, PIECES[pieces], tolerance_of(kind, precision))


@given(
    st.sampled_from(CASES),
    st.lists(st.one_of(st.just(1), st.integers(1, 19)), min_size=1, max_size=9),
    st.integers(0, 40),
    st.integers(0, 1000),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_any_pieces_of_any_length_in_any_context(
    case: tuple[str, str], sizes: list[int], spare: int, seed: int, small: bool
) -> None:
    """Contexts shorter than the window or the chunk among them, and blocks of queries, heads and tiles of a few."""
    data, total = sequence(*case, sum(sizes), seed), sum(sizes)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(torch_ops, "MASK_BYTES", 4 * 6 * 12)
            patch.setattr(kv_int8, "KV_SCORES", 1)
            patch.setattr(kv_int8, "KV_TILE", 4 * 64 * 5)
        run(data, KVCache(model_of(data.a), total + spare, KINDS[case[1]], CPU), sizes, tolerance_of(*case))


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("sizes", [[11, 9], [3, 8, 8, 1], [1] * 7 + [13]])
def test_what_is_handed_out_is_in_order_and_enough(precision: str, sizes: list[int]) -> None:
    """Read after the buffer has moved on: a later layer that shares keys does so, in the same pass."""
    for kind in ATTENTION:
        data, stored = sequence(kind, precision, sum(sizes)), stored_as(kind, precision)
        cache = KVCache(model_of(data.a), 24, KINDS[precision], CPU)
        for size in sizes:
            cache.begin(size)
            keys = data.append(cache, slice(cache.start, cache.start + size))
            if keys.first is not None:
                assert keys.first <= torch_ops.earliest(cache.start, data.a.window, data.a.chunk)
                wanted = naive_round(data.k[keys.first : cache.start + size].numpy(), stored)
                assert np.allclose(widened(keys.k).transpose(0, 1).numpy(), wanted, rtol=1e-6, atol=1e-7)
            cache.end()


def widened(x: Stored) -> torch.Tensor:
    """float32, whatever it is kept in."""
    return x.widened(torch.empty(x.shape)) if isinstance(x, Int8) else x.float()


@pytest.mark.parametrize("sizes", [[4, 4], [6, 6], [13], [5, 1, 1], [1] * 12, [3, 20]])
def test_a_chunk_holds_the_newest_chunk(sizes: list[int]) -> None:
    """Slot p % chunk, after passes that end in, at and past a chunk's end."""
    cache = KVCache(model_of(Attention(1, 1, 2, 1.0, None, chunk=6)), 40, torch.float32, CPU)
    for size in sizes:
        cache.begin(size)
        numbers = torch.arange(cache.start, cache.start + size).float()[:, None, None].expand(size, 1, 2)
        cache.append(0, numbers, -numbers, None, 6)
        cache.end()
    newest = list(range((cache.start - 1) // 6 * 6, cache.start))
    assert cache.layers[0][0][0, : len(newest), 0].tolist() == newest


# ------------------------------------------------------------------------------------------------------------- latents


def test_latent_values_are_the_keys_own_memory() -> None:
    a = LAYERS[-1]
    cache = KVCache(model_of(a), 16, torch.bfloat16, CPU)
    cache.begin(3)
    keys = cache.append_latent(0, torch.randn(3, 576), 512)
    k, v, buffer = (x for x in (keys.k, keys.v, cache.layers[0][0]) if isinstance(x, torch.Tensor))
    assert (tuple(k.shape), tuple(v.shape)) == ((1, 3, 576), (1, 3, 512))
    assert k.data_ptr() == v.data_ptr() == buffer.data_ptr()
    assert kv_token_bytes(a, "bf16") == kv_token_bytes(a, "int8") == 576 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_over_latents_copies_no_cache(dtype: torch.dtype, tokens: int) -> None:
    keys, rank, n = torch.randn(1, 8192, 144, dtype=dtype), 128, 8192
    handle = Keys(keys, keys[..., :rank], 0, n)
    q = torch.randn(tokens, 4, 144)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        TorchOps(CPU).attention(q, handle, torch.arange(n - tokens, n), SCALE, None)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < keys.nbytes / 2


# ---------------------------------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize(("dim", "groups"), [(32, 1), (128, 4), (256, 8), (80, 1), (8, 1)])
def test_int8_is_the_format_of_packed_weights(dim: int, groups: int) -> None:
    """Codes and scales are those of the block format, where heads are whole blocks."""
    rng = np.random.default_rng(dim)
    k, v = (rng.standard_normal((5, 3, dim)).astype(np.float32) for _ in range(2))
    k[2, 1], v[0, 0] = 0.0, 1e-9
    for x, found in zip((k, v), kv_int8.quantize(torch.from_numpy(k), torch.from_numpy(v)), strict=True):
        assert (tuple(found.codes.shape), tuple(found.scales.shape)) == ((3, 5, dim), (3, 5, groups))
        got = found.widened(torch.empty(found.shape)).numpy()
        by_head = np.ascontiguousarray(x.transpose(1, 0, 2))
        assert np.allclose(got, naive_round(by_head, "int8"), rtol=1e-6, atol=1e-9)
        if dim % 32 == 0:
            codes, scales = quantize(by_head.reshape(-1, dim), "int8")
            assert np.array_equal(scales.reshape(3, 5, groups), found.scales.numpy())
            assert np.array_equal(dequantize(codes, scales, "int8", dim).reshape(got.shape), got)


def test_int8_survives_what_floats_hold() -> None:
    for value in (0.0, 1e-30, 1e-6, 1e4, 8e6, 3e30):
        found, _ = kv_int8.quantize(torch.full((1, 1, 32), value), torch.zeros(1, 1, 32))
        got = float(found.widened(torch.empty(found.shape)).max())
        assert np.isfinite(got)
        assert got == pytest.approx(min(value, 127 * 65504.0), rel=2e-3, abs=1e-5)


def test_int8_scratch_does_not_grow_with_the_context() -> None:
    """Of one token over 8192 keys of 4 heads: tiles and scores, not 64 MB of widened keys and values."""
    shape = (4, 8192, 256)
    k, v = kv_int8.empty(shape, CPU), kv_int8.empty(shape, CPU)
    k.zero_()
    v.zero_()
    ops = TorchOps(CPU)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        ops.attention(torch.randn(1, 8, 256), Keys(k, v, 0, 8192), torch.tensor([8191]), SCALE, None)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages() if event.key == "aten::empty")
    assert 0 < largest <= kv_scratch_bytes(model_of(Attention(8, 4, 256, SCALE, None)), 1, 8192, "int8")


def gap(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", ["gemma3n", "llama"])
def test_int8_keys_change_logits_little(name: str) -> None:
    """A whole model, past its window: little more than bf16 keys do, and token by token what one pass gives."""
    ids, logits = np.random.default_rng(3).integers(5, 300, 30), {}
    for kv in KINDS:
        session = edge.load(built(name), precision="float32", kv=kv, context=48)
        assert session.plan.kv == kv
        logits[kv] = session.logits(ids)
        if kv == "int8":
            # A key on the edge between two codes may fall to either, as its last bit depends on the pass's length.
            steps = np.stack([session.step(ids[i : i + 1]) for i in range(len(ids))])
            assert gap(steps, logits[kv]) < 2e-3
        session.close()
    assert 0.0 < gap(logits["int8"], logits["float32"]) < 3.0 * gap(logits["bf16"], logits["float32"]) < 5e-2


# -------------------------------------------------------------------------------------------------------------- pricing

LAYERS = (
    Attention(8, 1, 256, 1.0, None, window=512),
    Attention(8, 2, 512, 1.0, None),
    Attention(8, 1, 256, 1.0, None, window=512, kv_from=0),
    Attention(40, 8, 128, 1.0, None, chunk=96),
    Attention(25, 25, 80, 1.0, None),
    LatentAttention(16, 64, 512, 128, 128, 1.0, Rope(1e4, 64)),
)


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("context", [1, 95, 96, 100, 512, 1500])
def test_buffers_are_the_bytes_that_were_priced(precision: str, context: int) -> None:
    model = model_of(*LAYERS)
    cache = KVCache(model, context, KINDS[precision], CPU)
    memory: dict[int, int] = {}
    for pair in cache.layers.values():
        for held in pair:
            for part in (held.codes, held.scales) if isinstance(held, Int8) else (held,):
                storage = part.untyped_storage()
                memory[storage.data_ptr()] = storage.nbytes()
    assert sum(memory.values()) == kv_bytes(model, context, precision)
    assert sorted(cache.layers) == [0, 1, 3, 4, 5]


def test_priced_by_kind() -> None:
    """Bytes per token and layer, by hand; nothing grows past a window or a chunk."""
    at = [kv_token_bytes(a, "int8") for a in LAYERS]
    assert at == [512 + 32, 2048 + 128, 0, 2048 + 128, 4000 + 100, 1152]
    assert [kv_token_bytes(a, "float32") for a in LAYERS] == [2048, 8192, 0, 8192, 16000, 2304]
    assert [kv_capacity(a, 1500) for a in LAYERS] == [512, 1500, 512, 96, 1500, 1500]
    bounded = model_of(LAYERS[0], LAYERS[3])
    for precision in KINDS:
        assert kv_bytes(bounded, 512, precision) == kv_bytes(bounded, 100_000, precision)


def test_scratch_by_kind() -> None:
    """Ordered copies only where something wraps; more for layers whose copies outlive their own."""
    ring, sharer, full = LAYERS[0], LAYERS[2], LAYERS[1]
    assert kv_scratch_bytes(model_of(full), 64, 4096, "bf16") == kv_scratch_bytes(model_of(ring), 64, 512, "bf16") == 0
    one = 1024 * (512 + 64)
    assert kv_scratch_bytes(model_of(ring, ring), 64, 513, "bf16") == one
    assert kv_scratch_bytes(model_of(ring, ring, sharer), 64, 513, "bf16") == 2 * one
    assert kv_scratch_bytes(model_of(ring, sharer), 64, 513, "bf16") == one
    assert kv_scratch_bytes(model_of(LAYERS[5]), 64, 4096, "int8") == 0
    assert len({kv_scratch_bytes(model_of(full), 64, context, "int8") for context in (4096, 1 << 16)}) == 1


# ---------------------------------------------------------------------------------------------------- the recorded step


@pytest.mark.parametrize("prefix", [0, 5, 6, 7, 13])
@pytest.mark.parametrize("precision", KINDS)
def test_a_step_of_fixed_shapes_gives_the_same(precision: str, prefix: int) -> None:
    """All kinds in one cache, after a prefill of some length, through buckets of 16 and 40, and after a reset."""
    data = [sequence(kind, precision, 40) for kind in ATTENTION]
    cache = KVCache(model_of(*ATTENTION.values()), 40, KINDS[precision], CPU)
    poison(cache)
    ops = TorchOps(CPU)
    for _ in range(2):
        steps: dict[int, StaticCache] = {}
        if prefix:
            cache.begin(prefix)
            for layer, one in enumerate(data):
                one.append(cache, slice(0, prefix), layer)
            cache.end()
        for position in range(prefix, 40):
            limit = 16 if position < 16 else 40
            static = steps.setdefault(limit, StaticCache(cache, limit))
            static.positions.fill_(position)
            static.begin()
            ops.begin()
            cache.begin(1)
            part = slice(position, position + 1)
            for layer, one in enumerate(data):
                keys = one.append(static, part, layer)
                assert keys.k.shape[1] == min(limit, kv_capacity(one.a, 40))
                found = ops.attention(one.q[part], keys, static.positions, SCALE, one.a.window, one.a.chunk)
                one.close(found, part, tolerance_of(list(ATTENTION)[layer], precision))
            cache.end()
        cache.reset()


def poison(cache: KVCache) -> None:
    """Memory as it may come: what was never written is not a number."""
    for pair in cache.layers.values():
        for held in pair:
            if isinstance(held, Int8):
                held.codes.fill_(-128)
                held.scales.fill_(torch.nan)
            else:
                held.fill_(torch.nan)
