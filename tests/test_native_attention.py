"""Attention and caches of the native engine: single instructions against numpy in float64, on every kind of kernels.

Caches hold what is not a number wherever nothing was written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.engine import kv_int8, native_kv
from edge.engine.native import library
from edge.engine.native.compile import attention_scratch
from edge.engine.native.library import Cache, Instruction, Kind, Op, Pass, Program, View
from edge.engine.native_kv import Caches, cache_bytes, capacity
from loaders.errors import OverBudget
from loaders.network.spec import AnyAttention, Attention, Gated, LatentAttention, Layer, Model, Rope

SCALE = 0.3
ISAS = library.isas()
KINDS = tuple(native_kv.KINDS)
# Of the largest value: scores of some tens are sums of float32.
TOLERANCE = 2e-5
FULL = Attention(6, 2, 20, SCALE, None)
SPECS: dict[str, AnyAttention] = {
    "full": FULL,
    "window": Attention(6, 2, 32, SCALE, None, window=9),
    "chunk": Attention(3, 3, 64, SCALE, None, chunk=7),
    "latent": LatentAttention(4, None, 21, 4, 4, SCALE, Rope(1e4, 8)),
    "odd": Attention(10, 2, 33, SCALE, None),
    "many heads": Attention(24, 2, 16, SCALE, None, window=70),
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    library.use("auto")
    library.threads(1)


def model_of(*attention: AnyAttention) -> Model:
    """One layer for each."""
    layers = tuple(Layer(a, Gated(8, "silu")) for a in attention)
    return Model("test", 16, 8, layers, 1e-6, True, 4096)


class Bench:
    """A cache and the two instructions that use it; ``reader`` attends to it, the last row alone where ``one``."""

    def __init__(
        self,
        a: AnyAttention,
        kind: str,
        context: int,
        chunk: int,
        reader: AnyAttention | None = None,
        one: bool = False,
    ) -> None:
        self.a, self.reader, self.one, self.chunk = a, reader or a, one, chunk
        self.caches = Caches(model_of(a), context, chunk, kind)
        np.frombuffer(self.caches.bytes, np.uint8)[:] = 0xFF
        self.kv_heads, self.k_dim, self.v_dim = native_kv.shape(a)
        heads = self.reader.heads
        shapes = [(heads, self.k_dim), (self.kv_heads, self.k_dim), (self.kv_heads, self.v_dim), (heads, self.v_dim)]
        scratch = attention_scratch(heads, self.v_dim, self.caches.capacity(0))
        self.views, at = [], 0
        for n, m in shapes:
            # Rows and heads lie apart, at odd places.
            self.views.append(View(at, n * (m + 1) + 2, m + 1, n, m, 1))
            at += chunk * (n * (m + 1) + 2) + 1
        memory = np.empty(at + scratch + 16, np.float32)
        first = -memory.ctypes.data % 64 // 4
        self.arena = memory[first : first + at + scratch]
        q, k, v, out = self.views
        window, cut = self.reader.window or 0, self.reader.chunk or 0
        if one:
            q.one = out.one = 1
        steps = [Instruction(Op.APPEND), Instruction(Op.ATTENTION)]
        steps[0].view[0] = k
        if not isinstance(a, LatentAttention):
            steps[0].view[1] = v
        for i, view in enumerate((q, out, View(at, scratch, scratch, 1, scratch, 1, 1))):
            steps[1].view[i] = view
        steps[1].number[1], steps[1].number[2], steps[1].real[0] = window, cut, self.reader.scale
        self.steps = (Instruction * 2)(*steps)
        self.program = Program(self.steps, None, ctypes.cast(self.caches.table, ctypes.POINTER(Cache)), 2, 0, 1)
        self.program.arena, self.program.arena_floats = self.arena.ctypes.data, len(self.arena)
        self.program.chunk, self.program.context, self.program.vocab = chunk, context, 1
        library.check(self.program)

    def seen(self, view: View, rows: int) -> np.ndarray:
        """[rows, n, m]"""
        strides = (4 * view.row, 4 * view.step, 4)
        return np.lib.stride_tricks.as_strided(self.arena[view.at :], (rows, view.n, view.m), strides)

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """One pass over k, v [t, kv_heads, dim] and q [t or 1, heads, dim]."""
        t = len(k)
        self.arena[:] = np.nan
        for view, x in zip(self.views[:3], (q, k, v), strict=True):
            self.seen(view, len(x))[:] = x
        ids = np.zeros(t, np.int64)
        library.run(self.program, Pass(t, self.caches.start, ids.ctypes.data))
        self.caches.start += t
        return self.seen(self.views[3], len(q)).copy()

    def run(self, passes: Sequence[int], data: tuple[np.ndarray, ...]) -> np.ndarray:
        """Passes of so many tokens; rows of all of them."""
        q, k, v = data
        found, edges = [], np.cumsum([0, *passes])
        for first, stop in pairwise(edges):
            found.append(self.step(q[stop - 1 if self.one else first : stop], k[first:stop], v[first:stop]))
        return np.concatenate(found)


def drawn(a: AnyAttention, tokens: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """q, k, v [tokens, heads, dim]; of a latent layer values are the keys' own."""
    rng = np.random.default_rng(seed)
    kv_heads, k_dim, v_dim = native_kv.shape(a)
    q, k, v = (
        rng.standard_normal((tokens, n, dim), np.float32)
        for n, dim in ((a.heads, k_dim), (kv_heads, k_dim), (kv_heads, v_dim))
    )
    return q, k, k[..., :v_dim] if isinstance(a, LatentAttention) else v


