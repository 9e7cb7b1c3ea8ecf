"""Every operator and block beside a slow derivation of it: loops, float64, complex numbers, no shared code."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.engine import torch_ops
from edge.engine.kv import KVCache
from edge.engine.torch_ops import TorchOps
from loaders.network import altup, blocks
from loaders.network.spec import AltUp, Attention, Gated, Layer, Model

CPU = torch.device("cpu")
KV, HEADS, DIM = 2, 6, 4


def op() -> TorchOps:
    """Operators at the start of a pass."""
    return TorchOps(CPU)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, wanted: np.ndarray, tolerance: float = 1e-6) -> None:
    """Largest difference, in units of the largest wanted value."""
    assert tuple(found.shape) == wanted.shape
    assert found.dtype == torch.float32
    scale = max(1.0, float(np.abs(wanted).max()))
    assert float(np.abs(found.numpy().astype(np.float64) - wanted).max()) <= tolerance * scale


def array(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


# ----------------------------------------------------------------------------------------------- caches and attention


def model_of(*windows: int | None) -> Model:
    """One layer per window."""
    layers = tuple(Layer(Attention(HEADS, KV, DIM, 0.37, None, window), Gated(8, "silu")) for window in windows)
    return Model("test", 16, 8, layers, 1e-6, True, 512)


def naive_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None) -> np.ndarray:
    """All queries over all keys, one score at a time."""
    tokens, heads, dim = q.shape
    out = np.zeros((tokens, heads, dim))
    for t in range(tokens):
        for h in range(heads):
            first = 0 if window is None else max(0, t - window + 1)
            keys = range(first, t + 1)
            head = h // (heads // k.shape[1])
            scores = [scale * float(q[t, h] @ k[j, head]) for j in keys]
            top = max(scores)
            weights = [math.exp(s - top) for s in scores]
            for j, weight in zip(keys, weights, strict=True):
                out[t, h] += weight / sum(weights) * v[j, head]
    return out.reshape(tokens, heads * dim)


@st.composite
def chunkings(draw: st.DrawFn) -> tuple[list[int], int | None]:
    """Sizes of passes, decode steps common among them, and a window or none."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, 14)), min_size=1, max_size=12))
    return sizes, draw(st.one_of(st.none(), st.integers(1, 9)))


