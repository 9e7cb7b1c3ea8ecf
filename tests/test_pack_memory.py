"""What packing holds in memory, measured in a process of its own on tensors far larger than that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.checkpoint import Checkpoint
from loaders.formats.synthetic import write_random
from loaders.packing import BANDS, band_for, packing_bytes
from tests import small
from tests.faulty import ROOT, tiny

MIB = 1 << 20
ROWS = 1 << 16
# 134 MB of embedding and 201 MB of per-layer embeddings, in float32.
LARGE = {
    **small.GEMMA3N,
    **{"vocab_size": ROWS, "vocab_size_per_layer_input": ROWS, "hidden_size": 512, "hidden_size_per_layer_input": 64},
}
# What the growth of a process shows besides: pages of the allocator, threads' stacks, code that was not run before.
NOISE = 2 * MIB

CHILD = """
import json, sys
from pathlib import Path
from edge.budget.memory import read_process, reset_peak
from loaders.checkpoint import Checkpoint
from loaders.packing import write_pack
tiny, large, out = map(Path, sys.argv[1:4])
write_pack(Checkpoint.open(tiny), out / "warm")
checkpoint, grown = Checkpoint.open(large), {}
for name in ("0", "24", "none"):
    room = None if name == "none" else int(name) << 20
    assert reset_peak()
    before = read_process().rss
    write_pack(checkpoint, out / name, ("int8",), room=room)
    grown[name] = read_process().peak_rss - before
print(json.dumps(grown))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints: tiny, and large."""
    root = tmp_path_factory.mktemp("memory")
    tiny(root / "tiny")
    (root / "config.json").write_text(json.dumps(LARGE))
    write_random(root / "config.json", root / "large", dtype="F32")
    return root


def test_packing_stays_within_what_is_planned_for_it(folder: Path) -> None:
    """In bands as small as there are, within 24 MiB, and without a limit."""
    command = [sys.executable, "-c", CHILD, *(str(folder / name) for name in ("tiny", "large")), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    grown = json.loads(done.stdout)
    checkpoint = Checkpoint.open(folder / "large")
    largest = max(tensor.nbytes for tensor in checkpoint.where.values())
    assert largest == 4 * ROWS * 12 * 64
    for name, room in (("0", 0), ("24", 24 * MIB), ("none", None)):
        planned = packing_bytes(checkpoint, band_for(checkpoint, room))
        assert planned < largest / 3
        assert grown[name] <= planned + NOISE
    assert band_for(checkpoint, 0) == BANDS[1] < band_for(checkpoint, 24 * MIB) < band_for(checkpoint, None) == BANDS[0]
    assert grown["24"] <= 24 * MIB
    # And the measurement measures: wider bands show.
    assert grown["none"] > 4 * MIB
    assert (folder / "0" / "ple" / "weights.safetensors").read_bytes() == (
        folder / "none" / "ple" / "weights.safetensors"
    ).read_bytes()
    checkpoint.close()


def test_a_band_is_as_large_as_the_room_allows(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder / "large")
    needs = [packing_bytes(checkpoint, 1 << n) for n in range(16, 21)]
    assert needs == sorted(set(needs))
    for n, need in zip(range(16, 21), needs, strict=True):
        assert band_for(checkpoint, need) == 1 << n
        assert band_for(checkpoint, need - 1) == 1 << max(16, n - 1)
    checkpoint.close()