def stored(x: np.ndarray, a: AnyAttention, kind: str) -> np.ndarray:
    """What a cache makes of x [t, heads, dim], in float64, as the other engine has it."""
    values = torch.from_numpy(np.ascontiguousarray(x))
    kept = native_kv.kept(a, kind)
    if kept == Kind.INT8:
        both, _ = kv_int8.quantize(values, values)
        values = both.widened(torch.empty(both.shape)).transpose(0, 1)
    elif kept == Kind.BF16:
        values = values.bfloat16()
    return values.double().numpy()


def expected(a: AnyAttention, data: tuple[np.ndarray, ...], kind: str) -> np.ndarray:
    """[t, heads, v_dim], each row over what it sees."""
    q, k, v = data[0].astype(np.float64), stored(data[1], a, kind), stored(data[2], a, kind)
    if isinstance(a, LatentAttention):
        v = k[..., : v.shape[-1]]
    group = a.heads // k.shape[1]
    out = np.empty((len(q), a.heads, v.shape[-1]))
    for p in range(len(q)):
        first = max(0, p - a.window + 1) if a.window else p // a.chunk * a.chunk if a.chunk else 0
        for h in range(a.heads):
            scores = k[first : p + 1, h // group] @ q[p, h] * a.scale
            shares = np.exp(scores - scores.max())
            out[p, h] = shares / shares.sum() @ v[first : p + 1, h // group]
    return out


def near(found: np.ndarray, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def split(tokens: int, most: int, seed: int) -> list[int]:
    """Passes of 1 to ``most`` tokens, in all so many."""
    rng, parts = np.random.default_rng(seed), list[int]()
    while tokens:
        parts.append(min(tokens, int(rng.integers(1, most + 1))))
        tokens -= parts[-1]
    return parts


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_passes_of_any_size_give_what_numpy_gives(name: str, kind: str, isa: str) -> None:
    """Rings go round several times, within passes too."""
    library.use(isa)
    a, tokens = SPECS[name], 50 if name != "many heads" else 200
    data = drawn(a, tokens)
    near(Bench(a, kind, tokens, 13).run(split(tokens, 13, 1), data), expected(a, data, kind))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    span = draw(st.sampled_from(("full", "window", "chunk", "latent")))
    length = draw(st.integers(1, 80))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 13))
    dim, tokens, most = draw(st.integers(1, 100)), draw(st.integers(1, 120)), draw(st.integers(1, 40))
    a: AnyAttention = Attention(kv_heads * group, kv_heads, dim, SCALE, None)
    if span == "latent":
        a = LatentAttention(group, None, dim, 4, 4, SCALE, Rope(1e4, 2 * draw(st.integers(1, 10))))
    elif span != "full":
        a = replace(a, **{span: length})  # type: ignore[arg-type]
    kind, isa = draw(st.sampled_from(KINDS)), draw(st.sampled_from(ISAS))
    library.use(isa)
    values = drawn(a, tokens, dim)
    near(Bench(a, kind, tokens, most).run(split(tokens, most, length), values), expected(a, values, kind))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("a", [Attention(4, 2, 16, SCALE, None, window=900), Attention(3, 1, 8, SCALE, None)])
def test_a_long_past_is_done_in_ranges(a: Attention, isa: str) -> None:
    """Three of them for a token, one of which begins where a window does; the ring wraps in the middle of one."""
    library.use(isa)
    tokens, passes = 1500, [400, 400, 400, 296, 1, 1, 1, 1]
    data = drawn(a, tokens)
    found = Bench(a, "bf16", tokens, 400).run(passes, data)
    near(found[1100:], expected(a, data, "bf16")[1100:])


@pytest.mark.parametrize("isa", ISAS)
def test_all_heads_of_a_large_latent_layer(isa: str) -> None:
    """The largest entries there are, and more heads to one of them than are done at once."""
    library.use(isa)
    a = LatentAttention(128, None, 512, 4, 4, 0.05, Rope(1e4, 64))
    data = drawn(a, 21)
    near(Bench(a, "bf16", 21, 20).run([20, 1], data), expected(a, data, "bf16"))


@pytest.mark.parametrize("name", SPECS)
def test_a_row_is_the_same_whatever_the_pass(name: str) -> None:
    """To the bit among passes of several tokens; one token is summed in another order."""
    a = SPECS[name]
    data = drawn(a, 48)
    wide, narrow = (Bench(a, "bf16", 48, most).run(passes, data) for most, passes in ((24, [24] * 2), (3, [3] * 16)))
    single = Bench(a, "bf16", 48, 5).run([1] * 48, data)
    np.testing.assert_array_equal(wide, narrow)
    near(single, wide, 1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_threads_change_nothing(name: str) -> None:
    a = SPECS[name]
    data, found = drawn(a, 700), []
    for threads in (1, 3):
        library.threads(threads)
        found.append(Bench(a, "int8", 700, 350).run([350, 349, 1], data))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("isa", ISAS)
def test_another_layer_reads_with_the_last_token_alone(isa: str) -> None:
    library.use(isa)
    a, reader = Attention(4, 2, 16, SCALE, None, window=9), Attention(8, 2, 16, 0.7, None, window=9)
    data = drawn(reader, 40)
    found = Bench(a, "float32", 40, 10, reader, one=True).run([10] * 4, data)
    near(found, expected(reader, data, "float32")[9::10])


def test_scores_far_apart_and_far_from_zero() -> None:
    """Softmax neither overflows nor loses the only key that counts."""
    q, k, v = drawn(FULL, 70)
    for factor in (1e4, 1e-30):
        data = (q * np.float32(factor), k, v)
        found = Bench(FULL, "float32", 70, 69).run([69, 1], data)
        near(found, expected(FULL, data, "float32"), 1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_kept_equals_the_other_engine(isa: str) -> None:
    """To the bit: ties, values next to nothing, scales that fp16 rounds far or cannot hold, whole groups of zeros."""
    library.use(isa)
    rng = np.random.default_rng(0)
    a = Attention(2, 2, 64, SCALE, None)
    x = rng.standard_normal((60, 2, 64), np.float32) * np.float32(10.0) ** rng.integers(-9, 6, (60, 2, 1))
    x = x.astype(np.float32)
    x[0], x[1, 0], x[2] = 0, -0.0, np.float32(1e9)
    x[3] = np.arange(64) / np.float32(2) - 16
    x[4] = np.float32(127 * 2.0**-26) * np.arange(64) / 64
    x[5] = np.uint32(0x3F808000).view(np.float32)
    x[6] = np.uint32(0x3F818000).view(np.float32)
    for kind in ("bf16", "int8"):
        bench = Bench(a, kind, 60, 60)
        bench.run([60], (np.zeros_like(x), x, x[::-1]))
        for values, of in ((x, "k"), (x[::-1], "v")):
            other, _ = kv_int8.quantize(torch.from_numpy(values.copy()), torch.from_numpy(values.copy()))
            if kind == "int8":
                np.testing.assert_array_equal(content(bench, of, np.int8, 64), other.codes.numpy())
                scales = other.scales.view(torch.uint16).numpy()
                np.testing.assert_array_equal(content(bench, f"{of}_scale", np.uint16, 2), scales)
            else:
                plain = torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()
                np.testing.assert_array_equal(content(bench, of, np.uint16, 64), plain.transpose(1, 0, 2))


def content(bench: Bench, name: str, dtype: type, width: int) -> np.ndarray:
    """[heads, capacity, width] of a cache."""
    cache = bench.caches.table[0]
    count = cache.heads * cache.capacity * width
    memory = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(getattr(cache, name))
    return np.frombuffer(memory, dtype).reshape(cache.heads, cache.capacity, width)


def test_nothing_else_is_harmed_by_what_is_not_a_number() -> None:
    """A value, and all of its group; rows before it and other heads are as they were."""
    q, k, v = drawn(SPECS["full"], 20)
    k[10, 0, 3] = np.nan
    for kind in KINDS:
        found = Bench(FULL, kind, 20, 7).run([7, 7, 1, 5], (q, k, v))
        wanted = expected(FULL, (q, np.nan_to_num(k), v), kind)
        assert np.isnan(found[10:, :3]).all()
        near(found[:, 3:], wanted[:, 3:])
        near(found[:10], wanted[:10])


@pytest.mark.parametrize("kind", KINDS)
def test_caches_take_what_they_cost(kind: str) -> None:
    shared = replace(FULL, kv_from=0)
    model = model_of(*SPECS.values(), shared)
    caches = Caches(model, 100, 16, kind)
    assert len(caches.table) == len(SPECS)
    assert len(caches.bytes) == caches.nbytes == cache_bytes(model, 100, 16, kind)
    at = ctypes.addressof(caches.bytes)
    for i, (cache, a) in enumerate(zip(caches.table, SPECS.values(), strict=True)):
        assert cache.capacity == caches.capacity(i) == capacity(a, 100, 16)
        latent = isinstance(a, LatentAttention)
        assert cache.kind == (Kind.BF16 if latent and kind == "int8" else native_kv.KINDS[kind])
        for place, size in zip((cache.k, cache.v, cache.k_scale, cache.v_scale), sizes_of(cache), strict=True):
            assert place == (at if size else None)
            at += -(-size // 64) * 64
    assert at == ctypes.addressof(caches.bytes) + caches.nbytes
    assert capacity(SPECS["window"], 100, 16) == 9 + 15
    assert capacity(SPECS["chunk"], 10, 16) == 10


def sizes_of(cache: Cache) -> tuple[int, int, int, int]:
    """Bytes that a cache's parts need."""
    slots, size = cache.heads * cache.capacity, {Kind.F32: 4, Kind.BF16: 2, Kind.INT8: 1}[cache.kind]
    v_dim = 0 if cache.latent else cache.v_dim
    scales = [2 * slots * dim // cache.group if cache.kind == Kind.INT8 else 0 for dim in (cache.k_dim, v_dim)]
    return slots * cache.k_dim * size, slots * v_dim * size, scales[0], scales[1]


def test_no_room() -> None:
    with pytest.raises(OverBudget, match="keys and values"):
        Caches(model_of(Attention(8, 8, 1024, SCALE, None)), 1 << 40, 16, "float32")
