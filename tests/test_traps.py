"""The mistakes that other implementations of Gemma 3n have made, each put back on purpose.

Every test compares with transformers first, then makes the mistake and shows that the comparison notices. The numbers
are those of the project's notes on Gemma 3n. Not here: 14 (there is no way to hand in embeddings), 17 (accelerate's
hooks) and 19 (quantized tables on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from edge.engine.kv import KVCache
from edge.engine.torch import TorchEngine
from edge.engine.torch_ops import TorchOps
from edge.session import Session
from loaders.network import altup, blocks
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, tensors
from tests import makers
from tests.conftest import Folder, Open
from tests.makers import assert_close, distance, expected, make, prompt, reference, variant
from tests.shrink import parse, real, shrink

NAME = "gemma-3n-E2B"
LENGTH = 40
# A mistake counts as noticed when it moves the logits by ten tolerances.
NOTICED = 10 * makers.TOLERANCE


@pytest.fixture(scope="module")
def right(folders: Folder) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and transformers' logits for them."""
    model = reference(folders(NAME))
    ids = prompt(model.config.vocab_size, LENGTH)
    return ids, expected(model, ids)


@pytest.fixture(name="opened")
def opened_fixture(opened: Open) -> Open:
    """In torch, which reads the model and its weights anew in each pass: either may be changed in between."""
    return lambda folder, **options: opened(folder, **{"engine": "torch", **options})


@pytest.fixture
def session(folders: Folder, opened: Open, right: tuple[np.ndarray, np.ndarray]) -> Session:
    """A session that has just been shown to be right."""
    found = opened(folders(NAME))
    assert_close(found.logits(right[0]), right[1])
    return found


Right = tuple[np.ndarray, np.ndarray]
Patch = pytest.MonkeyPatch


def wrong(session: Session, right: Right) -> float:
    """How far off the whole prompt is now."""
    return distance(session.logits(right[0]), right[1])


def steps(session: Session, ids: np.ndarray) -> np.ndarray:
    """Token by token."""
    session.reset()
    return np.stack([session.step(ids[i : i + 1]) for i in range(len(ids))])


def rebuilt(session: Session, change: Callable[[Any], Any]) -> None:
    """The engine's model with every layer changed."""
    model: Model = session.engine.model
    session.engine.model = replace(model, layers=tuple(change(layer) for layer in model.layers))


def test_trap_01_sharing_layers_rotate_queries_to_their_own_positions(
    session: Session, right: Right, monkeypatch: Patch
) -> None:
    assert_close(steps(session, right[0]), right[1])
    true = blocks.attention

    def late(op: TorchOps, a: Any, w: Any, x: Any, positions: Any, kv: Any, eps: float) -> Any:
        if a.kv_from is None:
            return true(op, a, w, x, positions, kv, eps)
        op.begin()
        out = true(op, a, w, x, positions + len(positions), kv, eps)
        op.begin()
        return out

    monkeypatch.setattr(altup, "attention", late)
    assert wrong(session, right) > NOTICED
    assert distance(steps(session, right[0]), right[1]) > NOTICED


@pytest.mark.parametrize("lost", [1, 2])
def test_trap_02_one_pass_equals_token_by_token_past_the_window(
    session: Session, right: Right, monkeypatch: Patch, lost: int
) -> None:
    ids, logits = right
    assert session.model.layers[0].attention.window == 16 < LENGTH // 2
    assert_close(steps(session, ids), logits)
    whole = KVCache.append

    def trimmed(self: KVCache, layer: int, k: Any, v: Any, window: int | None, chunk: int | None = None) -> Any:
        keys = whole(self, layer, k, v, window, chunk)
        size = keys.k.shape[1]
        if window is None or size < window:
            return keys
        return replace(keys, k=keys.k[:, lost:], v=keys.v[:, lost:], first=None if keys.first is None else lost)

    monkeypatch.setattr(KVCache, "append", trimmed)
    found = steps(session, ids)
    assert_close(found[:15], logits[:15])
    assert distance(found, logits) > NOTICED


def cut(kind: str) -> Callable[[TorchOps, torch.Tensor, float], torch.Tensor]:
    """Gaussian cut-offs that are wrong in one way."""

    def gaussian_topk(self: TorchOps, x: torch.Tensor, by: float) -> torch.Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, correction=1 if kind == "sample" else 0)
        limit = mean + by * std
        return functional.relu(x - limit) if kind == "sample" else torch.where(x > limit, x, torch.zeros_like(x))

    return gaussian_topk


def test_trap_03_deviation_is_the_populations(session: Session, right: Right, monkeypatch: Patch) -> None:
    monkeypatch.setattr(TorchOps, "gaussian_topk", cut("sample"))
    assert wrong(session, right) > NOTICED


