"""What was measured of a model: the loss of a slice at a precision on a text, kept beside the weights it is of.

A checkpoint's folder may hold it as ``edge-measured.json``, the root manifest of a pack holds the same list. Whoever
wrote it is not known: it steers which slice is chosen, so it is checked like everything else before it is believed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loaders.errors import BadCheckpoint, Unsupported, Usage
from loaders.formats.config import MIB, Config, read_json, short, show
from loaders.formats.recipe import PRECISIONS, Recipe, recipes
from loaders.network.matformer import Slice, validate
from loaders.network.spec import Model

NAME = "edge-measured.json"
FORMAT, VERSION = "edge measured", 1
MOST, MOST_BYTES = 1024, 4 * MIB
# Letters of a name: one width for each of some sixty layers, spelt out.
MOST_NAME = 600
# Nats, and bits, that no model reaches: one that knows nothing of a million tokens loses 14 nats.
MOST_LOSS = 1e6
# A model compared with itself: rounding may leave the divergence a hair below zero.
LEAST_KL = -1e-3
HEX = re.compile(r"[0-9a-f]{64}")
HINT = f"Take {NAME} away to go on without what was measured"


@dataclass(frozen=True)
class Measured:
    """One evaluation of a slice at a precision.

    ``name``: the slice's, for people; ``keep`` and ``widths``: its source layers, and the FFN width of each.
    ``precision`` and ``head``: as in :class:`Recipe`. ``loss``: nats per token, over ``tokens`` scored tokens that saw
    at most ``context`` tokens, in windows that moved on by ``stride`` (0: not said). ``text``: SHA-256 (hex) of the
    text scored; results on different texts, or in other windows, do not compare. ``kl`` (nats) and ``top1`` (a share)
    compare with the unquantized full model, None where nothing was compared.
    """

    name: str
    keep: tuple[int, ...]
    widths: tuple[int, ...]
    precision: str
    head: str
    loss: float
    bits_per_byte: float
    tokens: int
    context: int
    text: str
    kl: float | None = None
    top1: float | None = None
    stride: int = 0

    @property
    def part(self) -> Slice:
        """What was run."""
        return Slice(self.name, self.keep, self.widths)

    @property
    def recipe(self) -> Recipe:
        """What its weights were kept in."""
        return Recipe(self.precision, self.head)

    @property
    def key(self) -> tuple[object, ...]:
        """What it is a result of: another with the same key takes its place."""
        return self.keep, self.widths, self.precision, self.head, *self.ground

    @property
    def ground(self) -> tuple[int, int, str]:
        """What results must share to compare."""
        return self.context, self.stride, self.text

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, as :func:`parse` takes it."""
        found = asdict(self)
        return {**found, "keep": list(self.keep), "widths": list(self.widths)}


def parse(found: Any, file: str | os.PathLike[str], model: Model) -> tuple[Measured, ...]:
    """A list of results from a file, each of a slice of ``model``.

    Raises BadCheckpoint or Unsupported, naming the entry and the key.
    """
    if not isinstance(found, list):
        raise bad(show(found), file, "measured", "a list")
    if len(found) > MOST:
        raise bad(f"{len(found)} results", file, "measured", f"at most {MOST}")
    results = tuple(_entry(value, os.fspath(file), f"measured[{i}]", model) for i, value in enumerate(found))
    if len({result.key for result in results}) != len(results):
        raise bad("the same slice, precision, text and context twice", file, "measured", "each result once")
    return results


def merge(old: Iterable[Measured], new: Iterable[Measured]) -> tuple[Measured, ...]:
    """Both, a new result in the place of an old one of the same."""
    return tuple({result.key: result for result in (*old, *new)}.values())


def plain(results: Iterable[Measured]) -> list[dict[str, Any]]:
    """Results as data for JSON."""
    return [result.as_dict() for result in results]


def load(folder: Path, model: Model) -> tuple[Measured, ...]:
    """What lies beside a checkpoint's weights; nothing where there is no such file.

    Raises what reading JSON and :func:`parse` raise.
    """
    path = folder / NAME
    if not os.path.lexists(path):
        return ()
    try:
        config = Config(read_json(path, MOST_BYTES), str(path))
        if config.raw("format") != FORMAT:
            raise bad(show(config.raw("format")), path, "format", f'"{FORMAT}"')
        if config.int("version", low=0) != VERSION:
            found = f"version {show(config.raw('version'))}"
            raise Unsupported(found, file=path, field="version", expected=str(VERSION))
        results = parse(config.raw("measured"), path, model)
        config.finish()
    except (BadCheckpoint, Unsupported) as e:
        raise type(e)(e.found, file=e.file, field=e.field, expected=e.expected, hint=HINT) from None
    return results


def dump(results: Iterable[Measured]) -> bytes:
    """The file that :func:`load` reads."""
    data = {"format": FORMAT, "version": VERSION, "measured": plain(results)}
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def bad(found: str, file: str | os.PathLike[str], field: str, expected: str) -> BadCheckpoint:
    """A result that cannot be."""
    return BadCheckpoint(found, file=file, field=field, expected=expected)


def _entry(value: Any, file: str, at: str, model: Model) -> Measured:
    if not isinstance(value, dict):
        raise bad(show(value), file, at, "an object")
    config = Config(value, file, at)
    precision = config.str("precision", choices=PRECISIONS)
    found = Measured(
        name=config.str("name"),
        keep=config.ints("keep", low=0),
        widths=config.ints("widths"),
        precision=precision,
        head=config.str("head", choices=tuple(recipe.head for recipe in recipes(precision))),
        loss=config.float("loss", low=0.0, high=MOST_LOSS),
        bits_per_byte=config.float("bits_per_byte", low=0.0, high=MOST_LOSS),
        tokens=config.int("tokens", high=2**53),
        context=config.int("context"),
        text=config.str("text"),
        kl=config.float("kl", default=None, low=LEAST_KL, high=MOST_LOSS),
        top1=config.float("top1", default=None, high=1.0),
        stride=config.int("stride", default=0, low=0),
    )
    config.finish()
    if not (0 < len(found.name) <= MOST_NAME and found.name.isprintable()):
        raise bad(f'"{short(found.name)}"', file, f"{at}.name", f"1 to {MOST_NAME} printable characters")
    if not HEX.fullmatch(found.text):
        raise bad(f'"{short(found.text)}"', file, f"{at}.text", "64 hexadecimal digits")
    if found.top1 is not None and found.top1 < 0:
        raise bad(f"{found.top1}", file, f"{at}.top1", "0 to 1")
    try:
        validate(model, found.part)
    except Usage as error:
        raise bad(f"{error.found}", file, at, f"a slice of this model: {error.expected}") from None
    return found
