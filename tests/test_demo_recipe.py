"""The recipe of the demo model: what it trains is what edge runs, and a run goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Muon

import edge
from benchmarks.demo_model import draw, ops, prepare, shape, state, train
from benchmarks.demo_model.network import Network, Params, axis_of, initial, whole
from benchmarks.demo_model.optimizers import RecordedMuon, schedule
from loaders.network.spec import Model
from loaders.network.tensors import flat, tensors
from tests import makers
from tests.shared import DEMO

VOCAB, WIDTHS, WINDOW, LENGTH = 256, (32, 64, 128), 32, 96
SMALL: dict[str, Any] = {
    **shape.read_config(shape.CONFIG),
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "hidden_size": 32, "hidden_size_per_layer_input": 32,
    "intermediate_size": [WIDTHS[-1]] * 12, "num_attention_heads": 2, "head_dim": 32, "sliding_window": WINDOW,
}  # fmt: skip
# One to train a few steps of.
TINY = SMALL | {
    key: SMALL[key][:6] for key in ("layer_types", "intermediate_size", "activation_sparsity_pattern")
} | {"num_hidden_layers": 6, "num_kv_shared_layers": 3}  # fmt: skip
CPU = torch.device("cpu")
# A slice's name, the width of each of the twelve layers, whether layers are skipped.
SLICES: dict[str, tuple[list[int], bool]] = {
    "full": ([128] * 12, False),
    "half": ([64] * 12, False),
    "quarter": ([32] * 12, False),
    "ffn=128x3,32x4,64x5": ([128] * 3 + [32] * 4 + [64] * 5, False),
    "ffn=77x12": ([77] * 12, False),
    "full+skip-first-shared": ([128] * 12, True),
    "quarter+skip-first-shared": ([32] * 12, True),
}


@pytest.fixture(scope="module", name="small")
def small_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json of the demo, shrunk."""
    path = tmp_path_factory.mktemp("recipe") / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


@pytest.fixture(scope="module", name="model")
def model_fixture(small: Path) -> Model:
    return shape.read_model(small)


@pytest.fixture(scope="module", name="params")
def params_fixture(model: Model) -> Params:
    """Every tensor random, and such as bf16 holds."""
    generator, found = torch.Generator().manual_seed(0), initial(model, torch.Generator().manual_seed(1))
    shapes = {name: flat(size) for name, size in tensors(model).items()}
    assert {name: tuple(tensor.shape) for name, tensor in whole(found).items()} == shapes
    for blocks in found.values():
        for i, block in enumerate(blocks):
            noise = torch.randn(block.shape, generator=generator)
            value = noise * block.shape[1] ** -0.5 if block.ndim == 2 else 1 + noise * 0.2
            blocks[i] = value.bfloat16().float().requires_grad_()
    return found


@pytest.fixture(scope="module", name="networks")
def networks_fixture(model: Model) -> list[Network]:
    """With all layers, and without those that may be skipped."""
    return [Network(model, LENGTH, CPU, torch.float32, skip) for skip in (False, True)]


def ids_of(batch: int, length: int = LENGTH) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (batch, length)))


# What is trained is what runs


