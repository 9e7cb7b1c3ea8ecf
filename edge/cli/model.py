"""Which model a command means: MODEL, or the demo that ships with edge where none is named."""

from __future__ import annotations

import os
from pathlib import Path

from edge import demo
from edge.cli.show import parameters, stderr
from loaders.errors import MissingFile
from loaders.network.spec import Model
from loaders.network.tensors import total

PATHS = ("/", "./", "../", "~/")


def model_path(text: str | None) -> Path:
    """What MODEL names, whether or not it is there; None is the demo.

    Raises MissingFile where edge was installed without it.
    """
    return demo.model_path() if text is None else Path(text)


def say_demo(text: str | None, model: Model) -> None:
    """One line on stderr where MODEL was not named; ``model`` is what was opened instead."""
    if text is None:
        what = f"the demo that ships with edge ({parameters(total(model) / 1e9)} parameters, tales)"
        stderr().print(f"model: {what}; name a checkpoint folder to use another", markup=False, soft_wrap=True)


def told_apart(first: str | None, second: str | None, flag: str | None) -> tuple[str | None, str | None]:
    """(MODEL, PROMPT) of the arguments ``first`` and ``second``; ``flag`` is the prompt of -p.

    One argument alone is MODEL where it names something that exists. Else text of several words is PROMPT, for the
    demo, and so is '-', standard input. Raises MissingFile for a single word, and for what begins as paths do: more
    likely a MODEL that is not there.
    """
    if first is None or second is not None or flag is not None or os.path.lexists(first):
        return first, second
    if first == "-" or (any(c.isspace() for c in first) and not first.startswith(PATHS)):
        return None, first
    raise MissingFile(
        "no such folder",
        file=first or "''",  # a variable that is not set
        expected="a checkpoint folder with config.json, a pack or a package",
        hint="The demo model takes any prompt with -p",
    )
