"""Which model a command means: MODEL, or the demo that ships with edge where none is named."""

from __future__ import annotations

import os
from pathlib import Path

from edge import demo
from edge.cli.show import parameters, stderr
from loaders.errors import MissingFile
from loaders.network.spec import Model
from loaders.network.tensors import total
from loaders.published import config_path, found

PATHS = ("/", "./", "../", "~/")


def model_path(text: str | None) -> Path:
    """What MODEL names, whether or not it is there; None is the demo.

    Raises MissingFile where edge was installed without it, and for the name of a published configuration: that has no
    weights.
    """
    if text is None:
        return demo.model_path()
    refuse_name(text)
    return Path(text)


def shapes_path(text: str | None) -> Path:
    """What MODEL names where shapes are enough: also a published configuration, by its name; None is the demo.

    Raises MissingFile.
    """
    return demo.model_path() if text is None else config_path(text)


def refuse_name(text: str) -> None:
    """Raises MissingFile for a published name, where weights are needed and no folder of that name is there."""
    name = None if os.path.lexists(text) else found(text)
    if name is not None:
        raise MissingFile(
            "no weights",
            file=text,
            expected="a checkpoint folder, a pack or a package",
            hint=f"Only the configuration ships with edge: `edge profile --config {name}` measures it with random "
            f"weights, `edge synth --config {name} -o DIR` writes them",
        )


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
    refuse_name(first)
    raise MissingFile(
        "no such folder",
        file=first or "''",  # a variable that is not set
        expected="a checkpoint folder with config.json, a pack or a package",
        hint="The demo model takes any prompt with -p",
    )