def test_trap_04_gate_is_shifted_not_masked(session: Session, right: Right, monkeypatch: Patch) -> None:
    monkeypatch.setattr(TorchOps, "gaussian_topk", cut("masked"))
    assert wrong(session, right) > NOTICED


def test_trap_04_cut_comes_before_the_activation(session: Session, right: Right, monkeypatch: Patch) -> None:
    def late(op: TorchOps, f: Any, w: Any, x: Any, scope: str = "ffn") -> Any:
        gate = op.activation(op.linear(x, w("ffn.gate")), f.activation)
        if f.sparsity > 0:
            gate = op.gaussian_topk(gate, 1.6448536)
        return op.linear(gate * op.linear(x, w("ffn.up")), w("ffn.down"))

    monkeypatch.setattr(blocks, "gated", late)
    assert wrong(session, right) > NOTICED


def test_trap_05_norm_weight_is_not_one_plus_w(session: Session, right: Right, monkeypatch: Patch) -> None:
    true = TorchOps.norm
    monkeypatch.setattr(TorchOps, "norm", lambda self, x, w, eps: true(self, x, None if w is None else w + 1.0, eps))
    assert wrong(session, right) > NOTICED


def test_trap_06_scores_are_not_scaled(session: Session, right: Right) -> None:
    assert {layer.attention.scale for layer in session.model.layers} == {1.0}
    rebuilt(session, lambda layer: replace(layer, attention=replace(layer.attention, scale=16**-0.5)))
    assert wrong(session, right) > NOTICED


def test_trap_07_values_are_normed_without_a_weight(session: Session, right: Right) -> None:
    assert not any("v_norm" in name for name in tensors(session.model))
    rebuilt(session, lambda layer: replace(layer, attention=replace(layer.attention, v_norm=False)))
    assert wrong(session, right) > NOTICED


def test_trap_08_table_rows_carry_a_hidden_scale(session: Session, right: Right, monkeypatch: Patch) -> None:
    true = blocks.ple_context

    def plain(op: Any, w: Any, embedded: Any, rows: Any, layers: int, dim: int, width: int, eps: float) -> Any:
        return true(op, w, embedded, rows / width**0.5, layers, dim, width, eps)

    monkeypatch.setattr(altup, "ple_context", plain)
    assert wrong(session, right) > NOTICED


@pytest.mark.parametrize("mistake", ["scaled-stream", "added-to-stream-0", "unscaled"])
def test_trap_09_output_scale_and_stream_0(session: Session, right: Right, monkeypatch: Patch, mistake: str) -> None:
    true = altup.inject

    def inject(op: Any, a: Any, w: Any, h: Any, row: Any, activation: Any, dim: int, eps: float) -> Any:
        if mistake == "unscaled":
            return true(op, replace(a, scaled=False), w, h, row, activation, dim, eps)
        found = true(op, a, w, h, row, activation, dim, eps)
        if mistake == "scaled-stream":
            return torch.cat((found[:, :1] * w("altup.scale"), found[:, 1:]), 1)
        return torch.cat((found[:, :1] + (found - h)[:, 1:2], found[:, 1:]), 1)

    monkeypatch.setattr(altup, "inject", inject)
    assert wrong(session, right) > NOTICED


def test_trap_09_rows_go_to_the_streams_but_the_first_even_when_another_is_active(
    opened: Open, tmp_path: Path, monkeypatch: Patch
) -> None:
    raw = shrink(real(NAME))
    folder = make(tmp_path / "active", {**raw, "altup_active_idx": 2})
    session, ids = opened(folder), prompt(raw["vocab_size"], 12)
    logits = expected(reference(folder), ids)
    assert_close(session.logits(ids), logits)
    true = altup.inject

    def passive(op: Any, a: Any, w: Any, h: Any, row: Any, activation: Any, dim: int, eps: float) -> Any:
        found = true(op, a, w, h, row, activation, dim, eps)
        delta = found[:, 1:2] - h[:, 1:2]
        mask = torch.ones(1, a.streams, 1)
        mask[0, a.active] = 0.0
        return h + delta * mask

    monkeypatch.setattr(altup, "inject", passive)
    assert distance(session.logits(ids), logits) > NOTICED


def test_trap_10_prediction_coefficients_are_out_by_in(session: Session, right: Right, monkeypatch: Patch) -> None:
    def transposed(op: Any, a: Any, w: Any, h: Any, dim: int, eps: float) -> Any:
        x = altup.stream(op, h, a.active, dim)
        coefs = op.linear(altup.router(op, w, x, dim, eps), w("altup.predict")).view(-1, a.streams, a.streams)
        return h + op.matmul(coefs.transpose(1, 2), h)

    monkeypatch.setattr(altup, "predict", transposed)
    assert wrong(session, right) > NOTICED