@given(chunkings(), st.integers(0, 1000), st.booleans(), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_attention_over_any_chunks_is_full_attention(
    case: tuple[list[int], int | None], seed: int, small_masks: bool, spare: int
) -> None:
    """The ring, its wrap and the blocks of queries, against scores of everything with everything."""
    sizes, window = case
    total = sum(sizes)
    q, k, v = (random(total, n, DIM, seed=seed + i) for i, n in enumerate((HEADS, KV, KV)))
    cache, ops, found, start = KVCache(model_of(window), total + spare, torch.float32, CPU), op(), [], 0
    with pytest.MonkeyPatch.context() as patch:
        if small_masks:
            patch.setattr(torch_ops, "MASK_BYTES", 96)
        for size in sizes:
            part = slice(start, start + size)
            cache.begin(size)
            ops.begin()
            assert cache.positions.tolist() == list(range(start, start + size))
            keys = cache.append(0, k[part], v[part], window)
            found.append(ops.attention(q[part], keys, cache.positions, 0.37, window))
            cache.end()
            start += size
    close(torch.cat(found), naive_attention(array(q), array(k), array(v), 0.37, window), 2e-6)


@given(chunkings(), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_cache_holds_what_the_window_shows(case: tuple[list[int], int | None], spare: int) -> None:
    """Keys are numbered by position, so what is visible can be read off them; a shared handle survives the pass."""
    sizes, window = case
    total = sum(sizes)
    cache, start = KVCache(model_of(window, None), total + spare, torch.float32, CPU), 0
    for size in sizes:
        cache.begin(size)
        numbers = torch.arange(start, start + size).float()[:, None, None].expand(size, KV, DIM)
        keys = cache.append(0, numbers, -numbers, window)
        end = start + size
        seen = keys.k[0, :, 0].tolist()
        assert torch.equal(keys.k, -keys.v)
        assert keys.end == end
        oldest = 0 if window is None else max(0, start - window + 1)
        if keys.first is None:
            assert size == 1
            assert sorted(seen) == list(range(oldest, end))
        else:
            assert seen == list(range(keys.first, end))
            assert keys.first <= oldest
        whole = cache.append(1, numbers, -numbers, None)
        assert whole.k[0, :, 0].tolist() == list(range(end))
        # Layer 0 has already overwritten its ring: what it handed out must not have changed for that.
        assert keys.k[0, :, 0].tolist() == seen
        cache.end()
        start = end
    capacity = cache.layers[0][0].shape[1]
    assert capacity == min(total + spare, window or total + spare)
    kept = cache.layers[0][0][0, : min(total, capacity), 0].tolist()
    assert sorted(kept) == list(range(max(0, total - capacity), total))
    cache.reset()
    assert cache.start == 0


def test_cache_refuses_to_overflow() -> None:
    cache = KVCache(model_of(None), 4, torch.float32, CPU)
    cache.begin(4)
    cache.end()
    with pytest.raises(ValueError, match="4 \\+ 1 tokens in a cache for 4"):
        cache.begin(1)


def test_cache_has_nothing_for_layers_that_share() -> None:
    model = model_of(4, None, 4)
    third = model.layers[2]
    layers = (*model.layers[:2], Layer(Attention(HEADS, KV, DIM, 1.0, None, 4, kv_from=0), third.ffn))
    cache = KVCache(Model("test", 16, 8, layers, 1e-6, True, 512), 32, torch.float32, CPU)
    assert {i: k.shape for i, (k, _) in cache.layers.items()} == {0: (KV, 4, DIM), 1: (KV, 32, DIM)}


# ------------------------------------------------------------------------------------------------- element-wise, norms


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_gaussian_cut_off(share: float) -> None:
    x = random(7, 300) * 3 + 1
    cut = NormalDist().inv_cdf(share)
    a = array(x)
    wanted = np.maximum(0, a - (a.mean(-1, keepdims=True) + cut * a.std(-1, ddof=0, keepdims=True)))
    close(op().gaussian_topk(x, cut), wanted)
    assert abs(np.mean(wanted == 0) - share) < 0.03
    if share == 0.95:
        assert cut == pytest.approx(1.6448536, abs=1e-7)


def test_gaussian_cut_off_of_equal_values() -> None:
    assert not op().gaussian_topk(torch.full((2, 5), 3.0), 1.6).any()
    assert not op().gaussian_topk(torch.tensor([[2.5]]), 1.6).any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_norm(weighted: bool, scale: float) -> None:
    x, w = random(3, 4, 10) * scale, random(10, seed=1) if weighted else None
    a = array(x)
    wanted = a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6)
    close(op().norm(x, w, 1e-6), wanted if w is None else wanted * array(w))
    assert not op().norm(torch.zeros(2, 10), w, 1e-6).any()


def test_rms_has_a_floor() -> None:
    x = torch.cat((random(2, 6), torch.zeros(1, 6)))
    a = array(x)
    close(op().rms(x, 1e-5), np.sqrt(np.maximum((a**2).mean(-1, keepdims=True), 1e-5)))
    assert op().rms(x, 0.0)[2, 0] == 0.0


def test_activations() -> None:
    x = torch.linspace(-8, 8, 101)[None]
    a = array(x)
    close(op().activation(x, "silu"), a / (1 + np.exp(-a)))
    tanh = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    close(op().activation(x, "gelu_tanh"), tanh)
    exact = np.array([[0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in a[0]]])
    assert np.abs(op().activation(x, "gelu_tanh").numpy() - exact).max() > 1e-4


def test_soft_cap() -> None:
    head, x = random(9, 5), random(3, 5, seed=1) * 20
    raw = array(x) @ array(head).T
    close(blocks.logits(op(), head, x, None), raw)
    close(blocks.logits(op(), head, x, 30.0), 30 * np.tanh(raw / 30))


# ------------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 33), (1, 33), (5, 3, 33)])
@pytest.mark.parametrize("tile", [64, 33 * 4, 33 * 4 * 5 + 3, 8 << 20])
def test_tiled_products(dtype: torch.dtype, shape: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are widened, activations never narrowed; rows that do not fill the last tile are rows like others."""
    monkeypatch.setattr(torch_ops, "TILE_BYTES", tile)
    x, weight = random(*shape), random(41, 33, seed=1).to(dtype)
    ops, wanted = op(), array(x) @ array(weight).T
    close(ops.tiled(x, weight), wanted)
    assert ops.tile.nbytes <= max(tile, 33 * 4)
    other = random(17, 50, seed=2).to(dtype)
    y = random(3, 50, seed=3)
    close(ops.tiled(y, other), array(y) @ array(other).T)
    close(ops.tiled(x, weight), wanted)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(fast: bool, tokens: int, dtype: torch.dtype) -> None:
    ops = op()
    ops.fast = fast
    x, weight = random(tokens, 64), random(24, 64, seed=1).to(dtype)
    rounds = dtype == torch.bfloat16 and (fast or tokens == 1)
    close(ops.linear(x, weight), array(x) @ array(weight).T, 2e-2 if rounds else 1e-6)


def test_embed_widens() -> None:
    table = random(6, 4).bfloat16()
    found = op().embed(table, torch.tensor([5, 0, 5]))
    assert torch.equal(found, table[[5, 0, 5]].float())


def test_shape_operators() -> None:
    x = random(3, 4, 6)
    ops = op()
    assert torch.equal(ops.reshape(x, (-1, 24)), x.flatten(1))
    assert torch.equal(ops.slice(x, 1, 1, 3), x[:, 1:3])
    assert torch.equal(ops.concat([x, x[:, :1]], 1), torch.cat((x, x[:, :1]), 1))
    assert torch.equal(ops.last(x), x[2:])
    close(ops.matmul(x, random(3, 6, 2, seed=1)), np.einsum("tnk,tkm->tnm", array(x), array(random(3, 6, 2, seed=1))))
    close(ops.tanh(x), np.tanh(array(x)))


# ---------------------------------------------------------------------------------------------------------------- AltUp

T, STREAMS, D = 3, 4, 8


def altup_weights(seed: int = 5) -> dict[str, torch.Tensor]:
    """One layer's, and the global ones."""
    shapes = {
        "altup.router": (STREAMS, D),
        "altup.norm": (D,),
        "altup.predict": (STREAMS**2, STREAMS),
        "altup.correct": (STREAMS, STREAMS),
        "altup.scale": (D,),
        "ple.gate": (5, D),
        "ple.proj": (D, 5),
        "ple.norm": (D,),
        **{f"altup.{side}.{k}": (D, D) for side in ("expand", "merge") for k in range(1, STREAMS)},
    }
    return {name: random(*shape, seed=seed + i) * 2 for i, (name, shape) in enumerate(shapes.items())}


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return np.array(x / math.sqrt(float(np.mean(x**2)) + eps) * w)


def modalities(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Of one token."""
    return np.tanh(w["altup.router"] @ (rms_norm(x, w["altup.norm"]) / D))


@pytest.mark.parametrize("active", [0, 2])
def test_altup_predict(active: int) -> None:
    weights, h = altup_weights(), random(T, STREAMS, D)
    w, a = {k: array(v) for k, v in weights.items()}, array(h)
    wanted = a.copy()
    for t in range(T):
        coefs = w["altup.predict"] @ modalities(w, a[t, active])
        for i in range(STREAMS):
            for j in range(STREAMS):
                wanted[t, i] += coefs[i * STREAMS + j] * a[t, j]
    found = altup.predict(op(), AltUp(STREAMS, active, True), weights.__getitem__, h, D, 1e-6)
    close(found, wanted)


@pytest.mark.parametrize("active", [0, 2])
def test_altup_correct(active: int) -> None:
    weights, predicted, y = altup_weights(), random(T, STREAMS, D), random(T, D, seed=1)
    w, p, b = {k: array(v) for k, v in weights.items()}, array(predicted), array(y)
    wanted = p.copy()
    for t in range(T):
        coefs = w["altup.correct"] @ modalities(w, b[t])
        for i in range(STREAMS):
            wanted[t, i] += (coefs[i] + 1) * (b[t] - p[t, active])
    spec = AltUp(STREAMS, active, True)
    found = altup.correct(op(), spec, weights.__getitem__, predicted, predicted[:, active], y, D, 1e-6)
    close(found, wanted)


@pytest.mark.parametrize("active", [0, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_are_injected(active: int, scaled: bool) -> None:
    weights, h, row = altup_weights(), random(T, STREAMS, D), random(T, 5, seed=1)
    w, a, r = {k: array(v) for k, v in weights.items()}, array(h), array(row)
    wanted = a.copy()
    for t in range(T):
        x = a[t, active] * (w["altup.scale"] if scaled else 1.0)
        gate = w["ple.gate"] @ x
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        wanted[t, 1:] += rms_norm(w["ple.proj"] @ (gate * r[t]), w["ple.norm"])
    spec = AltUp(STREAMS, active, scaled)
    found = altup.inject(op(), spec, weights.__getitem__, h, row, "gelu_tanh", D, 1e-6)
    close(found, wanted, 2e-6)
    assert torch.equal(found[:, 0], h[:, 0])


def test_streams_open_and_close() -> None:
    weights, e = altup_weights(), random(T, D)
    w, a = {k: array(v) for k, v in weights.items()}, array(e)
    spec = AltUp(STREAMS, 0, True)
    opened = np.zeros((T, STREAMS, D))
    for t in range(T):
        opened[t, 0] = a[t]
        for k in range(1, STREAMS):
            u = w[f"altup.expand.{k}"] @ a[t]
            opened[t, k] = u * math.sqrt(np.mean(a[t] ** 2)) / math.sqrt(max(np.mean(u**2), 1e-5))
    found = altup.expand(op(), spec, weights.__getitem__, e, D)
    close(found, opened)
    h = array(found)
    merged = np.zeros((T, D))
    for t in range(T):
        merged[t] = h[t, 0]
        for k in range(1, STREAMS):
            u = w[f"altup.merge.{k}"] @ h[t, k]
            merged[t] += u * math.sqrt(np.mean(h[t, 0] ** 2)) / math.sqrt(max(np.mean(u**2), 1e-5))
    close(altup.merge(op(), spec, weights.__getitem__, found, D), merged / STREAMS)


def test_streams_of_nothing_stay_nothing() -> None:
    weights = {name: torch.zeros_like(w) for name, w in altup_weights().items()}
    found = altup.expand(op(), AltUp(STREAMS, 0, True), weights.__getitem__, random(T, D), D)
    assert not found[:, 1:].any()
    assert torch.isfinite(altup.merge(op(), AltUp(STREAMS, 0, True), weights.__getitem__, found, D)).all()


def test_laurel() -> None:
    left, right, norm, x = random(3, D), random(D, 3, seed=1), random(D, seed=2), random(T, D, seed=3)
    w: dict[str, Any] = {"laurel.left": left, "laurel.right": right, "laurel.norm": norm}
    wanted = np.stack([a + rms_norm(array(right) @ (array(left) @ a), array(norm)) for a in array(x)])
    close(blocks.laurel(op(), w.__getitem__, x, 1e-6), wanted)


def test_ple_context() -> None:
    layers, width = 3, 5
    w = {"ple.proj": random(layers * width, D), "ple.norm": random(width, seed=1)}
    e, rows = random(T, D, seed=2), random(T, layers, width, seed=3)
    found = blocks.ple_context(op(), w.__getitem__, e, rows, layers, D, width, 1e-6)
    wanted = np.zeros((T, layers, width))
    for t in range(T):
        for i in range(layers):
            projected = array(w["ple.proj"])[i * width : (i + 1) * width] @ array(e)[t] / math.sqrt(D)
            context = rms_norm(projected, array(w["ple.norm"]))
            wanted[t, i] = (context + math.sqrt(width) * array(rows)[t, i]) / math.sqrt(2)
    close(found, wanted)


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_gated(sparsity: float) -> None:
    w = {"ffn.gate": random(20, D), "ffn.up": random(20, D, seed=1), "ffn.down": random(D, 20, seed=2)}
    x = random(T, D, seed=3)
    found = blocks.gated(op(), Gated(20, "silu", sparsity), w.__getitem__, x)
    wanted = np.zeros((T, D))
    for t in range(T):
        gate = array(w["ffn.gate"]) @ array(x)[t]
        if sparsity:
            gate = np.maximum(0, gate - gate.mean() - NormalDist().inv_cdf(sparsity) * gate.std())
        wanted[t] = array(w["ffn.down"]) @ (gate / (1 + np.exp(-gate)) * (array(w["ffn.up"]) @ array(x)[t]))
    close(found, wanted)
