"""Measured Mix'n'Match: the search is exact, never over its budget, and finds what was planted in a model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge
import edge.calibrate as calibrating
from edge.budget.plan import Floor, Request, enumerate_plans
from edge.calibrate import Calibration, bench, calibrate
from edge.calibrate.bench import NOISE, Bench
from edge.calibrate.model import UNIT, Ends, Prediction, curve, filled
from edge.calibrate.space import Space, cost_of, knapsack, ranges, slice_of, widths_of
from edge.corpus import Text
from edge.evaluate import Score, evaluate
from edge.session import Session
from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, Unsupported, Usage, WontFit
from loaders.formats.recipe import Recipe, recipes
from loaders.formats.window import Window
from loaders.network.matformer import Slice
from loaders.slices import resolve
from tests.small import GEMMA3N, TEXTS, built, write

LAYERS = 4
SMALL: dict[str, Any] = {**GEMMA3N, "num_hidden_layers": LAYERS, "num_kv_shared_layers": 2} | {
    key: GEMMA3N[key][1 : LAYERS + 1] for key in ("layer_types", "intermediate_size", "activation_sparsity_pattern")
}
FLOOR = Floor(300 << 20, tokenizer=1 << 20)
# One without sparsity, whose threshold would depend on the width.
PLANTED, WIDTH, NEEDED = 2, 128, 32


@pytest.fixture(autouse=True)
def floor_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured of this machine."""

    def known(source: Any, request: Request, device: str, engine: str) -> tuple[Floor, Request]:
        return FLOOR, replace(request, device="cpu", engine="torch")

    monkeypatch.setattr(calibrating, "plan_floor", known)


@pytest.fixture(scope="module", name="home")
def home_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="module", name="small")
def small_fixture(home: Path) -> Path:
    """Four layers of 128, 64 or 32, the last two of which may be skipped; layer 2 never uses but 32."""
    folder = write(home / "small", SMALL)
    checkpoint = Checkpoint.open(folder)
    placed = checkpoint.where[f"layers.{PLANTED}.ffn.down"].plain
    assert placed is not None
    path, window = folder / "model.safetensors", Window.full(placed.shape)
    values = np.empty(placed.shape, np.uint32)
    checkpoint.shards.read_window(placed, window, values)
    checkpoint.close()
    data, before = bytearray(path.read_bytes()), values.tobytes()
    values[:, NEEDED:] = 0
    at = data.index(before)
    data[at : at + len(before)] = values.tobytes()
    path.write_bytes(data)
    return folder


@cache
def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder)


@cache
def space(folder: Path, precision: str = "bf16", which: int = 0, context: int = 512, step: int | None = None) -> Space:
    recipe = recipes(precision)[which]
    return Space(opened(folder), recipe, Request(precision=precision, context=context), FLOOR, step=step)


@cache
def every(folder: Path) -> tuple[Slice, ...]:
    """All slices of the small model that there are to choose from."""
    found = space(folder)
    widths = list(itertools.product(*found.grid))
    return tuple(dict.fromkeys(slice_of(found.model, w, skip) for skip in found.skips for w in widths))


@cache
def totals(folder: Path) -> dict[Slice, int]:
    return {part: space(folder).total(part) for part in every(folder)}


