"""The trained checkpoint of the tests, a tale it finds ordinary, and the text it was not shown, where that is there."""

from __future__ import annotations

from pathlib import Path

from edge.demo import model_path

SHARED = Path(__file__).resolve().parents[2] / "shared"
HELDOUT = SHARED / "corpus" / "heldout.txt.xz"
TALE = Path(__file__).with_name("tale.txt")
DEMO = model_path()
