"""Published configurations that ship with edge, by name: to plan, to measure and to fill with random weights before
anything is downloaded.
"""

from __future__ import annotations

import difflib
import os
from functools import cache
from pathlib import Path

from loaders.errors import MissingFile

FOLDER = Path(__file__).parent / "configs"
SUFFIX = ".json"
# Longer than any name there is: text from outside is compared with all of them.
LONGEST = 100


@cache
def names() -> tuple[str, ...]:
    """Every name, sorted: ``gemma-3n-E2B``."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*" + SUFFIX)))


def found(text: str) -> str | None:
    """The published name that ``text`` is, in any case and with or without '.json'; None where it is none."""
    wanted = text.casefold().removesuffix(SUFFIX)
    return next((name for name in names() if name.casefold() == wanted), None)


def published(name: str) -> Path:
    """The config.json of that name. Raises MissingFile, with the nearest names."""
    known = found(name)
    if known is None:
        raise MissingFile("no published configuration of that name", file=name or "''", hint=nearest(name))
    return FOLDER / (known + SUFFIX)


def config_path(text: str) -> Path:
    """A file or folder as it is given, else the published config.json of that name.

    Raises MissingFile where it is neither, with the nearest names.
    """
    if os.path.lexists(text):
        return Path(text)
    if found(text) is None:
        raise MissingFile(
            "no such file, and no published configuration of that name",
            file=text or "''",
            expected="a config.json, a folder that holds one, or a name",
            hint=nearest(text),
        )
    return published(text)


def nearest(text: str) -> str:
    """Which names ``text`` may have meant; all of them for a word that is like none, the way to them for a path."""
    known = {name.casefold(): name for name in names()}
    wanted = os.path.basename(text[-LONGEST:]).casefold().removesuffix(SUFFIX)
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    near = near or [name for name in known if wanted and name.startswith(wanted)][:3]
    if near:
        return "Is it " + " or ".join(known[name] for name in near) + "?"
    if os.path.basename(text) != text:
        return "`edge synth --help` lists the published names"
    return "Published names: " + ", ".join(names())
