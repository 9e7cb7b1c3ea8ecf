"""What is measured of one engine in one process, the same for each: prefill, decoding, decoding far in, memory.

Runs in edge's environment and in that of its peers: imports nothing that imports more than the standard library.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from edge.profile.peer_child import decode, feed_all, memory

WARM = 16


class Engine(Protocol):
    """``feed`` appends ids and returns once the logits of the last can be read."""

    def feed(self, ids: Sequence[int]) -> None: ...

    def reset(self) -> None: ...


@dataclass(frozen=True)
class Asked:
    """``file``: the weights; ``context``: tokens there must be room for, at least as many as are asked of it.

    ``short``, ``long``: tokens of context after which ``new`` more are decoded; 0: not asked. ``ple``: where edge
    leaves a table of per-layer embeddings.
    """

    file: str
    vocab: int
    threads: int
    context: int
    prompt: int
    short: int
    new: int
    long: int = 0
    ple: str = "auto"

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))


def asked() -> Asked:
    """The last argument of the command line."""
    return Asked(**json.loads(sys.argv[-1]))


def decode_tps(engine: Engine, ids: Sequence[int]) -> float:
    """Tokens a second, one by one; of the median token."""
    return 1 / statistics.median(decode(engine, ids))


def prefill_tps(engine: Engine, ids: Sequence[int]) -> float:
    """Tokens a second, as many at once as engines are given."""
    tokens, seconds = feed_all(engine, ids)[-1]
    return tokens / seconds


def measure(engine: Engine, what: Asked) -> dict[str, Any]:
    """Tokens a second: ``prefill_tps``, ``decode_tps`` and, where asked, ``long_tps`` and ``long_prefill_tps``."""
    ids = random.Random(0).choices(range(4, what.vocab), k=what.context)
    new = ids[-what.new :]
    # The first pass of each kind finds pages, threads and code that are not there yet.
    engine.feed(ids[:WARM])
    engine.feed(ids[:1])
    engine.reset()
    engine.feed(ids[: what.short])
    found = {"decode_tps": decode_tps(engine, new)}
    engine.reset()
    found["prefill_tps"] = prefill_tps(engine, ids[: what.prompt])
    if what.long:
        rest = ids[what.prompt : what.long]
        found["long_prefill_tps"] = prefill_tps(engine, rest)
        found["long_tps"] = decode_tps(engine, new)
    return {**found, **memory()}


def report(facts: dict[str, Any]) -> None:
    """The last line of a process's output."""
    print(json.dumps(facts), flush=True)