Items = list[list[tuple[int, int]]]
choices = st.lists(st.tuples(st.integers(0, 20), st.integers(-20, 20)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=100)
@given(st.lists(choices, max_size=5), st.integers(-1, 70))
def test_the_knapsack_is_exact(items: Items, room: int) -> None:
    def weigh(picked: tuple[int, ...]) -> tuple[int, int]:
        pairs = [item[k] for item, k in zip(items, picked, strict=True)]
        return sum(cost for _, cost in pairs), sum(size for size, _ in pairs)

    ways = itertools.product(*(range(len(item)) for item in items))
    fitting = [weigh(way) for way in ways if weigh(way)[1] <= room]
    picked = knapsack(items, room)
    assert (picked is None) == (not fitting)
    if picked is not None:
        assert weigh(picked) == min(fitting)


costs = st.lists(st.lists(st.integers(-50, 200), min_size=3, max_size=3), min_size=LAYERS, max_size=LAYERS)


@settings(deadline=None, max_examples=40)
@given(losses=costs, share=st.floats(-0.1, 1.1), skips=st.booleans())
def test_the_cheapest_slice_within_a_budget_is_found(
    small: Path, losses: list[list[int]], share: float, skips: bool
) -> None:
    found = space(small)
    table = [dict(zip(grid, layer, strict=True)) for grid, layer in zip(found.grid, losses, strict=True)]
    sizes = totals(small)
    low, high = min(sizes.values()), max(sizes.values())
    budget, skip = int(low + share * (high - low)), found.skips[-1] if skips else ()
    fitting = [p for p in every(small) if sizes[p] <= budget and found.skipped(p) == skip]
    part = found.solve(table, budget, skip)
    assert (part is None) == (not fitting)
    if part is not None:
        assert sizes[part] <= budget
        assert cost_of(table, part) == min(cost_of(table, p) for p in fitting)
        assert found.solve(table, budget, skip) == part
        for other in (*found.alternatives(table, part, budget)[:3], *found.neighbours(part, budget)):
            assert other != part
            assert sizes[other] <= budget


RUNS = [("float32", 0), ("bf16", 0), ("int8", 0), ("int4", 0), ("int4", 1)]


@pytest.mark.parametrize(("precision", "which"), RUNS)
def test_bytes_are_the_planners_own(small: Path, precision: str, which: int) -> None:
    rng = np.random.default_rng(which)
    found, fine = space(small, precision, which), space(small, precision, which, step=48)
    for part in rng.permutation(np.array(every(small), dtype=object))[:12]:
        request = Request(precision=precision, context=512, slice=part.name)
        plans = [p for p in enumerate_plans(opened(small), request, FLOOR) if p.recipe == found.recipe]
        assert plans[0].part.widths == part.widths
        least = min(plan.total_bytes for plan in plans)
        assert found.total(part) == found.bytes(part) == least
    for _ in range(8):
        part = slice_of(fine.model, [int(rng.choice(grid)) for grid in fine.grid])
        assert fine.total(part) <= fine.bytes(part)


def test_a_model_of_more_layers_adds_up_too() -> None:
    """Layers of both kinds of attention, some of which write no keys; what is skipped lies in the middle."""
    found, rng = space(built("gemma3n")), np.random.default_rng(0)
    assert found.skips == ((), (6, 7, 8))
    for skip in found.skips:
        for _ in range(6):
            part = slice_of(found.model, [int(rng.choice(grid)) for grid in found.grid], skip)
            assert found.total(part) == found.bytes(part)


def test_a_slice_has_a_name_that_means_it(small: Path) -> None:
    checkpoint = opened(small)
    for part in every(small):
        named = resolve(checkpoint.model, checkpoint.family, part.name)
        assert (named.keep, named.widths) == (part.keep, part.widths)
    assert slice_of(checkpoint.model, (128,) * LAYERS).name == "full"
    assert slice_of(checkpoint.model, (128, 64, 64, 32), (2, 3)).name == "ffn=128,64+skip=2-3"
    assert ranges([15, 10, 11, 12]) == "10-12,15"


def test_steps_lie_between_trained_widths(small: Path) -> None:
    model = opened(small).model
    assert widths_of(model) == ((32, 64, 128),) * LAYERS
    assert widths_of(model, 48) == ((32, 48, 64, 96, 128),) * LAYERS
    with pytest.raises(Usage, match="at most 32 widths"):
        widths_of(model, 2)
    with pytest.raises(Unsupported, match="not MatFormers"):
        widths_of(opened(built("llama")).model)


def test_one_width_throughout_is_as_wide_as_fits(small: Path) -> None:
    found = space(small)
    for width in (32, 64, 96, 128):
        part = slice_of(found.model, [width] * LAYERS)
        assert found.between(found.total(part)) == part
        assert found.between(found.total(part) + 100) == part
    assert found.between(found.total(found.uniform(0)) - 1) is None


# What a slice is predicted to lose


@settings(deadline=None)
@given(st.floats(0, 3), st.floats(0, 3))
def test_the_curve_never_turns_back(first: float, last: float) -> None:
    heights = [curve(x / 50, first, last) for x in range(51)]
    assert (heights[0], heights[-1]) == (0.0, pytest.approx(1.0))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(heights))


