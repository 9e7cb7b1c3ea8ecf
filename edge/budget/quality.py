"""How good a slice is at a precision, as one number to compare by, and where that number comes from.

The loss that was measured, where results of the full model are there to compare with; elsewhere an estimate: what was
published, else counted parameters, less a share for the precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loaders.errors import Usage
from loaders.families import NamedSlice
from loaders.formats.measured import Measured
from loaders.formats.recipe import Recipe
from loaders.network.matformer import Slice, full, sliced
from loaders.network.spec import Model
from loaders.network.tensors import total
from loaders.slices import named, spelled

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
ORDER = {Recipe(*key): place for place, key in enumerate(KEEPS)}
MEASURED = "measured"
# Decimals of a loss that tell plans apart.
DIGITS = 3
# Every candidate is priced: of thousands of measured slices that nobody named, as many as nobody has to wait for.
MOST_UNNAMED = 64
# A slice without its name: the layers it keeps, and their widths.
Cut = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Quality:
    """``score``: the more the better, comparable within one ``origin`` only: MMLU in per cent, parameters in billions,
    measured nats per token below zero. ``chance`` is what knowing nothing scores.

    ``depth`` is the layers kept, where nothing better than counting is known, and 0 where something is. Leaving out
    layers then ranks below any narrowing: on tale-3n skipping five of twenty layers costs 0.76 nats of held-out loss,
    a quarter of the FFN width 0.53, half of it nothing.

    ``basis`` is the result that a measured score comes from; ``exact``: it is of this very slice and precision.
    """

    score: float = 0.0
    origin: str = ""
    depth: int = 0
    chance: float = 0.0
    basis: Measured | None = None
    exact: bool = False

    def at(self, recipe: Recipe) -> Quality:
        """What is left of it at a precision, of the part above chance."""
        keeps = KEEPS[recipe.precision, recipe.head]
        return replace(self, score=self.chance + (self.score - self.chance) * keeps)

    @property
    def rank(self) -> tuple[int, float]:
        """What to sort by. Losses less than DIGITS apart are one: int8 may seem better than what it was made of."""
        return self.depth, round(self.score, DIGITS) if self.origin == MEASURED else self.score

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found: dict[str, Any] = {"score": self.score, "origin": self.origin}
        if self.basis is not None:
            found |= {"loss": -self.score, "exact": self.exact}
            found["of"] = {key: getattr(self.basis, key) for key in ("name", "precision", "head", "loss")}
            found |= {key: getattr(self.basis, key) for key in ("tokens", "context", "text")}
        return found


# The quality of one slice, by precision.
Judge = Callable[[Recipe], Quality]


def judges(model: Model, slices: Sequence[NamedSlice], losses: Losses | None) -> list[Judge]:
    """What each slice is worth: by its loss where one can be told, else by an estimate, below every loss."""
    if losses is None:
        return [quality.at for quality in estimates(model, slices)]
    unknown = [s for s in slices if not losses.inside(s.slice)]
    estimated = dict(zip((cut(s.slice) for s in unknown), estimates(model, unknown), strict=True))
    return [losses.judge(s.slice, estimated.get(cut(s.slice), Quality())) for s in slices]


def estimates(model: Model, slices: Sequence[NamedSlice]) -> list[Quality]:
    """Published MMLU where every slice has one; layers, then parameters, otherwise."""
    if all(s.mmlu is not None for s in slices):
        return [Quality(s.mmlu or 0.0, "MMLU", chance=CHANCE) for s in slices]
    return [Quality(total(sliced(model, s.slice)) / 1e9, "parameters", len(s.slice.keep)) for s in slices]


def cut(part: Slice) -> Cut:
    """A slice whatever it is called."""
    return part.keep, part.widths


def contains(large: Cut, small: Cut) -> bool:
    """Whether one slice lies within another: none of its layers is missing there, or narrower."""
    widths = dict(zip(*large, strict=True))
    return all(widths.get(layer, 0) >= width for layer, width in zip(*small, strict=True))


@dataclass(frozen=True)
class Losses:
    """Results that compare, by slice and precision: of one text in the same windows, the full model's among them."""

    model: Model
    results: dict[Cut, dict[Recipe, Measured]]

    def inside(self, part: Slice) -> list[Cut]:
        """The slice itself where it was measured, else the measured ones it contains."""
        own = cut(part)
        return [own] if own in self.results else [other for other in self.results if contains(own, other)]

    def judge(self, part: Slice, estimate: Quality) -> Judge:
        """A measured slice has its loss. Another counts as the best measured one inside it: it ought to be no worse, is
        not known to be better, and where they tie fewer bytes win. With none inside it, it comes after all of them, by
        the estimate.
        """
        own, inside = cut(part), self.inside(part)
        if not inside:
            return replace(estimate, depth=estimate.depth - len(self.model.layers) - 1).at
        return lambda recipe: max((self.at(c, recipe, c == own) for c in inside), key=lambda q: q.score)

    def at(self, measured: Cut, recipe: Recipe, own: bool) -> Quality:
        """The loss of a measured slice at a precision: as it was measured, else told from its nearest other precision.

        What that one has above chance, the logarithm of the vocabulary, is kept to the share that the full model keeps
        between the two.
        """
        basis = nearest(self.results[measured], recipe)
        score, exact, above = -basis.loss, basis.recipe == recipe, self.above(basis)
        if not exact and above > 0:
            score += above * (self.full_at(recipe) / self.full_at(basis.recipe) - 1)
        return Quality(score, MEASURED, basis=basis, exact=own and exact)

    def full_at(self, recipe: Recipe) -> float:
        """Nats above chance of the full model: measured, else the share that KEEPS has of its nearest precision.

        One that is no better than chance says nothing about precisions: KEEPS alone does then.
        """
        of_full = {r: m for r, m in self.results[cut(full(self.model))].items() if self.above(m) > 0}
        if not of_full:
            return KEEPS[recipe.precision, recipe.head]
        basis = nearest(of_full, recipe)
        keeps = KEEPS[recipe.precision, recipe.head] / KEEPS[basis.precision, basis.head]
        return self.above(basis) * keeps

    def above(self, result: Measured) -> float:
        """Nats by which a result beats knowing nothing; below zero where it does not."""
        return math.log(self.model.vocab) - result.loss

    def unnamed(self, known: Iterable[NamedSlice]) -> list[NamedSlice]:
        """Measured slices that are not among the known ones, under names that ``--slice`` takes; where there are
        more than a planner can price, some of them, spread over the losses.
        """
        named_cuts = {cut(s.slice) for s in known}
        best = {c: min(m.loss for m in found.values()) for c, found in self.results.items() if c not in named_cuts}
        order = sorted(best, key=lambda c: (best[c], c))
        order = order[:: -(-len(order) // MOST_UNNAMED) or 1]
        return [NamedSlice(self.called(next(iter(self.results[c].values())).part)) for c in order]

    def called(self, part: Slice) -> Slice:
        """The slice under its name where that means it, else under one that spells it out: a name comes from a file."""
        try:
            meant = named(self.model, part.name)
        except Usage:
            meant = None
        return part if meant == part else replace(part, name=spelled(self.model, part))


def comparable(model: Model, measured: Iterable[Measured]) -> Losses | None:
    """The results on the text and windows that most were measured on, the full model among them; None without it.

    Where there are as many, those over more tokens, then of the longer context.
    """
    groups: dict[tuple[int, int, str], list[Measured]] = {}
    for result in sorted(measured, key=lambda m: (m.keep, m.widths, ORDER[m.recipe])):
        groups.setdefault(result.ground, []).append(result)
    whole = cut(full(model))
    there = {key: group for key, group in groups.items() if any(cut(m.part) == whole for m in group)}
    if not there:
        return None
    chosen = max(there, key=lambda key: (len(there[key]), sum(m.tokens for m in there[key]), key))
    results: dict[Cut, dict[Recipe, Measured]] = {}
    for result in there[chosen]:
        results.setdefault(cut(result.part), {})[result.recipe] = result
    return Losses(model, results)


def nearest(results: dict[Recipe, Measured], recipe: Recipe) -> Measured:
    """The result at a precision, or at the one next to it; of two the more precise."""
    return results[min(results, key=lambda other: (abs(ORDER[other] - ORDER[recipe]), ORDER[other]))]
