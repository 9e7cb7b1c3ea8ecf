"""From one row of logits to one token: pure numpy functions in llama.cpp's order, and the seeded draw.

Order: repetition penalty, top-k, top-p, min-p, temperature, draw. Each function returns a new array.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loaders.errors import BadCheckpoint, Usage

Row = NDArray[np.floating[Any]]


def repetition_penalty(logits: Row, recent_ids: Sequence[int], penalty: float) -> Row:
    """``logits`` with every id in ``recent_ids`` made less likely: positive / penalty, negative * penalty.

    An id counts once however often it occurs; ids outside the row are ignored.
    """
    out = logits.copy()
    ids = np.unique(np.asarray(recent_ids, dtype=np.int64))
    ids = ids[(ids >= 0) & (ids < out.size)]
    seen = out[ids]
    out[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
    return out


def top_k_ids(logits: Row, k: int) -> NDArray[np.intp]:
    """The ids of the ``k`` largest logits, ascending; of equal logits the lowest ids win. ``k`` <= 0 means all."""
    if k <= 0 or k >= logits.size:
        return np.arange(logits.size)
    ids = np.arange(logits.size)
    width = 64
    blocks = logits.size // width
    if blocks > 4 * k:
        # The k-th largest block maximum bounds the k-th largest logit from below: one pass instead of a selection.
        whole = logits[: blocks * width].reshape(blocks, width).max(axis=1)
        ids = np.flatnonzero(logits >= np.partition(whole, blocks - k)[blocks - k])
    row = logits[ids]
    kth = row[np.argpartition(row, row.size - k)[row.size - k]]
    above, equal = ids[row > kth], ids[row == kth]
    return np.sort(np.concatenate([above, equal[: k - above.size]]))


def top_k(logits: Row, k: int) -> Row:
    """``logits`` with all but the ``k`` largest at -inf; of equal logits the lowest ids stay. ``k`` <= 0 keeps all."""
    return _only(logits, top_k_ids(logits, k))


def top_p(logits: Row, p: float) -> Row:
    """``logits`` with all at -inf but the fewest most likely that together reach probability ``p`` (at least one)."""
    if p >= 1.0:
        return logits.copy()
    probs = softmax(logits)
    # What lies below (1 - p) / n adds up to less than 1 - p, so it is never needed and need not be sorted.
    ids = np.flatnonzero(probs >= min((1.0 - p) / probs.size, float(probs.max())))
    ids = ids[np.argsort(-probs[ids], kind="stable")]
    keep = int(np.searchsorted(np.cumsum(probs[ids]), p)) + 1
    return _only(logits, ids[:keep])


def min_p(logits: Row, p: float) -> Row:
    """``logits`` with everything less likely than ``p`` times the most likely token at -inf. 0 keeps all."""
    if p <= 0.0:
        return logits.copy()
    floor = float(logits.max()) + math.log(p)
    return _only(logits, np.flatnonzero(logits >= floor))


def temperature(logits: Row, t: float) -> Row:
    """``(logits - max) / t`` in float64: the shift changes no probability, and a tiny ``t`` cannot overflow."""
    with np.errstate(over="ignore"):
        return (logits.astype(np.float64) - float(logits.max())) / t


def softmax(logits: Row) -> NDArray[np.float64]:
    """Probabilities of a row, in float64."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _only(logits: Row, ids: NDArray[np.intp]) -> Row:
    out = np.full_like(logits, -np.inf)
    out[ids] = logits[ids]
    return out


@dataclass(frozen=True)
class Sampling:
    """How to draw a token. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.

    Raises Usage for a value that is out of range, NaN or infinite.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for name in ("top_k", "repetition_window"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**31:
                raise Usage(repr(value), field=name, expected="a whole number from 0 to 2147483647")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    # bool is an int to isinstance; NaN fails both comparisons
    fine = type(value) in (int, float) and low <= value <= high and not (open_low and value == low)  # type: ignore[operator]
    if not fine:
        raise Usage(repr(value), field=name, expected=f"a number {'above' if open_low else 'from'} {low:g} to {high:g}")


class Sampler:
    """Draws tokens as ``sampling`` says. ``seed`` (0 to 2^64 - 1, or None for a random one) is kept in ``.seed``.

    The same seed and logits give the same tokens under any numpy. Raises Usage for a seed out of range.
    """

    def __init__(self, sampling: Sampling, seed: int | None = None) -> None:
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
            raise Usage(repr(seed), field="seed", expected="a whole number from 0 to 18446744073709551615")
        self.sampling = sampling
        self.seed = secrets.randbits(64) if seed is None else seed
        self._rng = np.random.Generator(np.random.PCG64(self.seed))

    def __call__(self, logits: Row, recent: Sequence[int] = ()) -> int:
        """The next token's id. ``recent``: the ids so far; only the last ``repetition_window`` count.

        Raises BadCheckpoint when the row holds NaN or +inf, or nothing but -inf. ``logits`` is not modified.
        """
        s = self.sampling
        if logits.ndim != 1 or not logits.size:
            raise ValueError(f"one row of logits wanted, got shape {logits.shape}")
        if not math.isfinite(logits.max()):  # the maximum is NaN if any entry is
            raise BadCheckpoint("non-finite logits", hint="The weights are damaged, or the precision is too low.")
        row = logits
        if s.repetition_penalty != 1.0 and s.repetition_window and len(recent):
            row = repetition_penalty(row, recent[-s.repetition_window :], s.repetition_penalty)
        if s.temperature == 0.0:
            return int(np.argmax(row))
        ids: NDArray[np.intp] | None = None
        if 0 < s.top_k < row.size:
            ids = top_k_ids(row, s.top_k)
            row = row[ids]
        if s.top_p < 1.0:
            row = top_p(row, s.top_p)
        if s.min_p > 0.0:
            row = min_p(row, s.min_p)
        total = np.cumsum(np.exp(temperature(row, s.temperature)))
        at = int(np.searchsorted(total, self._rng.random() * total[-1], side="right"))
        at = min(at, int(np.searchsorted(total, total[-1])))  # rounding must not land behind the last possible token
        return at if ids is None else int(ids[at])