@pytest.mark.parametrize("spelling", ["null", "absent"])
def test_trap_11_null_sparsity_means_the_published_pattern(spelling: str, opened: Open, tmp_path: Path) -> None:
    raw = {**shrink(real(NAME)), "activation_sparsity_pattern": None}
    if spelling == "absent":
        del raw["activation_sparsity_pattern"]
    folder = make(tmp_path / "null", raw)
    session, ids = opened(folder), prompt(raw["vocab_size"], 12)
    assert [layer.ffn.sparsity for layer in session.model.layers] == [0.95] * 10 + [0.0] * 5
    logits = expected(reference(folder), ids)
    assert_close(session.logits(ids), logits)
    rebuilt(session, lambda layer: replace(layer, ffn=replace(layer.ffn, sparsity=0.0)))
    assert distance(session.logits(ids), logits) > NOTICED


def test_trap_11_a_model_of_ten_layers_has_no_pattern() -> None:
    raw = shrink(real(NAME))
    raw.update(num_hidden_layers=10, num_kv_shared_layers=5, activation_sparsity_pattern=None)
    raw.update(layer_types=raw["layer_types"][:10], intermediate_size=64)
    assert {layer.ffn.sparsity for layer in parse(raw).layers} == {0.0}


@pytest.mark.parametrize("fill", [float("inf"), float("nan")])
def test_trap_12_vision_weights_are_never_read(
    fill: float, folders: Folder, opened: Open, right: Right, tmp_path: Path
) -> None:
    folder = variant(folders(NAME), tmp_path / "towers", makers.multimodal(fill))
    session = opened(folder)
    assert_close(session.logits(right[0]), right[1])
    assert session.checkpoint.skipped_bytes == makers.tower_bytes()
    assert session.checkpoint.shards.bytes_read == sum(t.nbytes for t in session.checkpoint.where.values())


@pytest.mark.parametrize("tier", ["device", "ram", "ssd"])
def test_trap_13_ids_beyond_the_table_use_row_0(tier: str, folders: Folder, opened: Open, monkeypatch: Patch) -> None:
    session = opened(folders(NAME), ple=tier)
    ple = session.model.ple
    assert ple is not None
    ids = np.array([5, ple.rows, session.model.vocab - 1, ple.rows - 1, 0, ple.rows + 3, 5])
    logits = expected(reference(folders(NAME)), ids)
    assert_close(session.logits(ids), logits)
    assert_close(steps(session, ids), logits)
    rows = session.engine.rows.gather(ids)
    raw = session.checkpoint.read_raw(PLE_TABLE).view(np.float32)
    inside = np.where(ids < ple.rows, ids, 0)
    assert rows.shape == (len(ids), len(session.model.layers), ple.dim)
    assert np.array_equal(rows.numpy().reshape(len(ids), -1), raw[inside])
    for module in ("edge.store.ple", "edge.engine.torch_ple"):
        monkeypatch.setattr(f"{module}.in_table", lambda ids, rows: np.minimum(ids, rows - 1))
    assert distance(session.logits(ids), logits) > NOTICED
    zero = session.engine.ple
    monkeypatch.setattr(session.engine, "ple", lambda ids: zero(ids) * torch.from_numpy(ids < ple.rows)[:, None, None])
    assert distance(session.logits(ids), logits) > NOTICED


def test_trap_15_a_chunk_brings_its_own_rows(session: Session, right: Right, monkeypatch: Patch) -> None:
    session.engine.chunk = 9
    assert_close(session.logits(right[0]), right[1])
    true = TorchEngine.ple
    monkeypatch.setattr(TorchEngine, "ple", lambda self, ids: true(self, right[0][: len(ids)]))
    assert wrong(session, right) > NOTICED


def test_trap_16_embeddings_are_scaled_on_the_way_in_only(session: Session, right: Right, monkeypatch: Patch) -> None:
    assert session.model.embed_scale == 64**0.5
    true = blocks.logits
    with monkeypatch.context() as patch:
        patch.setattr(altup, "logits", lambda op, head, x, cap: true(op, head * 64**0.5, x, cap))
        assert wrong(session, right) > NOTICED
    session.engine.model = replace(session.model, embed_scale=1.0)
    assert wrong(session, right) > NOTICED


