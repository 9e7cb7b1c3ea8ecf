"""The trained checkpoint of the tests, and where the material beside the repository lies, when it is there."""

from __future__ import annotations

from pathlib import Path

from edge.demo import model_path

SHARED = Path(__file__).resolve().parents[2] / "shared"
CORPUS = SHARED / "corpus"
HELDOUT = CORPUS / "heldout.txt.xz"
DEMO = model_path()
