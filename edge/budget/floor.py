"""``python -m edge.budget.floor ENGINE DEVICE``: what a run takes before any weight, printed as one line of JSON."""

from __future__ import annotations

import json
import sys

from edge import engine as engines
from edge.budget.machine import reported
from edge.cli import run  # noqa: F401 - what the command line has in memory too
from loaders.errors import EdgeError


def main() -> None:
    """Starts the engine as ``edge run`` does and says what is resident then."""
    try:
        runtime = engines.start(*sys.argv[1:3])
    except EdgeError as error:
        print(json.dumps(reported(error)))
        return
    floor = runtime.floor()
    print(json.dumps({"host": floor.host, "device": floor.device, "engine": runtime.engine, "on": runtime.device}))


if __name__ == "__main__":
    main()
