"""What a training step sees: windows of text, and the sub-model that each of them trains, from (seed, step) alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from loaders.network.spec import Model

# Of the sequences that are not at full width, the share that has one width in all layers; the others are mixed.
UNIFORM = 0.5
# Of the steps.
SKIP = 0.2
# Of the windows: the others begin anywhere.
AT_PARAGRAPH = 0.5


class Step(NamedTuple):
    """``starts`` [batch]: where in the text each window begins; ``units`` [batch, layers]: FFN widths; ``skip``:
    whether the skippable layers are left out.
    """

    starts: np.ndarray
    units: np.ndarray
    skip: bool


def draw(
    model: Model, tokens: int, paragraphs: np.ndarray, batch: int, length: int, seed: int, step: int, full: float
) -> Step:
    """The step's own draw: the same for the same seed and step, whatever ran before it.

    ``full``: the share of the sequences that train the whole model; at 1, layers are not left out either.
    """
    assert model.nested is not None
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, tokens - length, batch)
    ahead = paragraphs[np.searchsorted(paragraphs, starts) % len(paragraphs)]
    starts = np.where((rng.random(batch) < AT_PARAGRAPH) & (ahead < tokens - length), ahead, starts)
    widths, count = np.array(sorted(model.nested.widths)), len(model.layers)
    kind = rng.random(batch)[:, None]
    mixed = rng.choice(widths, (batch, count))
    uniform = np.repeat(rng.choice(widths[:-1], (batch, 1)), count, 1)
    units = np.where(kind < full, widths[-1], np.where(kind < full + (1 - full) * UNIFORM, uniform, mixed))
    return Step(starts, units, bool(rng.random() < SKIP) and full < 1)
