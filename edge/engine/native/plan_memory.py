"""Where each buffer lies: offsets once and for all, so that a run allocates nothing.

Two regions: buffers with a row per token, whose offsets are floats per token, and those of a single row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Protocol

from edge.engine.native.values import ARENA, Buffer, Layout

# Floats: a cache line.
ALIGNMENT = 16


class Viewing(Protocol):
    """A step, as far as memory is concerned."""

    @property
    def views(self) -> tuple[Layout | None, ...]:
        """What it reads and writes."""


def aligned(floats: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-floats // ALIGNMENT) * ALIGNMENT


class Region:
    """Memory that grows as needed, with the holes in it: best fit, neighbours joined."""

    def __init__(self) -> None:
        self.size = 0
        self.holes: list[tuple[int, int]] = []  # (start, stop), in order

    def take(self, floats: int) -> int:
        """The start of so many floats."""
        best, room = -1, 0
        for i, (start, stop) in enumerate(self.holes):
            if stop - start >= floats and (best < 0 or stop - start < room):
                best, room = i, stop - start
        if best >= 0:
            start, stop = self.holes[best]
            self.holes[best : best + 1] = [(start + floats, stop)] if room > floats else []
            return start
        # A hole at the end grows.
        start = self.holes.pop()[0] if self.holes and self.holes[-1][1] == self.size else self.size
        self.size = start + floats
        return start

    def give(self, start: int, floats: int) -> None:
        """Makes a hole."""
        stop, at = start + floats, bisect_left(self.holes, (start, 0))
        if at < len(self.holes) and self.holes[at][0] == stop:
            stop = self.holes.pop(at)[1]
        if at > 0 and self.holes[at - 1][1] == start:
            start = self.holes.pop(at - 1)[0]
        insort(self.holes, (start, stop))


def lifetimes(steps: Sequence[Viewing]) -> list[Buffer]:
    """Buffers of the arena in the order of their first use, with first and last set."""
    found: dict[Buffer, None] = {}
    for i, step in enumerate(steps):
        for view in step.views:
            if view is None:
                continue
            buffer = view.buffer
            assert buffer is not None
            if buffer.space == ARENA:
                if buffer not in found:
                    found[buffer] = None
                    buffer.first = i
                buffer.last = i
    return list(found)


def place(steps: Sequence[Viewing]) -> tuple[int, int]:
    """Sets where every buffer lies; returns the floats of a row per token, and of single rows."""
    buffers = lifetimes(steps)
    born: list[list[Buffer]] = [[] for _ in steps]
    dead: list[list[Buffer]] = [[] for _ in steps]
    for buffer in buffers:
        born[buffer.first].append(buffer)
        dead[buffer.last].append(buffer)
    regions = (Region(), Region())
    for new, old in zip(born, dead, strict=True):
        for buffer in sorted(new, key=lambda b: (-b.last, -b.floats)) if len(new) > 1 else new:
            buffer.place = regions[buffer.one].take(aligned(buffer.floats))
        for buffer in old:
            regions[buffer.one].give(buffer.place, aligned(buffer.floats))
    return regions[0].size, regions[1].size