def test_trap_18_rows_are_gathered_before_a_recorded_step(session: Session, right: Right, monkeypatch: Patch) -> None:
    """Inside a recorded graph a read on the host would happen once, when it is recorded, and never again."""
    from edge.engine.static import StaticStep

    true, inside = StaticStep.run, []

    def run(self: StaticStep, network: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(session.engine.rows, "gather", inside.append)
            return true(self, network)

    monkeypatch.setattr(StaticStep, "run", run)
    session.engine.graphs = True
    session.reset()
    session.step(right[0][:20])
    for i in range(20, LENGTH):
        assert_close(session.step(right[0][i : i + 1])[None], right[1][i : i + 1])
    assert not inside
    assert session.engine.rows.counters.rows >= LENGTH


@pytest.mark.parametrize("name", [NAME, "llama-3.2-1B", "qwen3-0.6B", "llama-3.1-8B"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_trap_20_a_tied_head_is_held_once(name: str, precision: str, folders: Folder, opened: Open) -> None:
    session = opened(folders(name), precision=precision)
    held = session.engine.weights
    assert set(held) == set(tensors(session.model)) - {PLE_TABLE}
    assert ("head" in held) == (not session.model.tied)
    assert len({t.data_ptr() for t in held.values()}) == len(held)
    nbytes = sum(t.nbytes for t in held.values())
    assert session.ledger.held()["weights"] == nbytes == session.plan.bytes["weights"]
    once = session.model.vocab * session.model.dim * (4 if precision == "float32" else 2)
    assert held["embed"].nbytes == once
    large = sum(t.nbytes for t in held.values() if t.shape == held["embed"].shape)
    assert large == once * (1 if session.model.tied else 2)


@pytest.mark.parametrize("name", [NAME, "llama-3.2-1B", "qwen3-0.6B", "llama-3.1-8B"])
def test_zeroing_any_one_tensor_changes_the_logits(name: str, folders: Folder, opened: Open) -> None:
    """That a tensor is loaded proves nothing; that it is wired, this does."""
    session = opened(folders(name))
    ids = prompt(session.model.vocab, 6)
    before = session.logits(ids)
    silent = []
    for tensor, value in session.engine.weights.items():
        session.engine.weights[tensor] = torch.zeros_like(value)
        if distance(session.logits(ids), before) <= NOTICED:
            silent.append(tensor)
        session.engine.weights[tensor] = value
    assert not silent
    assert np.array_equal(session.logits(ids), before)
    if session.model.ple is not None:
        session.engine.rows.table.raw[:] = 0
        assert distance(session.logits(ids), before) > NOTICED


@pytest.mark.parametrize("layer", range(15))
def test_rows_of_every_layer_reach_it(layer: int, folders: Folder, opened: Open, right: Right) -> None:
    session = opened(folders(NAME))
    width = session.model.ple.dim if session.model.ple else 0
    session.engine.rows.table.raw[:, layer * width : (layer + 1) * width] = 0
    assert wrong(session, right) > NOTICED


@pytest.mark.parametrize("prefill", [14, 15, 16, 17, 18, 31, 32, 33])
@pytest.mark.parametrize("chunk", [256, 5])
def test_window_edge(prefill: int, chunk: int, session: Session, right: Right) -> None:
    """One short of the window, the window, one more; and the second time round the ring."""
    ids, logits = right
    session.engine.chunk = chunk
    assert_close(session.step(ids[:prefill])[None], logits[prefill - 1 : prefill])
    for i in range(prefill, min(prefill + 4, LENGTH)):
        assert_close(session.step(ids[i : i + 1])[None], logits[i : i + 1])


@pytest.mark.parametrize("by", [-1, 1])
def test_window_counts_the_query_itself(by: int, session: Session, right: Right) -> None:
    def moved(layer: Any) -> Any:
        window = layer.attention.window
        return replace(layer, attention=replace(layer.attention, window=None if window is None else window + by))

    rebuilt(session, moved)
    found = session.logits(right[0])
    assert_close(found[:15], right[1][:15])
    assert distance(found, right[1]) > NOTICED


@pytest.mark.parametrize("name", [NAME, "gemma-3n-E4B", "llama-3.2-1B", "qwen3-8B"])
@pytest.mark.parametrize("split", [1, 11, 16, 30])
def test_filling_the_cache_without_logits(name: str, split: int, folders: Folder, opened: Open) -> None:
    """ "none" stops at the last layer that writes keys; nothing that comes later may miss what it left out."""
    session = opened(folders(name))
    model = reference(folders(name))
    ids = prompt(session.model.vocab, LENGTH)
    logits = expected(model, ids)
    nothing = session.engine.forward(ids[:split], "none")
    assert nothing.shape == (0, session.model.vocab)
    assert session.engine.position == split
    assert_close(session.engine.forward(ids[split:], "last"), logits[-1:])
    session.reset()
    session.engine.forward(ids[:split], "none")
    assert_close(session.engine.forward(ids[split:], "all"), logits[split:])
