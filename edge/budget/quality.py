"""How good a slice is, as one number to compare slices of the same model by, and where that number comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loaders.families import NamedSlice
from loaders.network.matformer import sliced
from loaders.network.spec import Model
from loaders.network.tensors import total


@dataclass(frozen=True)
class Quality:
    """``score`` is comparable within one ``origin`` only: MMLU in per cent, or parameters in billions."""

    score: float = 0.0
    origin: str = ""


def qualities(model: Model, slices: Sequence[NamedSlice]) -> list[Quality]:
    """Published MMLU where every slice has one; parameters otherwise."""
    if all(s.mmlu is not None for s in slices):
        return [Quality(s.mmlu or 0.0, "MMLU") for s in slices]
    return [Quality(total(sliced(model, s.slice)) / 1e9, "parameters") for s in slices]
