"""HTML in which whatever is not known to be markup is escaped."""

from __future__ import annotations

import html
import json
from typing import Any

from loaders.errors import printable

VOID = {"br", "meta", "link", "img", "hr", "col"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def safe(child: object) -> str:
    """HTML of a child: markup as it is, None as nothing, the rest escaped and without control characters."""
    if isinstance(child, Markup):
        return child
    return "" if child is None else html.escape(printable(child))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. ``class_`` and ``data_label`` become ``class`` and ``data-label``; None is left out."""
    out = [f"<{name}"]
    for key, value in attributes.items():
        written = key.rstrip("_").replace("_", "-")
        if value is True:
            out.append(f" {written}")
        elif value is not None and value is not False:
            out.append(f' {written}="{html.escape(printable(value))}"')
    out.append(">")
    if name not in VOID:
        out += [safe(child) for child in children] + [f"</{name}>"]
    return Markup("".join(out))


def join(*children: object) -> Markup:
    """Children in a row."""
    return Markup("".join(safe(child) for child in children))


def label(text: object) -> str:
    """Text for the inside of a chart, which reads a little HTML: none of it is left to be read."""
    return html.escape(printable(text), quote=False)


def json_text(data: Any) -> Markup:
    """JSON for the inside of a script element. Raises ValueError for NaN and infinities, which JSON does not have."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
