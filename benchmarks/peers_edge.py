"""edge in a process of its own, on a pack or a package. Started by benchmarks/peers.py: ENGINE PLE ASKED."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import edge
from benchmarks.peers_measure import asked, measure, report
from edge.session import Session


class Edge:
    """A session as an engine of the benchmark."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def feed(self, ids: Sequence[int]) -> None:
        if len(ids) == 1:
            self.session.prefetch(ids[0])
        self.session.step(ids)

    def reset(self) -> None:
        self.session.reset()


def main() -> None:
    """Measures what the command line asks for."""
    engine, ple = sys.argv[1:3]
    what = asked()
    pinned: dict[str, Any] = {} if engine == "ort" else {"precision": "int4", "slice": "full", "ple": ple}
    with edge.load(what.file, engine=engine, context=what.context, **pinned) as session:
        plan = session.plan
        facts = {"load_s": session.load_s, "version": f"edge {edge.__version__}", "planned_bytes": plan.total_bytes}
        label = f"{plan.label()}, {plan.kv} cache, chunks of {plan.chunk}"
        report({**facts, "plan": label, "bytes_per_token": plan.bytes_per_token, **measure(Edge(session), what)})


if __name__ == "__main__":
    main()
