"""What layers of one residual stream may have, beside slow derivations: LayerNorm, temperature, chunks, the plain
feed-forward, normed queries, per-layer inputs and a layer's scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.engine import torch_ops
from edge.engine.kv import Keys, KVCache
from edge.engine.torch_ops import TorchOps, earliest, visible
from loaders.network import blocks
from loaders.network.decoder import decoder
from loaders.network.spec import PLE, Activation, Attention, Gated, Layer, Model, Plain, QKNorm, Temperature
from loaders.network.tensors import PLE_TABLE, tensors

CPU = torch.device("cpu")
T, D, EPS = 5, 8, 1e-3
Floats = npt.NDArray[np.float64]


def op() -> TorchOps:
    """Operators at the start of a pass."""
    return TorchOps(CPU)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def array(x: torch.Tensor) -> Floats:
    return x.double().numpy()


def close(found: torch.Tensor | None, wanted: Floats, tolerance: float = 2e-6) -> None:
    """In units of the largest wanted value."""
    assert found is not None
    assert found.dtype == torch.float32
    assert tuple(found.shape) == wanted.shape
    assert np.abs(array(found) - wanted).max() <= tolerance * max(1.0, float(np.abs(wanted).max()))


def activated(x: Floats, kind: Activation) -> Floats:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(x: Floats, w: Floats | None) -> Floats:
    """Row by row."""
    rows = x.reshape(-1, x.shape[-1])
    out = [row / math.sqrt(float(row @ row) / len(row) + EPS) * (1.0 if w is None else w) for row in rows]
    return np.stack(out).reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_layer_norm(scale: float, offset: float) -> None:
    x, w, b = random(3, 4, 10) * scale + offset * scale, random(10, seed=1), random(10, seed=2)
    a = array(x)
    centred = a - a.mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * array(w) + array(b)
    # A mean of a hundred deviations costs two digits.
    close(op().layer_norm(x, w, b, EPS), wanted, 1e-6 * max(1.0, offset))
    assert torch.equal(op().layer_norm(torch.full((2, 10), 3.0), w, b, EPS), b.expand(2, 10))


@pytest.mark.parametrize("start", [0, 5, 8190, 16_380, 1_000_000])
@pytest.mark.parametrize("temperature", [Temperature(0.1, 8192), Temperature(0.5, 3)])
def test_temperature(temperature: Temperature, start: int) -> None:
    """As transformers' Llama 4 has it, and as the formula is written; a query before the first step is untouched."""
    x, positions = random(T, 2, 4), torch.arange(start, start + T)
    found = op().temperature(x, positions, temperature)
    scales = torch.log1p(torch.floor((positions.float() + 1.0) / temperature.floor)) * temperature.scale + 1.0
    assert torch.equal(found, x * scales.view(T, 1, 1))
    exact = [1 + temperature.scale * math.log(1 + (p + 1) // temperature.floor) for p in positions.tolist()]
    close(found, array(x) * np.array(exact)[:, None, None])
    first = positions < temperature.floor - 1
    assert torch.equal(found[first], x[first])
    assert not torch.equal(found[~first], x[~first]) or bool(first.all())


def sees(query: int, key: int, window: int | None, chunk: int | None) -> bool:
    """One pair at a time."""
    if key > query or (window is not None and query - key >= window):
        return False
    return chunk is None or key // chunk == query // chunk


@given(st.integers(0, 40), st.integers(1, 12), st.none() | st.integers(1, 9), st.booleans(), st.data())
@settings(max_examples=80, deadline=None)
def test_masks_are_what_each_pair_says(
    start: int, queries: int, span: int | None, cut: bool, data: st.DataObject
) -> None:
    window, chunk = (None, span) if cut else (span, None)
    oldest = earliest(start, window, chunk)
    assert oldest == min(k for k in range(start + 1) if sees(start, k, window, chunk))
    first = data.draw(st.integers(0, oldest))
    mask = visible(start, queries, first, start + queries - first, window, chunk, CPU)
    wanted = [[sees(q, k, window, chunk) for k in range(first, start + queries)] for q in range(start, start + queries)]
    assert mask.tolist() == wanted


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 8), st.booleans(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_attention_in_chunks(start: int, queries: int, chunk: int, few: bool, seed: int) -> None:
    """Over keys in order that begin where the first query's chunk does, in blocks of one query or of all."""
    first, end = start // chunk * chunk, start + queries
    q = random(queries, 6, 4, seed=seed)
    k, v = random(2, end, 4, seed=seed + 1), random(2, end, 4, seed=seed + 2)
    wanted = np.zeros((queries, 6, 4))
    for t in range(queries):
        keys = [j for j in range(end) if sees(start + t, j, None, chunk)]
        for h in range(6):
            weights = np.exp(array(k)[h // 3, keys] @ array(q)[t, h] * 0.4)
            wanted[t, h] = weights @ array(v)[h // 3, keys] / weights.sum()
    handle = Keys(k[:, first:], v[:, first:], first, end)
    with pytest.MonkeyPatch.context() as patch:
        if few:
            patch.setattr(torch_ops, "MASK_BYTES", 1)
        found = op().attention(q, handle, torch.arange(start, end), 0.4, None, chunk)
    close(found, wanted.reshape(queries, -1), 5e-6)


# ------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_plain_feed_forward(kind: Activation) -> None:
    shapes = {"ffn.up": (20, D), "ffn.up_bias": (20,), "ffn.down": (D, 20), "ffn.down_bias": (D,)}
    w = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    x, a = random(T, D, seed=9), {name: array(value) for name, value in w.items()}
    wanted = np.stack(
        [a["ffn.down"] @ activated(a["ffn.up"] @ row + a["ffn.up_bias"], kind) + a["ffn.down_bias"] for row in array(x)]
    )
    close(blocks.feed_forward(op(), Plain(20, kind), w.__getitem__, x), wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [None, "head", "whole", "unweighted"])
def test_queries_are_normed(norm: QKNorm | None, bias: bool) -> None:
    a = Attention(3, 1, 4, 1.0, None, qk_norm=norm, bias=bias)
    w = {"attn.q": random(12, D), "attn.q_bias": random(12, seed=1)}
    w["attn.q_norm"] = random(12 if norm == "whole" else 4, seed=2)
    x = random(T, D, seed=3) * 0.1
    wanted = array(x) @ array(w["attn.q"]).T + (array(w["attn.q_bias"]) if bias else 0.0)
    if norm == "whole":
        wanted = rms_norm(wanted, array(w["attn.q_norm"]))
    wanted = wanted.reshape(T, 3, 4)
    if norm in ("head", "unweighted"):
        wanted = rms_norm(wanted, array(w["attn.q_norm"]) if norm == "head" else None)
    close(blocks.projected(op(), a, w.__getitem__, "q", x, 3, EPS), wanted)


def test_ple_injection() -> None:
    w = {"ple.gate": random(3, D), "ple.proj": random(D, 3, seed=1), "ple.norm": random(D, seed=2)}
    x, row = random(T, D, seed=3), random(T, 3, seed=4)
    found = blocks.ple_injection(op(), w.__getitem__, x, row, "gelu_tanh", EPS)
    close(found, injected({name: array(value) for name, value in w.items()}, "", array(x), array(row)))


def injected(w: dict[str, Floats], scope: str, x: Floats, row: Floats) -> Floats:
    gate = activated(x @ w[f"{scope}ple.gate"].T, "gelu_tanh")
    return rms_norm((gate * row) @ w[f"{scope}ple.proj"].T, w[f"{scope}ple.norm"])


# ------------------------------------------------------------------------------------- per-layer inputs, layer scalars

WIDTH = 3
LAYER = Layer(
    Attention(2, 1, 4, 0.5, None), Gated(12, "gelu_tanh"), ("attn_in", "attn_out", "ffn_in", "ffn_out"), scalar=True
)
MODEL = Model("test", 16, D, (LAYER,) * 3, EPS, True, 64, embed_scale=1.5, softcap=4.0, ple=PLE(16, WIDTH))


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    table = tensors(model).items()
    return {name: random(*shape, seed=i) * 0.6 for i, (name, shape) in enumerate(table) if name != PLE_TABLE}


def run(model: Model, w: dict[str, torch.Tensor], ids: list[int], rows: torch.Tensor | None) -> torch.Tensor | None:
    cache = KVCache(model, len(ids), torch.float32, CPU)
    cache.begin(len(ids))
    found: torch.Tensor | None = decoder(op(), model, w.__getitem__, torch.tensor(ids), rows, cache, want="all")
    return found


def naive(model: Model, w: dict[str, Floats], ids: list[int], rows: Floats) -> Floats:
    """Attention, then the feed-forward, then what the layer's input adds, then all of it times one number."""
    h = w["embed"][ids] * model.embed_scale
    projected = (h @ w["ple.proj"].T / math.sqrt(D)).reshape(len(ids), len(model.layers), WIDTH)
    inputs = (rms_norm(projected, w["ple.norm"]) + rows * math.sqrt(WIDTH)) / math.sqrt(2)
    for i in range(len(model.layers)):
        s = f"layers.{i}."
        n = rms_norm(h, w[f"{s}norm.attn_in"])
        q, k, v = ((n @ w[f"{s}attn.{name}"].T).reshape(len(ids), -1, 4) for name in "qkv")
        out = np.zeros_like(q)
        for t in range(len(ids)):
            for head in range(q.shape[1]):
                weights = np.exp(k[: t + 1, 0] @ q[t, head] * 0.5)
                out[t, head] = weights @ v[: t + 1, 0] / weights.sum()
        h = h + rms_norm(out.reshape(len(ids), -1) @ w[f"{s}attn.o"].T, w[f"{s}norm.attn_out"])
        n = rms_norm(h, w[f"{s}norm.ffn_in"])
        hidden = activated(n @ w[f"{s}ffn.gate"].T, "gelu_tanh") * (n @ w[f"{s}ffn.up"].T)
        h = h + rms_norm(hidden @ w[f"{s}ffn.down"].T, w[f"{s}norm.ffn_out"])
        h = (h + injected(w, s, h, inputs[:, i])) * w[f"{s}scalar"]
    raw = rms_norm(h, w["norm"]) @ w["embed"].T
    return 4.0 * np.tanh(raw / 4.0)


def test_per_layer_inputs_and_scalars_on_one_stream() -> None:
    ids, rows, w = [3, 0, 15, 3, 7, 9], random(6, 3, WIDTH, seed=99), weights_of(MODEL)
    wanted = naive(MODEL, {name: array(value) for name, value in w.items()}, ids, array(rows))
    close(run(MODEL, w, ids, rows), wanted, 1e-5)


Change = Callable[[dict[str, torch.Tensor], torch.Tensor], None]
CHANGES: dict[str, Change] = {
    "the scalar of a middle layer": lambda w, rows: w["layers.1.scalar"].mul_(2.0),
    "the scalar of the first": lambda w, rows: w["layers.0.scalar"].mul_(-1.0),
    "one layer's inputs": lambda w, rows: rows[:, 1].zero_(),
    "the projection of inputs": lambda w, rows: w["ple.proj"].zero_(),
    "a gate": lambda w, rows: w["layers.2.ple.gate"].zero_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_of_them_counts(change: str) -> None:
    ids, rows, w = [3, 0, 15, 3, 7, 9], random(6, 3, WIDTH, seed=99), weights_of(MODEL)
    before: Any = run(MODEL, w, ids, rows)
    CHANGES[change](w, rows)
    after: Any = run(MODEL, w, ids, rows)
    assert float((after - before).abs().max()) > 1e-2


def test_models_without_them_do_without_their_weights() -> None:
    """A scalar of one is no scalar; nothing is looked up that the table does not have."""
    plain = replace(MODEL, layers=(replace(LAYER, scalar=False),) * 3, ple=None)
    w, scaled = weights_of(plain), replace(plain, layers=MODEL.layers)
    ones = {f"layers.{i}.scalar": torch.ones(1) for i in range(3)}
    one, other = run(plain, w, [1, 2, 3], None), run(scaled, {**w, **ones}, [1, 2, 3], None)
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)
    assert not set(w) & set(ones)
