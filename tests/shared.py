"""Where the material beside the repository lies, when it is there."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"
TALE = SHARED / "models" / "tale-3n"
CORPUS = SHARED / "corpus"
