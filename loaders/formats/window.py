"""Parts of a tensor: ranges of its rows and columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Window:
    """Half-open ranges in elements: rows on axis 0, cols on the other axes flattened (None: there are none)."""

    rows: Ranges
    cols: Ranges | None

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int]], cols: Iterable[tuple[int, int]] | None = None) -> Window:
        """With empty ranges dropped and touching neighbours merged; the order is kept."""
        return cls(_merged(rows), None if cols is None else _merged(cols))

    @classmethod
    def full(cls, shape: Sequence[int]) -> Window:
        """All of a tensor; beyond two dimensions as [shape[0], product of the rest]."""
        rows = ((0, shape[0] if shape else 1),)
        return cls(rows, ((0, math.prod(shape[1:])),) if len(shape) > 1 else None)

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows] or [rows, columns]."""
        return tuple(sum(b - a for a, b in ranges) for ranges in (self.rows, self.cols) if ranges is not None)

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    out: list[tuple[int, int]] = []
    for a, b in ranges:
        if out and out[-1][1] == a and a <= b:
            out[-1] = (out[-1][0], b)
        elif a != b:
            out.append((a, b))
    return tuple(out)
