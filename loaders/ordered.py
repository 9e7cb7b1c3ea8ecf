"""Work done in a pool, its results in order, a few pieces of it under way at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from loaders.errors import BadCheckpoint
from loaders.formats.placed import Placed

T = TypeVar("T")
THREADS = max(2, min(4, os.cpu_count() or 1))


def ordered(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What every job returns, in the order of the jobs; at most ``THREADS`` of them are begun and not yet taken."""
    running: deque[Future[T]] = deque()
    for job in jobs:
        running.append(pool.submit(job))
        if len(running) >= THREADS:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def blaming(placed: Placed, job: Callable[[], T]) -> T:
    """What ``job`` returns; weights that it refuses are refused by the name of their tensor and file."""
    try:
        return job()
    except BadCheckpoint as e:
        raise BadCheckpoint(e.found, file=placed.shard, field=placed.name, expected=e.expected) from None
