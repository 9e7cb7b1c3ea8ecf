"""What an engine is. It knows tokens and logits, and nothing of text, prompts or sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from edge.budget.memory import trim
from loaders.network.ops import Want


class Engine(Protocol):
    """One model, loaded, with one cache. Not thread-safe. ``chunk`` is the most tokens one pass takes."""

    name: str
    device: str
    chunk: int

    @property
    def position(self) -> int:
        """Tokens in the cache."""

    def forward(self, ids: np.ndarray, want: Want, ahead: Sequence[int] = ()) -> np.ndarray:
        """Appends ids int64 [t] to the cache; float32 logits [t, vocab], [1, vocab] or [0, vocab] as wanted.

        ``ahead`` comes next: what it needs may be fetched while this is computed.
        """

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 logits [t, vocab] of every position of ids [t], in a cache of their own."""

    def prefetch(self, ids: Sequence[int]) -> None:
        """These tokens come next: whatever can be fetched for them may start now."""

    def relieve(self) -> int:
        """Gives back memory that only makes things faster; the bytes that frees."""

    def reset(self) -> None:
        """Empties the cache."""

    def close(self) -> None:
        """Releases memory, threads and descriptors."""


class Streaming:
    """What engines do alike that have one cache, and rows of a table or None."""

    rows: Any
    cache: Any

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return self.cache.start

    def prefetch(self, ids: Sequence[int]) -> None:
        """Starts the read of the next tokens' rows as soon as they are known."""
        if self.rows is not None:
            self.rows.prefetch(ids)

    def relieve(self) -> int:
        """Shrinks the row cache and hands free heap pages back."""
        freed = 0 if self.rows is None else self.rows.relieve()
        trim()
        return freed

    def reset(self) -> None:
        """Empties the cache."""
        self.cache.reset()
