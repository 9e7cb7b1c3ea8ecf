"""How good a slice is, as one number to compare slices of the same model by, and where that number comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loaders.families import NamedSlice
from loaders.formats.recipe import Recipe
from loaders.network.matformer import sliced
from loaders.network.spec import Model
from loaders.network.tensors import total

# Four answers to choose from.
CHANCE = 25.0
# The share of what a model can do that is left at a precision, by (core, head). Block-32 four-bit weights without
# calibration cost published 7-8B models 1 to 2 of about 40 points of MMLU above chance, eight-bit ones a tenth of one.
KEEPS = {
    ("float32", "float32"): 1.0,
    ("bf16", "bf16"): 1.0,
    ("int8", "int8"): 0.998,
    ("int4", "int8"): 0.96,
    ("int4", "int4"): 0.95,
}


@dataclass(frozen=True)
class Quality:
    """``score`` is comparable within one ``origin`` only: MMLU in per cent, or parameters in billions; ``chance`` is
    what knowing nothing scores.

    ``depth`` is the layers kept, where nothing better than counting is known, and 0 where something is. Leaving out
    layers then ranks below any narrowing: on tale-3n skipping five of twenty layers costs 0.76 nats of held-out loss,
    a quarter of the FFN width 0.53, half of it nothing.
    """

    score: float = 0.0
    origin: str = ""
    depth: int = 0
    chance: float = 0.0

    def at(self, recipe: Recipe) -> Quality:
        """What is left of it at a precision, of the part above chance."""
        keeps = KEEPS[recipe.precision, recipe.head]
        return replace(self, score=self.chance + (self.score - self.chance) * keeps)

    @property
    def rank(self) -> tuple[int, float]:
        """What to sort by."""
        return self.depth, self.score


def qualities(model: Model, slices: Sequence[NamedSlice]) -> list[Quality]:
    """Published MMLU where every slice has one; layers, then parameters, otherwise."""
    if all(s.mmlu is not None for s in slices):
        return [Quality(s.mmlu or 0.0, "MMLU", chance=CHANCE) for s in slices]
    return [Quality(total(sliced(model, s.slice)) / 1e9, "parameters", len(s.slice.keep)) for s in slices]
