"""The model's shape: its config as transformers reads it, and as edge does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loaders.families import family_of
from loaders.formats.config import Config
from loaders.network.spec import Model

CONFIG = Path(__file__).with_name("config.json")


def read_config(path: Path) -> dict[str, Any]:
    """The config as plain data."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def read_model(path: Path = CONFIG) -> Model:
    """The one definition of the network, from the config."""
    config = Config(read_config(path), str(path))
    return family_of(config.raw("model_type"), str(path)).parse(config)
