"""Processes of edge's own modules. What lies in the current folder is not ours, and is not imported there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def module_command(name: str, *arguments: str) -> list[str]:
    """The command of a module of edge; ``python -m`` alone would look for modules in the current folder first."""
    return [sys.executable, "-P", "-m", name, *arguments]


def module_environment() -> dict[str, str]:
    """What such a process needs to find edge, where it runs from a checkout that nobody has installed."""
    found = dict(os.environ)
    if (ROOT / "pyproject.toml").exists():
        before = found.get("PYTHONPATH")
        found["PYTHONPATH"] = str(ROOT) + (os.pathsep + before if before else "")
    return found
