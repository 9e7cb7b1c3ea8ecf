"""What a slice is predicted to lose, from what its layers lose one at a time.

Layers are not independent: the more are narrow, the more the next one costs. So a layer's cost is a share, and a curve
that is as steep at either end as was measured there says what a sum of shares comes to. Over 24 random slices of
tale-3n that is 0.012 nats off, with a rank correlation of 0.99; adding up what layers cost the full model is 0.045 off,
what they cost the narrowest 0.092.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge.calibrate.space import Costs, cost_of
from loaders.network.matformer import Slice

# A whole: what all layers together cost at their narrowest.
UNIT = 10**9
# Steeper ends would bend a cubic back.
STEEPEST = 3.0

Losses = Sequence[Mapping[int, float]]


@dataclass(frozen=True)
class Ends:
    """Measured losses, nats per token: of the ``full`` model and the ``narrowest`` of the same layers; the same of
    those that are left when layers are skipped, where some may be.
    """

    full: float
    narrowest: float
    skipped: tuple[float, float] | None = None


class Prediction:
    """``narrowed[i][w]``: what layer i at width w adds to the full model's loss; ``widened[i][w]``: what it adds to the
    narrowest one's where that has layer i at its full width. ``weight``: how much of the former counts.
    """

    def __init__(self, ends: Ends, narrowed: Losses, widened: Losses, weight: float = 0.5) -> None:
        self.ends = ends
        sums = [sum(max(0.0, layer[min(layer)]) for layer in losses) for losses in (narrowed, widened)]
        rise = ends.narrowest - ends.full
        slopes = [min(STEEPEST, total / rise) if rise > 0 else 1.0 for total in sums]
        self.slopes = (slopes[0], slopes[1])
        weights = [w / total if total > 0 else 0.0 for w, total in zip((weight, 1 - weight), sums, strict=True)]
        self.costs: Costs = tuple(
            {w: round(UNIT * (weights[0] * near[w] + weights[1] * far[w])) for w in near}
            for near, far in zip(narrowed, widened, strict=True)
        )

    def __call__(self, part: Slice) -> float:
        """Nats per token of a slice."""
        whole = sum(self.costs[i][min(self.costs[i])] for i in part.keep)
        share = min(1.0, max(0.0, cost_of(self.costs, part) / whole)) if whole > 0 else 0.0
        full, narrowest = self.ends.full, self.ends.narrowest
        if len(part.keep) < len(self.costs) and self.ends.skipped is not None:
            full, narrowest = self.ends.skipped
        return full + (narrowest - full) * curve(share, *self.slopes)


def curve(x: float, first: float, last: float) -> float:
    """The cubic from (0, 0) to (1, 1) with these slopes at its ends."""
    return x * x * (3 - 2 * x) + x * (1 - x) * (1 - x) * first - x * x * (1 - x) * last


def filled(losses: Mapping[int, float], widths: Sequence[int]) -> dict[int, float]:
    """Losses at all of ``widths``, ascending; between two measured ones on the line that joins them."""
    known = sorted(losses)
    found = {}
    for width in widths:
        low = max(w for w in known if w <= width)
        high = min(w for w in known if w >= width)
        at = (width - low) / (high - low) if high > low else 0.0
        found[width] = losses[low] + (losses[high] - losses[low]) * at
    return found
