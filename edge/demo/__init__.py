"""The demo model that ships with edge: this folder is its checkpoint."""

from __future__ import annotations

from pathlib import Path

from loaders.errors import MissingFile

FOLDER = Path(__file__).resolve().parent


def model_path() -> Path:
    """The folder of the demo's checkpoint. Raises MissingFile where edge was installed without it."""
    if not (FOLDER / "config.json").is_file():
        raise MissingFile(
            "edge is installed without its demo model",
            file=FOLDER / "config.json",
            hint="Name a checkpoint folder as MODEL, or install edge again from its whole source",
        )
    return FOLDER
