"""What was measured of the demo, as it lies in the repository: slices and precisions that earn their bytes, figures
that the planner still gives, and nothing of the machine that measured.

Results are asserted where they are there; what makes them is tested always.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plots, quality, readme
from edge.budget.plan import Floor, Request, enumerate_plans
from edge.calibrate.bench import NOISE
from edge.session import open_source
from loaders.formats.measured import load
from loaders.weights import Source
from tests.shared import DEMO

WIDTHS = ("full", "half", "quarter")
SKIP = "skip-first-shared"
EARNED, TABLE = 0.02, 0.3
# The share of bf16's loss that a precision may add.
MORE = {"int8": 0.005, "int4": 0.03}


def lines_of(name: str) -> list[dict[str, Any]]:
    """Results of the demo."""
    return [line for line in readme.lines_of(name) if line.get("model", "demo") == "demo"]


LINES, BUDGETS = lines_of("quality"), lines_of("demo_budgets")
SLICES = {(line["slice"], line["precision"], line["head"]): line for line in LINES if line["case"] == "slice"}


@pytest.fixture(scope="module")
def source() -> Iterator[Source]:
    found = open_source(DEMO)
    yield found
    found.close()


def skipped(width: str, skip: bool) -> str:
    """The name of a slice."""
    return (SKIP if width == "full" else f"{width}+{SKIP}") if skip else width


class Engine:
    """Answers with how often it was asked."""

    def __init__(self) -> None:
        self.engine, self.asked = self, 0

    def forward(self, ids: np.ndarray, which: str, ahead: Any) -> np.ndarray:
        self.asked += 1
        return np.full((len(ids), 2), self.asked, np.float32)


def test_what_is_compared_with_is_computed_once() -> None:
    engine, pieces = Engine(), [np.arange(3), np.arange(2), np.arange(3)]
    memory: Any = quality.Remembered(engine)  # type: ignore[arg-type]
    first = [engine.forward(ids, "all", ()) for ids in pieces]
    for _ in range(2):
        memory.rewind()
        again = [engine.forward(ids, "all", ()) for ids in pieces]
        assert all(map(np.array_equal, first, again))
    assert engine.asked == len(pieces)
    memory.rewind()
    with pytest.raises(AssertionError, match="another text"):
        engine.forward(pieces[1], "all", ())


def test_widths_between_are_those_that_nobody_trained(source: Source) -> None:
    assert quality.between(source.model) == [f"ffn={width}x12" for width in (96, 160, 192, 224)]


def made(case: str, name: str, head: str = "bf16", layers: int = 12, **more: Any) -> dict[str, Any]:
    """A line of results."""
    size = {
        "keep": list(range(layers)),
        "widths": [256] * layers,
        "planned_bytes": 300 << 20,
        "weights_bytes": 13 << 20,
    }
    score = {"loss": 3.0, "kl": 0.1, "top1": 0.9, "bits_per_byte": 1.2, "text": "0" * 64}
    text = {"tokens": 64, "context": 32, "stride": 32}
    about = {"file": "text", "machine": "x86_64", "cores": 2, "date": "2026-01-01"}
    return {"case": case, "slice": name, "precision": "bf16", "head": head, **size, **score, **text, **about, **more}


def test_the_readme_shows_every_slice_and_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [made("slice", "full"), made("slice", "half", loss=3.3, decode_tps=9.6, peak_bytes=1 << 20)]
    lines += [made("table", "full", table="zeroed", loss=4.5), made("table", "full", table="int8", loss=3.03)]
    monkeypatch.setattr(readme, "lines_of", lambda name: lines)
    shown = readme.quality()
    assert "| `full` | bf16 | 315 MB | - | 13.6 MB | 3.0000 | +0.00% | 0.1000 | 90.0% | - |" in shown
    assert "| `half` | bf16 | 315 MB | 1.05 MB | 13.6 MB | 3.3000 | +10.00% | 0.1000 | 90.0% | 10 |" in shown
    assert "64 tokens of `text` (00000000), in windows of 32 that do not overlap; 2 cores (x86_64), 2026-01-01" in shown
    assert "zeroed: 4.5000 (+50.0%); with the table alone in int8: 3.0300 (+1.00%)" in shown
    monkeypatch.setattr(readme, "lines_of", lambda name: [])
    assert readme.quality() == readme.demo_budgets() == "Not measured yet."


def test_a_calibrated_slice_is_kept_once_with_the_slices(source: Source) -> None:
    whole, same = made("slice", "full"), made("calibrated", "ffn=256x12", loss=2.0)
    kept = quality.results_of([whole, same, made("table", "full", table="zeroed"), made("uniform", "ffn=224x12")])
    assert [(result.name, result.loss) for result in kept] == [("full", 3.0)]


def test_the_picture_joins_slices_with_all_layers() -> None:
    lines = [made("slice", "full", weights_bytes=3), made("slice", "half", weights_bytes=2), made("uniform", "other")]
    lines += [made("slice", SKIP, layers=10), made("slice", "full", head="int8", precision="int8")]
    whole, fewer = plots.series(lines, "bf16")
    assert ([line["slice"] for line in whole], [line["slice"] for line in fewer]) == (["half", "full"], [SKIP])


if LINES:

    @pytest.mark.parametrize("skip", [False, True])
    def test_each_doubling_of_the_width_earns_its_bytes(skip: bool) -> None:
        full, half, quarter = (SLICES[skipped(width, skip), "bf16", "bf16"] for width in WIDTHS)
        assert half["loss"] - full["loss"] >= EARNED
        assert quarter["loss"] - half["loss"] >= EARNED

    @pytest.mark.parametrize(("precision", "head"), sorted({key[1:] for key in SLICES}))
    @pytest.mark.parametrize("skip", [False, True])
    def test_wider_is_better_at_every_precision(skip: bool, precision: str, head: str) -> None:
        losses = [SLICES[skipped(width, skip), precision, head]["loss"] for width in WIDTHS]
        assert losses == sorted(losses)
        assert len(set(losses)) == len(WIDTHS)

    @pytest.mark.parametrize("key", [key for key in SLICES if key[1] in MORE], ids="-".join)
    def test_quantization_costs_little(key: tuple[str, str, str]) -> None:
        assert SLICES[key]["loss"] <= SLICES[key[0], "bf16", "bf16"]["loss"] * (1 + MORE[key[1]])

    def test_the_table_earns_its_bytes() -> None:
        found = {line["table"]: line["loss"] for line in LINES if line["case"] == "table"}
        whole = SLICES["full", "bf16", "bf16"]["loss"]
        assert found["zeroed"] - whole >= TABLE
        assert found["int8"] - whole <= whole * MORE["int8"]

    def test_no_slice_of_one_width_beats_a_calibrated_one_of_its_size() -> None:
        # They were chosen on other text, of slices that it could not tell apart the smallest.
        uniform = [line for key, line in SLICES.items() if key[1] == "bf16"]
        uniform += [line for line in LINES if line["case"] == "uniform"]
        calibrated = [line for line in LINES if line["case"] == "calibrated"]
        assert calibrated
        for line in calibrated:
            rivals = [other["loss"] for other in uniform if other["least_bytes"] <= line["least_bytes"]]
            assert line["loss"] <= min(rivals) + NOISE, line["slice"]

    def test_bytes_are_what_the_planner_says(source: Source) -> None:
        for line in (line for line in LINES if "planned" in line):
            # What libraries take is the machine's, what the tokenizer takes is its cache's.
            floor = Floor(host=line["planned"]["runtime"], tokenizer=line["planned"]["tokenizer"])
            request = Request(slice=line["slice"], precision=line["precision"], context=line["context"])
            plan = next(p for p in enumerate_plans(source, request, floor) if p.recipe.head == line["head"])
            assert plan.total_bytes == pytest.approx(line["planned_bytes"], rel=0.05)
            for name, nbytes in line["planned"].items():
                assert plan.bytes[name] == pytest.approx(nbytes, rel=0.05), (line["slice"], name)

    def test_what_the_planner_reads_is_what_was_measured(source: Source) -> None:
        assert load(DEMO, source.model) == quality.results_of(LINES)


if BUDGETS:

    def test_three_budgets_give_three_plans_within_them() -> None:
        plans = {tuple(line["plan"][key] for key in ("slice", "precision", "head")) for line in BUDGETS}
        assert len(plans) == len(BUDGETS) == 3
        assert all(line["peak_bytes"] <= line["budget_bytes"] for line in BUDGETS)


def test_results_hold_nothing_of_the_machine() -> None:
    for line in LINES + BUDGETS:
        assert str(Path.home()) not in json.dumps(line)
        assert not any(isinstance(v, str) and v.startswith("/") for v in line.values())