@pytest.fixture(scope="module", name="folder")
def folder_fixture(params: Params, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("checkpoint")
    (home / "tokenizer.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "SHARD", 300_000)
        state.save_checkpoint(home / "model", params, home / "tokenizer.json", small)
    (home / "model" / "tokenizer.json").unlink()
    return home / "model"


def test_edge_gives_the_logits_that_were_trained(folder: Path, params: Params, networks: list[Network]) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids = ids_of(len(SLICES))
    units = torch.tensor([widths for widths, _ in SLICES.values()])
    with torch.no_grad():
        both = [network.logits(params, ids, units).view(len(SLICES), LENGTH, VOCAB).numpy() for network in networks]
    for i, (name, (_, skip)) in enumerate(SLICES.items()):
        # Of gates of 32 values one is left: what the last bit of a sum is there, a norm makes a thousand times larger.
        for engine in ("torch",) if name.startswith("quarter") else ("torch", "native"):
            with edge.load(folder, precision="float32", slice=name, context=LENGTH, engine=engine) as session:
                makers.assert_close(session.logits(ids[i].numpy()), both[skip][i])


def test_a_sequence_does_not_see_the_others(params: Params, networks: list[Network]) -> None:
    ids, units = ids_of(2), torch.tensor([[32] * 12, [128] * 6 + [64] * 6])
    for network in networks:
        with torch.no_grad():
            together = network.logits(params, ids, units)
            alone = [network.logits(params, ids[i : i + 1], units[i : i + 1]) for i in range(2)]
        makers.assert_close(torch.cat(alone).numpy(), together.numpy())


@given(st.integers(1, 4), st.sampled_from([1, 2, 8]), st.integers(1, 3), st.sampled_from([1, 4]))
@settings(deadline=None, max_examples=25)
def test_windows_one_by_one_are_attention_with_a_window(blocks: int, window: int, batch: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(blocks)
    q, k, v = (torch.randn(batch, blocks * window, n, 8, generator=generator) for n in (heads, 1, 1))
    want = ops.everything(q, k, v, 0.3, window)
    assert torch.allclose(ops.local(q, k, v, 0.3, window), want, atol=1e-6)


@pytest.mark.parametrize("length", [WINDOW, LENGTH, LENGTH + 5])
def test_any_length_gives_the_same(params: Params, model: Model, networks: list[Network], length: int) -> None:
    """Those of whole windows go another way than the others."""
    ids, units = ids_of(1, LENGTH + 5), torch.tensor([[64] * 12])
    with torch.no_grad():
        other = Network(model, length, CPU, torch.float32).logits(params, ids[:, :length], units)
        want = networks[0].logits(params, ids[:, :LENGTH], units)
    count = min(length, LENGTH)
    makers.assert_close(other[:count].numpy(), want[:count].numpy())


def gradients(params: Params, network: Network, width: int) -> dict[str, list[Tensor]]:
    """By name, of each block, for a batch of that width throughout."""
    for blocks in params.values():
        for block in blocks:
            block.grad = None
    ids = ids_of(2)
    network.loss(params, ids, ids.roll(-1, 1), torch.full((2, 12), width)).backward()
    return {
        name: [torch.zeros_like(b) if b.grad is None else b.grad for b in blocks] for name, blocks in params.items()
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_reach_what_is_used_and_nothing_else(params: Params, networks: list[Network], width: int) -> None:
    for name, blocks in gradients(params, networks[0], width).items():
        for i, grad in enumerate(blocks):
            assert torch.isfinite(grad).all()
            used = axis_of(name) is None or WIDTHS[i] <= width
            assert bool(grad.any()) == used, (name, i)


def test_layers_that_are_skipped_learn_nothing(params: Params, model: Model, networks: list[Network]) -> None:
    assert model.nested is not None
    skipped = tuple(f"layers.{i}." for i in model.nested.skippable)
    assert len(skipped) == 2
    for name, blocks in gradients(params, networks[1], WIDTHS[-1]).items():
        assert all(bool(grad.any()) != name.startswith(skipped) for grad in blocks), name


# What a step sees

PARAGRAPHS = np.arange(50, 9_990, 130)


def drawn(model: Model, step: int, full: float = 0.5, seed: int = 0) -> draw.Step:
    return draw.draw(model, 10_000, PARAGRAPHS, 16, 100, seed, step, full)


def test_a_draw_depends_on_seed_and_step_alone(model: Model) -> None:
    for step in (0, 7):
        first, again = drawn(model, step), drawn(model, step)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(drawn(model, 1).starts, drawn(model, 2).starts)
    assert not np.array_equal(drawn(model, 1).starts, drawn(model, 1, seed=1).starts)


def test_all_kinds_of_sub_models_are_drawn(model: Model) -> None:
    steps = [drawn(model, step) for step in range(300)]
    units = np.concatenate([step.units for step in steps])
    assert units.shape == (300 * 16, 12)
    uniform = (units == units[:, :1]).all(1)
    shares = {width: float((uniform & (units[:, 0] == width)).mean()) for width in WIDTHS}
    assert shares == pytest.approx({32: 0.125, 64: 0.125, 128: 0.5}, abs=0.02)
    assert set(np.unique(units[~uniform])) == set(WIDTHS)
    assert np.mean([step.skip for step in steps]) == pytest.approx(draw.SKIP, abs=0.06)


def test_the_dense_run_is_never_narrowed(model: Model) -> None:
    steps = [drawn(model, step, full=1) for step in range(50)]
    assert all((step.units == WIDTHS[-1]).all() and not step.skip for step in steps)


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(2, 300))
@settings(deadline=None, max_examples=40)
def test_windows_stay_in_the_text(model: Model, seed: int, step: int, length: int) -> None:
    found = draw.draw(model, 400, np.array([3, 200, 390, 400]), 8, length, seed, step, 0.5)
    text = train.Text(np.arange(400), length, CPU)
    ids, targets = text.at(found.starts)
    assert targets[:, 0].tolist() == found.starts.tolist()
    assert (targets[:, -1] - targets[:, 0] == length - 1).all()
    assert (ids[:, 0] == train.BOS).all()
    assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_half_of_the_windows_begin_a_paragraph(model: Model) -> None:
    starts = np.concatenate([drawn(model, step).starts for step in range(100)])
    assert np.isin(starts, PARAGRAPHS).mean() == pytest.approx(draw.AT_PARAGRAPH, abs=0.04)


# How it learns


def test_recorded_muon_is_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 24), (24, 8), (16, 16))
    mine = [torch.randn(size, generator=generator).requires_grad_() for size in shapes]
    theirs = [m.detach().clone().requires_grad_() for m in mine]
    recorded = RecordedMuon(mine, 0.1, 0.2)
    muon = Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for m in mine:
        m.grad = torch.zeros_like(m)
    for step in range(8):
        rate = 0.1 * schedule(step, 8, 3)
        recorded.param_groups[0]["lr"] = muon.param_groups[0]["lr"] = rate
        before = [m.detach().clone() for m in mine]
        for a, b in zip(mine, theirs, strict=True):
            b.grad = torch.randn(a.shape, generator=generator)
            assert a.grad is not None
            a.grad.copy_(b.grad)
        recorded.step()
        muon.step()
        for a, b, old in zip(mine, theirs, before, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
            assert not torch.equal(a, old)


@pytest.mark.parametrize(("steps", "warmup"), [(3500, 100), (6, 1), (2, 1)])
def test_the_rate_goes_up_and_then_down_to_nearly_nothing(steps: int, warmup: int) -> None:
    shares = [schedule(step, steps, warmup) for step in range(steps)]
    top = int(np.argmax(shares))
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert 0 < min(shares) <= max(shares) <= 1
    assert shares[-1] == 1 / (steps - warmup)


Args = Callable[[str, int], argparse.Namespace]


@pytest.fixture(name="args")
def args_fixture(tmp_path: Path) -> Args:
    """A few steps on a text of random tokens, written where the caller says."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    for name, count in (("tales", 1500), ("heldout", 140)):
        np.save(data / f"{name}.npy", rng.integers(3, VOCAB, count).astype(np.uint16))
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "Ċ": 3, ".Ċ": 4, "a": 5}
    (data / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    flags = ("--config", str(config), "--batch", "2", "--length", "64", "--device", "cpu", "--no-compile")

    def args(out: str, steps: int) -> argparse.Namespace:
        return train.parser().parse_args([str(data), "-o", str(tmp_path / out), *flags, "--steps", str(steps)])

    return args


class Stopped(Exception):
    pass


class Stopping(train.Run):
    """One that ends in its fifth step, with the state of the third saved."""

    def step(self, step: int) -> Tensor:
        if step == 4:
            raise Stopped
        return super().step(step)


def logged(out: Path) -> list[dict[str, Any]]:
    """The log, without the time everything took."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def run(args: argparse.Namespace, kind: type[train.Run] = train.Run) -> None:
    """The command, in a process that may have done anything before."""
    kind(args, shape.read_model(args.config)).go()


def test_a_run_goes_on_where_it_was_stopped(args: Args, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOSS_EVERY", 1), ("HELDOUT_EVERY", 3), ("SAVE_EVERY", 3)):
        monkeypatch.setattr(train, name, value)
    once, twice = args("once", 6), args("twice", 6)
    run(once)
    with pytest.raises(Stopped):
        run(twice, Stopping)
    assert [line["step"] for line in logged(twice.out)] == [1, 2, 3, 3, 4]
    run(twice)
    assert logged(twice.out) == logged(once.out)
    assert [line["step"] for line in logged(once.out)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert set(logged(once.out)[-1]["final"]) == {
        *(f"{name}{skip}" for name in ("full", "half", "quarter") for skip in ("", "+skip-first-shared")),
        "table zeroed",
    }
    names = [str(path.relative_to(once.out)) for path in once.out.rglob("*.safetensors")]
    assert state.STATE in names
    for name in names:
        one, other = load_file(once.out / name), load_file(twice.out / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items()), name
    assert not list(twice.out.rglob("*.tmp"))


def test_a_run_that_is_done_says_so_once(args: Args) -> None:
    for _ in range(2):
        run(args("out", 2))
    lines = [json.dumps(line) for line in logged(args("out", 2).out)]
    assert len(set(lines)) == len(lines)


def test_a_checkpoint_has_the_shape_that_was_trained(args: Args) -> None:
    run(args("out", 2))
    assert shape.read_config(args("out", 2).out / "model" / "config.json") == TINY


# What ships


def test_the_demo_has_the_shape_of_the_recipe() -> None:
    assert shape.read_config(DEMO / "config.json") == shape.read_config(shape.CONFIG)


def test_the_demo_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 24_000_000


# Its vocabulary

LINES = [
    "Once upon a time there was a miller who had three sons, and the youngest was called Hans.",
    '"Who are you?" said the king; "and what do you want here?"',
    "He gave her 3 apples & a caf\u00e9 — \u201cnothing more\u201d, she said.",
    "The old woman went into the wood, and the wood was dark\t and  deep.",
]
TEXT = "\n".join(LINES * 8) + "\n"


def test_text_comes_back_from_its_tokens() -> None:
    tokenizer = prepare.train_tokenizer(TEXT, 320)
    assert tokenizer.get_vocab_size() == 320
    for text in (TEXT, "Never seen: \u65e5\u672c \U0001f389\n", ""):
        found = tokenizer.encode(text).ids
        assert found[0] == prepare.BOS == train.BOS
        assert tokenizer.decode(found) == text
        assert prepare.encode(tokenizer, text + "\n").tolist() == tokenizer.encode(text + "\n").ids[1:]


@pytest.mark.parametrize("piece", [1, 100, 700, 1 << 20])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = prepare.train_tokenizer(TEXT, 400)
    monkeypatch.setattr(prepare, "PIECE", piece)
    for text in (TEXT, TEXT.rstrip()):
        pieces = list(prepare.paragraphs(text))
        assert "".join(pieces) == text
        assert (len(pieces) > 1) == (piece < len(text))
        found = prepare.encode(tokenizer, text)
        assert found.dtype == np.uint16
        assert found.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