def test_a_prediction_is_what_was_measured_at_both_ends(small: Path) -> None:
    found = space(small)
    narrowed = [{32: 0.2 * (i + 1), 64: 0.1, 128: 0.0} for i in range(LAYERS)]
    widened = [{32: 0.5, 64: 0.3, 128: 0.0} for _ in range(LAYERS)]
    predict = Prediction(Ends(3.0, 5.0, (3.5, 5.25)), narrowed, widened)
    ends = [predict(found.uniform(level, skip)) for skip in found.skips for level in (-1, 0)]
    assert ends == pytest.approx([3.0, 5.0, 3.5, 5.25])
    assert sum(cost[32] for cost in predict.costs) == pytest.approx(UNIT, abs=LAYERS)
    assert [cost[32] for cost in predict.costs] == sorted(cost[32] for cost in predict.costs)
    assert 3.0 < predict(found.uniform(1)) < 5.0
    assert filled({32: 4.0, 64: 2.0, 128: 0.0}, (32, 48, 64, 96, 128)) == {32: 4.0, 48: 3.0, 64: 2.0, 96: 1.0, 128: 0.0}


def test_losses_without_sense_still_predict(small: Path) -> None:
    """A model that knows nothing may lose less where it is narrow."""
    none = [dict.fromkeys((32, 64, 128), -0.1) for _ in range(LAYERS)]
    predict = Prediction(Ends(5.0, 4.0), none, none)
    assert all(4.0 <= predict(part) <= 5.0 for part in every(small))


# Measuring


