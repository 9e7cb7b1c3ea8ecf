"""One definition of every network, over a small set of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loaders.network.altup import altup_decoder
from loaders.network.decoder import decoder
from loaders.network.spec import Model


def decoder_of(model: Model) -> Callable[..., Any]:
    """The decoder whose stream discipline this model has."""
    return decoder if model.altup is None else altup_decoder
