"""Whether a figure got better or worse by more than the figures of two such runs differ by chance.

A figure's ratio, new to old, is held against a range that it may lie in without meaning anything. All of it is done
with logarithms of ratios: they are symmetric, so files swapped say the opposite and nothing else. The range is the
widest of

* Welch's interval for the difference of two means of unequal variances (B. L. Welch, "The generalization of
  'Student's' problem when several different population variances are involved", Biometrika 34, 1947, 28-35), at 99%:
  t * sqrt(e1^2 + e2^2), where e = deviation / (mean * sqrt(count)) is the standard error of a mean's logarithm to first
  order, and t is Student's for (e1^2 + e2^2)^2 / (e1^4 / (n1 - 1) + e2^4 / (n2 - 1)) degrees of freedom. That is for
  two counts above one; of a single value nobody knows how far it strays;
* a floor: ``SPEED``, ``MEMORY``, or ``SINGLE`` for times, latencies, joules and whatever was measured once;

and what hangs on time gets ``NOISY`` more where a side was measured among others' work, and is allowed to have changed
as much, and in the same direction, as memory itself was faster or slower to read.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

Verdict = Literal["same", "better", "worse"]
# How much larger the larger of two figures may be.
SPEED, MEMORY, SINGLE, NOISY = 0.03, 0.01, 0.10, 0.10
# Student's t for 99%, two-sided, by degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.2). One is left out: an
# interval of 64 standard errors, for two values a side, would let anything pass; there are two at least.
STUDENT = ((2, 9.925), (3, 5.841), (4, 4.604), (5, 4.032), (6, 3.707), (8, 3.355), (10, 3.169), (15, 2.947),
           (20, 2.845), (30, 2.750), (60, 2.660), (math.inf, 2.576))  # fmt: skip
# Figures whose logarithms, squares and quotients are numbers too.
SMALLEST, LARGEST = 1e-60, 1e60


@dataclass(frozen=True)
class Sample:
    """Mean and sample deviation of ``count`` values."""

    mean: float
    deviation: float = 0.0
    count: int = 1


@dataclass(frozen=True)
class Kind:
    """What a figure is of. ``floor``: see above; ``timed``: whether it hangs on how fast the machine was."""

    unit: str
    higher: bool = False
    floor: float = SINGLE
    timed: bool = True


RATE, TIME, DELAY = Kind("tokens/s", True, SPEED), Kind("s"), Kind("ms")
BYTES, JOULES = Kind("bytes", floor=MEMORY, timed=False), Kind("J/token")


@dataclass(frozen=True)
class Figure:
    """One figure of both. ``ratio``: new to old, None where that is no number; ``low`` to ``high``: no difference."""

    name: str
    unit: str
    old: float
    new: float
    ratio: float | None
    low: float
    high: float
    verdict: Verdict


def judged(name: str, kind: Kind, old: Sample, new: Sample, drift: float, noisy: bool) -> Figure:
    """A figure of both. ``drift``: of the logarithm of how fast memory was read, 0 where that does not matter."""
    floor = max(kind.floor, SINGLE) if kind.timed and min(old.count, new.count) < 2 else kind.floor
    bound = max(math.log1p(floor), interval(old, new)) + (math.log1p(NOISY) if noisy else 0.0)
    shift = drift if kind.higher else -drift
    low, high = min(0.0, shift) - bound, max(0.0, shift) + bound
    change = math.log(new.mean) - math.log(old.mean) if old.mean > 0 < new.mean else math.inf * (new.mean - old.mean)
    # A figure that lies on the edge, give or take what rounding does, is within.
    slack = 1e-9
    verdict: Verdict = "same"
    if not low - slack <= change <= high + slack:
        verdict = "better" if (change > 0) == kind.higher else "worse"
    ratio = math.exp(change) if change < math.inf else None
    return Figure(name, kind.unit, old.mean, new.mean, ratio, math.exp(low), math.exp(min(high, 600.0)), verdict)


def interval(old: Sample, new: Sample) -> float:
    """Half of Welch's, of the logarithm of the ratio; 0 where a side is a single value or no number."""
    if min(old.count, new.count) < 2 or min(old.mean, new.mean) <= 0:
        return 0.0
    squares = [(s.deviation / s.mean) ** 2 / s.count for s in (old, new)]
    total = sum(squares)
    if not 0 < total < math.inf:
        return 0.0 if total == 0 else 600.0
    # Of shares of the whole: fourth powers of small numbers are nothing.
    freedom = 1 / sum((x / total) ** 2 / (s.count - 1) for x, s in zip(squares, (old, new), strict=True))
    return min(600.0, student(freedom) * math.sqrt(total))


def student(freedom: float) -> float:
    """Of a table; between its rows straight in 1 / degrees, which is a little too wide."""
    if freedom <= STUDENT[0][0]:
        return STUDENT[0][1]
    for (n, t), (more, less) in pairwise(STUDENT):
        if freedom <= more:
            share = (1 / freedom - 1 / more) / (1 / n - 1 / more)
            return less + share * (t - less)
    return STUDENT[-1][1]


def sample(value: Any) -> Sample | None:
    """Of mean, deviation and values, as far as they are there, or of a number. None for all else."""
    if not isinstance(value, dict):
        alone = number(value)
        return None if alone is None else Sample(alone)
    values = value.get("values")
    known = [n for n in map(number, values) if n is not None] if isinstance(values, list) else []
    mean, deviation = number(value.get("mean")), number(value.get("deviation"))
    if mean is None and known:
        mean = statistics.fmean(known)
    if deviation is None:
        deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return None if mean is None else Sample(mean, deviation, max(1, len(known)))


def number(value: Any) -> float | None:
    """A number of a size that things have, or 0; None for anything else."""
    if type(value) not in (int, float) or not (value == 0 or SMALLEST < value < LARGEST):
        return None
    return float(value)