@pytest.fixture(name="pretend")
def pretend_fixture(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Losses from a formula instead of runs: early layers need their width most; the held-out text is harder."""
    asked: list[tuple[str, int]] = []

    def run(self: Bench, part: Slice, which: int) -> Score:
        asked.append((part.name, which))
        layers = {2**-i: 1 - w / WIDTH for i, w in zip(part.keep, part.widths, strict=True)}
        lost = sum(weight * lacks for weight, lacks in layers.items()) + 3 * (LAYERS - len(part.keep))
        self.measured[part.name] = object()  # type: ignore[assignment]
        return Score(100, 300, 3 + lost + which, None, None, 0.1, 64, 64)

    monkeypatch.setattr(Bench, "run", run)
    return asked


@pytest.fixture(scope="module", name="text")
def text_fixture(home: Path) -> Path:
    path = home / "text.txt"
    path.write_text(" ".join(TEXTS * 8))
    return path


def size(folder: Path, part: Slice, found: Calibration) -> int:
    return next(point.bytes for point in found.points if point.part.widths == part.widths)


def test_widths_go_where_they_are_needed(small: Path, text: Path, pretend: list[tuple[str, int]]) -> None:
    curve = calibrate(small, text, points=4, tokens=256)
    assert len(pretend) == len(set(pretend)) == curve.evaluations
    winners = [choice.winner for choice in curve.choices]
    assert winners[-1].part.name == "full"
    assert winners[0].part == slice_of(opened(small).model, (32,) * LAYERS, (2, 3))
    for choice, winner in zip(curve.choices, winners, strict=True):
        assert winner.bytes <= choice.budget
        assert all(point.bytes <= choice.budget for point in choice.uniforms)
        assert winner.held == pytest.approx(winner.loss + 1)
        assert winner.loss <= min(p.loss for p in curve.points if p.bytes <= choice.budget) + NOISE
        assert choice.gain is not None
        assert choice.gain >= 0
        assert list(winner.part.widths) == sorted(winner.part.widths, reverse=True)
    assert [w.loss for w in winners] == sorted((w.loss for w in winners), reverse=True)
    assert sum(choice.gain or 0 for choice in curve.choices) > 0.1
    assert [p.bytes for p in curve.points] == sorted(p.bytes for p in curve.points)
    assert {p.kind for p in curve.points} == {"full", "uniform", "layer", "mix"}
    first = {s.layers: s for s in curve.sensitivities if s.width == 64}
    assert [first[i,].narrowed for i in range(LAYERS)] == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    assert [s.layers for s in curve.sensitivities if s.width == 0] == [(2, 3)]
    full, half = (size(small, slice_of(opened(small).model, [w] * LAYERS), curve) for w in (128, 64))
    assert sum(s.saved for s in first.values()) <= full - half


def test_the_same_input_gives_the_same_slices(small: Path, text: Path, pretend: list[tuple[str, int]]) -> None:
    budget = space(small).total(space(small).uniform(1)) + (64 << 20)
    runs = [calibrate(small, text, budget=budget, tokens=256, effort=6).as_dict() for _ in range(2)]
    assert runs[0] == runs[1]
    assert json.loads(json.dumps(runs[0])) == runs[0]
    assert len(runs[0]["choices"]) == 1
    assert len(pretend) == 2 * runs[0]["evaluations"]


def test_of_slices_that_are_as_good_the_largest_is_taken(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text cannot tell them apart, and bytes below a budget are worth nothing: all of it."""

    def run(self: Bench, part: Slice, which: int) -> Score:
        self.measured[part.name] = object()  # type: ignore[assignment]
        loss = 3 + (LAYERS - len(part.keep)) + NOISE / 2 * (sum(part.widths) % 5) / 5
        return Score(100, 300, loss, None, None, 0.1, 64, 64)

    monkeypatch.setattr(Bench, "run", run)
    found = calibrate(small, text, budget="1GB", tokens=256)
    assert found.choices[0].winner.part == space(small).uniform(-1)


def test_effort_bounds_what_is_measured(small: Path, text: Path, pretend: list[tuple[str, int]]) -> None:
    counts = []
    for effort in (1, 8):
        pretend.clear()
        found = calibrate(small, text, points=3, tokens=256, effort=effort)
        counts.append(sum(point.kind == "mix" for point in found.points))
        assert counts[-1] <= 3 * effort
    assert counts[0] < counts[1]


def test_finer_steps_are_no_worse(small: Path, text: Path, pretend: list[tuple[str, int]]) -> None:
    coarse, fine = (calibrate(small, text, points=4, tokens=256, effort=6, step=step) for step in (None, 16))
    for a, b in zip(coarse.choices, fine.choices, strict=True):
        assert (b.budget, b.winner.bytes <= b.budget) == (a.budget, True)
    assert sum(c.winner.loss for c in fine.choices) <= sum(c.winner.loss for c in coarse.choices)
    assert any(set(c.winner.part.widths) - {32, 64, 128} for c in fine.choices)


def test_a_layer_that_does_not_need_its_width_is_found(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By real runs. A model of noise predicts nothing: its loss is how far it is from what the full model predicts, in
    thousandths of a nat.
    """
    with edge.load(small, precision="float32", slice="full", context=2048) as full:

        def distance(session: Session, words: Text, **window: int) -> Score:
            score = evaluate(session, words, reference=full, **window)
            assert score.kl is not None
            return replace(score, loss=round(1000 * max(0.0, score.kl), 3))

        monkeypatch.setattr(bench, "evaluate", distance)
        first = calibrate(small, text, points=2, precision="float32", effort=1, tokens=128)
        narrow = slice_of(opened(small).model, [NEEDED if i == PLANTED else WIDTH for i in range(LAYERS)])
        budget = size(small, narrow, first)
        found = calibrate(small, text, budget=budget, precision="float32", effort=2, tokens=128)
    costs = {s.layers[0]: s.narrowed for s in first.sensitivities if s.width == NEEDED}
    assert costs.pop(PLANTED) == pytest.approx(0, abs=NOISE)
    assert min(costs.values()) > 10 * NOISE
    winner = found.choices[0].winner
    assert (winner.part, winner.bytes) == (narrow, budget)
    assert winner.loss == pytest.approx(0, abs=NOISE)
    assert found.recipe == Recipe("float32", "float32")
    gain = found.choices[0].gain
    assert gain is not None
    assert gain > 10 * NOISE
    kept = {result.name: result for result in found.measured}
    assert {"full", winner.part.name} <= kept.keys()
    assert kept[winner.part.name].loss == winner.loss
    assert len({(result.text, result.context, result.tokens) for result in found.measured}) == 1


# What is refused


def test_a_budget_below_the_narrowest_says_what_it_takes(small: Path, text: Path) -> None:
    with pytest.raises(WontFit, match="nothing fits --budget") as info:
        calibrate(small, text, budget=100)
    assert info.value.needed > 100
    with pytest.raises(WontFit, match=f"Give at least --budget {info.value.needed}"):
        calibrate(small, text, budget=info.value.needed - 1, precision="bf16")


def test_a_text_that_is_too_short_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("once upon a time")
    with pytest.raises(BadCheckpoint, match="64 tokens or more"):
        calibrate(small, tmp_path / "short.txt")


@pytest.mark.parametrize("bad", [{"points": 1}, {"tokens": 3}, {"effort": 0}, {"step": 0}, {"budget": "no"}])
def test_numbers_without_sense_are_refused(small: Path, text: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        calibrate(small, text, **bad)


def test_a_model_without_slices_is_refused(text: Path) -> None:
    with pytest.raises(Unsupported, match="llama models are not MatFormers"):
        calibrate(built("llama"), text)
