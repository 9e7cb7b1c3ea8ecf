"""llama.cpp in a process of its own. Started by benchmarks/peers.py in the environment of its peers: ASKED."""

from __future__ import annotations

from time import perf_counter

from benchmarks.peers_measure import asked, measure, report
from edge.profile.peer_child import Llama, Refused, version


def main() -> None:
    """Measures what the command line asks for."""
    what, start = asked(), perf_counter()
    try:
        engine = Llama(what.file, what.context, what.threads)
        facts = {"load_s": perf_counter() - start, "version": version(), "plan": engine.extensions()}
        report({**facts, **measure(engine, what)})
    except Refused as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
