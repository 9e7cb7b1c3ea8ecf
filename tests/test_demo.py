"""The demo model: transformers' logits and text, what it makes of a tale as a whole, in slices and in few bits.

Losses are nats per token. They are those of this checkpoint: whoever trains another one measures them anew.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edge
from edge.evaluate import evaluate, read_text
from edge.session import Session
from loaders.checkpoint import Checkpoint
from loaders.rewrite import write_slice
from loaders.slices import resolve
from tests import makers
from tests.command import Cli, cli_fixture, edge_command, environment, refused  # noqa: F401
from tests.shared import DEMO, HELDOUT, TALE

PROMPT = "Once upon a time, there was a"
SKIP = "+skip-first-shared"
# Of the tale's beginning, in bf16; of the whole model with an empty table; and in few bits.
SHORT = 600
TALES = {
    "full": 2.6107, "half": 2.6320, "quarter": 2.6837,
    f"full{SKIP}": 2.6389, f"half{SKIP}": 2.6562, f"quarter{SKIP}": 2.7123,
}  # fmt: skip
NO_TABLE, INT8, INT4 = 4.0376, 2.6109, 2.6456
# Of the first windows of the held-out text.
LONG = 2 * 1023
HELDOUTS = {"full": 3.0663, "half": 3.0993, "quarter": 3.1325}
# Other CPUs add up in another order.
OTHER_CPUS = 1e-3


@pytest.fixture(scope="module")
def exact() -> Iterator[Session]:
    with edge.load(DEMO, precision="float32", slice="full") as session:
        yield session


@pytest.mark.parametrize("tier", ["device", "ram", "ssd"])
def test_logits_agree_with_transformers(tier: str) -> None:
    reference = makers.reference(DEMO)
    ids = makers.prompt(reference.config.vocab_size, 280)
    assert len(ids) > 2 * reference.config.sliding_window
    want = makers.expected(reference, ids)
    bound = makers.TOLERANCE * np.abs(want).max()
    with edge.load(DEMO, precision="float32", slice="full", ple=tier) as session:
        assert np.abs(session.logits(ids) - want).max() <= bound
        session.engine.chunk = 48
        assert np.abs(session.step(ids[:268]) - want[267]).max() <= bound
        for i in range(268, 280):
            assert np.abs(session.step(ids[i : i + 1]) - want[i]).max() <= bound


def test_greedy_text_is_transformers_own(exact: Session) -> None:
    ids = torch.tensor([exact.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        reference: Any = makers.reference(DEMO)
        want = reference.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :].tolist()
    events = list(exact.generate(PROMPT, max_tokens=48))
    tokens = [event.token for event in events if event.token is not None]
    assert tokens == want[: len(tokens)]
    assert len(tokens) == 48 or events[-1].finish == "stop"
    assert "".join(event.text for event in events) == exact.tokenizer.decode(tokens)


def test_a_slice_is_a_model_of_its_own_to_transformers(tmp_path: Path) -> None:
    name = "ffn=256x3,128x4,64x3+skip=7-8"
    with closing(Checkpoint.open(DEMO)) as checkpoint:
        part = resolve(checkpoint.model, checkpoint.family, name)
        write_slice(checkpoint, part, tmp_path / "slice")
    reference = makers.reference(tmp_path / "slice")
    ids = makers.prompt(reference.config.vocab_size, 140)
    want = makers.expected(reference, ids)
    for folder, as_named in ((DEMO, name), (tmp_path / "slice", "full")):
        with edge.load(folder, precision="float32", slice=as_named) as session:
            assert session.plan.part.widths == part.widths
            makers.assert_close(session.logits(ids), want)


# What it makes of texts


def loss(text: Path, precision: str, part: str, tokens: int = SHORT, *, table: bool = True) -> float:
    """Nats per token over windows that do not overlap."""
    with edge.load(DEMO, precision=precision, slice=part) as session:
        if not table:
            rows, gather = session.engine.rows, session.engine.rows.gather
            rows.gather = lambda ids: np.zeros_like(gather(ids))
        return evaluate(session, read_text(text, session.tokenizer, tokens), stride=1024).loss


@pytest.fixture(scope="module")
def tales() -> dict[str, float]:
    """The tale's loss in each slice."""
    return {name: loss(TALE, "bf16", name) for name in TALES}


def test_a_tale_it_has_not_seen_is_ordinary_to_it(tales: dict[str, float]) -> None:
    assert tales == pytest.approx(TALES, abs=OTHER_CPUS)


@pytest.mark.parametrize("skip", ["", SKIP])
def test_width_earns_its_bytes(tales: dict[str, float], skip: str) -> None:
    full, half, quarter = (tales[name + skip] for name in ("full", "half", "quarter"))
    assert full + 0.01 <= half
    assert half + 0.04 <= quarter
    assert not skip or full >= tales["full"] + 0.02


def test_the_table_earns_its_bytes(tales: dict[str, float]) -> None:
    without = loss(TALE, "bf16", "full", table=False)
    assert without == pytest.approx(NO_TABLE, abs=OTHER_CPUS)
    assert without >= tales["full"] + 0.3


@pytest.mark.parametrize(("precision", "want", "share"), [("int8", INT8, 0.005), ("int4", INT4, 0.03)])
def test_fewer_bits_cost_little(tales: dict[str, float], precision: str, want: float, share: float) -> None:
    found = loss(TALE, precision, "full")
    assert found == pytest.approx(want, abs=OTHER_CPUS)
    assert found == pytest.approx(tales["full"], rel=share)


if HELDOUT.is_file():

    def test_each_doubling_of_width_earns_two_hundredths_of_a_nat_on_text_held_out() -> None:
        found = {name: loss(HELDOUT, "bf16", name, LONG) for name in HELDOUTS}
        assert found == pytest.approx(HELDOUTS, abs=OTHER_CPUS)
        assert found["full"] + 0.02 <= found["half"]
        assert found["half"] + 0.02 <= found["quarter"]


# What it makes of a budget


def test_a_budget_just_above_the_floor_gives_something_up_and_says_so(cli: Cli) -> None:
    """The run is a process of its own, whose memory no other test has touched."""
    planned = cli("plan", DEMO, "--budget", "20GB", "--device", "cpu", "--json").json
    best, least = planned["plan"]["total_bytes"], min(c["total_bytes"] for c in planned["candidates"])
    assert planned["plan"] == planned["candidates"][0]
    run = ("run", DEMO, "Once upon a time", "-n", 12, "--temp", 0, "--device", "cpu", "--budget")
    tight = subprocess.run(
        edge_command(*run, (best + 2 * least) // 3),
        env=environment(), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert tight.returncode == 0
    assert tight.stdout.strip()
    assert re.search(r"to fit: (slice|precision|PLE table|keys and values|context) .+ -> ", tight.stderr)
    peak = re.search(r"peak memory: +([\d.]+) MB of ([\d.]+) MB budget", tight.stderr)
    assert peak is not None
    assert float(peak[1]) <= float(peak[2])
    refused(cli(*run, least // 2), 80, "nothing fits --budget")
