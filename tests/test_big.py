"""E2B's true shapes with random weights, nine gigabytes of them: the promise at the size it is made for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loaders.formats.synthetic import write_random
from tests.shrink import CONFIGS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def e2b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big") / "e2b"
    write_random(CONFIGS / "gemma-3n-E2B.json", folder)
    return folder


def measured(folder: Path, budget: str, *flags: str) -> dict[str, Any]:
    """Prefills several chunks and a few tokens, in a process of its own."""
    program = f"""
import edge, json, numpy as np
with edge.load({str(folder)!r}, budget={budget!r}, context=1024) as session:
    session.step(np.arange(4, 704))
    for token in range(6):
        session.prefetch(token)
        session.step([token])
    print(json.dumps({{**session.memory(), "plan": session.plan.as_dict()}}))
"""
    done = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


PLANS = [("2GB", "int4", "ssd"), ("3GB", "int8", "ssd"), ("5.4GB", "bf16", "ssd"), ("12GB", "bf16", "ram")]


@pytest.mark.parametrize(("budget", "precision", "tier"), PLANS)
def test_peak_stays_under_the_budget_and_near_the_plan(e2b: Path, budget: str, precision: str, tier: str) -> None:
    """The first run at a quantized precision packs, under the same budget."""
    found = measured(e2b, budget)
    assert (found["plan"]["precision"], found["plan"]["ple"]) == (precision, tier)
    assert found["peak_bytes"] <= found["budget_bytes"]
    assert found["peak_bytes"] == pytest.approx(found["planned_bytes"], rel=0.05)
