"""What calibrating a MatFormer finds, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loaders.formats.measured import Measured
from loaders.formats.recipe import Recipe
from loaders.network.matformer import Slice


@dataclass(frozen=True)
class Point:
    """One measured slice. ``loss``: nats per token on the text that chooses, ``held`` on the rest of it, where it was
    measured. ``bytes``: of its smallest plan. ``kind``: full, uniform (one width, trained or not), layer (one layer
    unlike the others) or mix. ``predicted``: the loss that the layers' costs add up to.
    """

    part: Slice
    bytes: int
    kind: str
    loss: float
    held: float | None = None
    predicted: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "slice": self.part.name, "layers": list(self.part.keep), "widths": list(self.part.widths),
            "kind": self.kind, "bytes": self.bytes, "loss": self.loss, "held_out": self.held,
            "predicted": self.predicted,
        }  # fmt: skip


@dataclass(frozen=True)
class Sensitivity:
    """What one layer's ``width`` costs, in nats per token: ``narrowed`` where all others are full, ``widened`` where
    they are narrowest, both against the layer at its full width. ``saved``: bytes. ``width`` 0 is all of ``layers``
    skipped.
    """

    layers: tuple[int, ...]
    width: int
    saved: int
    narrowed: float
    widened: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        costs = {"narrowed": self.narrowed, "widened": self.widened}
        return {"layers": list(self.layers), "width": self.width, "saved_bytes": self.saved, **costs}


@dataclass(frozen=True)
class Choice:
    """What was found for a budget. ``uniforms``: the widest slices of one width that fit it, trained or not, with and
    without the layers that may be skipped.
    """

    budget: int
    winner: Point
    uniforms: tuple[Point, ...]

    @property
    def best_uniform(self) -> Point | None:
        """The one that lost least on the text that decided nothing; None where none fits."""
        return min(self.uniforms, key=lambda point: point.held or 0.0, default=None)

    @property
    def gain(self) -> float | None:
        """Nats per token that the winner is better by, on the text that decided nothing."""
        best = self.best_uniform
        return None if best is None or best.held is None or self.winner.held is None else best.held - self.winner.held

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "budget_bytes": self.budget, "winner": self.winner.as_dict(), "gain": self.gain,
            "uniform": [point.as_dict() for point in self.uniforms],
        }  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """All that was measured of a model at a recipe: ``points`` in ascending bytes, one ``Choice`` for each budget.

    ``context``: that slices were priced at; ``text_context``: tokens that a scored one saw at most; ``tokens`` chose,
    ``held_tokens`` did not. ``evaluations``: how often a slice was run over one of the two. ``measured``: for
    :func:`edge.store.measured.save`, the slices that none of fewer bytes beats, and those of one trained width.
    """

    recipe: Recipe
    context: int
    text_context: int
    tokens: int
    held_tokens: int
    evaluations: int
    sensitivities: tuple[Sensitivity, ...]
    choices: tuple[Choice, ...]
    points: tuple[Point, ...]
    measured: tuple[Measured, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "precision": self.recipe.precision, "head": self.recipe.head, "context": self.context,
            "text_context": self.text_context, "tokens": self.tokens, "held_out_tokens": self.held_tokens,
            "evaluations": self.evaluations,
            "sensitivities": [found.as_dict() for found in self.sensitivities],
            "choices": [choice.as_dict() for choice in self.choices],
            "points": [point.as_dict() for point in self.points],
        }  # fmt: skip
