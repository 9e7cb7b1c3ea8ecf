"""The trained checkpoint: transformers' logits and text, its losses on text it has not seen, and a tight budget.

The losses are measured only where the held-out text lies beside the repository.
"""

from __future__ import annotations

import json
import lzma
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import edge
from edge.session import Session
from tests.shared import DEMO, HELDOUT

PROMPT = "Once upon a time, there was a"
WINDOW = 512
# Nats per token of the held-out text: of slices, and of the whole with an empty per-layer table.
NATS = {"full": 3.357, "half": 3.358, "quarter": 3.871}
NO_TABLE = 3.916


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import Gemma3nForCausalLM

    return Gemma3nForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exact() -> Iterator[Session]:
    with edge.load(DEMO, precision="float32") as session:
        yield session


@pytest.mark.parametrize("tier", ["device", "ram", "ssd"])
def test_logits_agree_with_transformers(reference: Any, tier: str) -> None:
    ids = np.random.default_rng(0).integers(4, reference.config.vocab_size, 300)
    assert len(ids) > 2 * reference.config.sliding_window
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)[None]).logits[0].numpy()
    bound = 1e-4 * np.abs(want).max()
    with edge.load(DEMO, precision="float32", ple=tier) as session:
        assert np.abs(session.logits(ids) - want).max() <= bound
        session.engine.chunk = 48
        assert np.abs(session.step(ids[:200]) - want[199]).max() <= bound
        for i in range(200, 300):
            assert np.abs(session.step(ids[i : i + 1]) - want[i]).max() <= bound


def test_greedy_text_is_transformers_own(reference: Any, exact: Session) -> None:
    ids = torch.tensor([exact.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        want = reference.generate(ids, max_new_tokens=150, do_sample=False)[0, ids.shape[1] :].tolist()
    events = list(exact.generate(PROMPT, max_tokens=150))
    tokens = [event.token for event in events if event.token is not None]
    assert tokens == want[: len(tokens)]
    assert len(tokens) == 150 or events[-1].finish == "stop"
    assert "".join(event.text for event in events) == exact.tokenizer.decode(tokens)


def command(*args: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, whose memory no other test has touched."""
    line = [sys.executable, "-m", "edge", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_a_budget_just_above_the_floor_gives_something_up_and_says_so() -> None:
    planned = json.loads(command("plan", DEMO, "--budget", "20GB", "--device", "cpu", "--json").stdout)
    best, least = planned["plan"]["total_bytes"], min(c["total_bytes"] for c in planned["candidates"])
    assert planned["plan"] == planned["candidates"][0]
    run = ("run", DEMO, "Once upon a time", "-n", 12, "--temp", 0, "--device", "cpu", "--budget")
    tight = command(*run, (best + 2 * least) // 3)
    assert tight.returncode == 0
    assert tight.stdout.strip()
    assert re.search(r"to fit: (slice|precision|PLE table|keys and values|context) .+ -> ", tight.stderr)
    assert "peak memory:" in tight.stderr
    kept = json.loads(command(*run, (best + 2 * least) // 3, "--json").stdout)["memory"]
    assert kept["peak_bytes"] <= kept["budget_bytes"]
    refused = command(*run, least // 2)
    assert refused.returncode == 80
    assert refused.stdout == ""
    assert refused.stderr.startswith("edge: error: nothing fits --budget")
    assert refused.stderr.count("\n") == 1


def loss(session: Session, ids: np.ndarray) -> float:
    """Nats per token over windows that do not overlap."""
    total, count = 0.0, 0
    for window in ids.reshape(-1, WINDOW):
        logits = session.logits(window).astype(np.float64)[:-1]
        peak = logits.max(-1)
        partition = np.log(np.exp(logits - peak[:, None]).sum(-1)) + peak
        total += float((partition - logits[np.arange(WINDOW - 1), window[1:]]).sum())
        count += WINDOW - 1
    return total / count


if HELDOUT.is_file():

    @pytest.fixture(scope="module")
    def heldout(exact: Session) -> np.ndarray:
        with lzma.open(HELDOUT, "rt", encoding="utf-8") as file:
            text = file.read(40_000)[20_000:]
        return np.array(exact.tokenizer.encode(text)[: 6 * WINDOW])

    @pytest.mark.parametrize("part", NATS)
    def test_heldout_loss_is_what_was_published_with_it(heldout: np.ndarray, part: str) -> None:
        with edge.load(DEMO, precision="float32", slice=part) as session:
            assert loss(session, heldout) == pytest.approx(NATS[part], abs=0.0006)

    def test_the_table_earns_its_bytes(heldout: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        with edge.load(DEMO, precision="float32") as session:
            gather = session.engine.rows.gather
            monkeypatch.setattr(session.engine.rows, "gather", lambda ids: torch.zeros_like(gather(ids)))
            assert loss(session, heldout) == pytest.approx(NO_TABLE, abs=0.0006)

    def test_bf16_costs_next_to_nothing(heldout: np.ndarray) -> None:
        with edge.load(DEMO, precision="bf16") as session:
            assert loss(session, heldout) == pytest.approx(NATS["full"], abs=0.005)
