"""Lines of results turned into one page that needs nothing but a browser."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loaders.errors import Usage
from loaders.formats.atomic import refusal, temporary, umask


def write_report(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the page of ``lines`` (schema 1 of results.jsonl), whole or not at all; replaces what is there.

    Raises Usage when plotly is not installed; CannotCreate, NotPermitted, ReadFailed.
    """
    from edge.profile.report.book import Book
    from edge.profile.report.page import page

    try:
        text = page(Book(tuple(lines)))
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        raise Usage("plotly is not installed", expected="a library that draws", hint="pip install plotly") from None
    write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """A file under its name only when all of it is on disk."""
    try:
        fd, name = tempfile.mkstemp(prefix=temporary(path.name), suffix=".tmp", dir=path.absolute().parent)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(fd)
            os.chmod(name, 0o666 & ~umask())
            os.replace(name, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
    except OSError as error:
        raise refusal(error, path) from None
