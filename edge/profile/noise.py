"""Whether a machine was quiet while something was measured: how fast memory read before and after, and who else worked.

A noisy machine cannot be made quiet from here, but a figure can say what it was measured among.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType
from typing import Any, Self

import psutil

from edge.budget.machine import measured_bandwidth

# How much less memory may read at one end than at the other, and how many cores others may keep busy.
CHANGED, BUSY = 0.25, 0.2


def busy_seconds() -> float:
    """What all processors have worked, for anybody, since the machine started; time stolen by a hypervisor too."""
    times = psutil.cpu_times()._asdict()
    return float(sum(times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")))


def own_seconds() -> float:
    """What this process and its children that ended have worked."""
    return sum(os.times()[:4])


@dataclass
class Around:
    """Enter it around what is measured. Rates are bytes per second; ``others``: cores that others kept busy."""

    bandwidth: Callable[[], float] = measured_bandwidth
    before: float = 0.0
    after: float = 0.0
    others: float = 0.0
    _start: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0), repr=False)

    def __enter__(self) -> Self:
        self.before = self.bandwidth()
        self._start = monotonic(), busy_seconds(), own_seconds()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        began, busy, own = self._start
        wall = max(monotonic() - began, 1e-9)
        self.others = max(0.0, busy_seconds() - busy - (own_seconds() - own)) / wall
        # Whoever interrupts does not want to wait for a figure.
        self.after = self.before if kind is not None else self.bandwidth()

    def as_dict(self) -> dict[str, Any]:
        """``noise`` of a line of results."""
        why = []
        if abs(self.before - self.after) > CHANGED * max(self.before, self.after):
            why.append(f"memory read {self.before / 1e9:.1f} GB/s before and {self.after / 1e9:.1f} after")
        if self.others > BUSY:
            why.append(f"other programs kept {self.others:.1f} cores busy")
        return {"noisy": bool(why), "why": why, "others_cores": round(self.others, 3)}
