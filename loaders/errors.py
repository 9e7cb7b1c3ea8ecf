"""The errors edge raises on purpose, each with the exit code the command line ends with.

A message is one line: where, which field, what was found, what was expected, what to do.
"""

from __future__ import annotations

import os

MAX_MESSAGE = 600


def printable(text: object) -> str:
    """Control characters and lone surrogates escaped: names come from files that nobody vouches for."""
    out = []
    for c in str(text):
        if c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF:
            out.append(c)
        else:
            out.append(c.encode("unicode_escape", "surrogatepass").decode("ascii"))
    joined = "".join(out)
    return joined if len(joined) <= MAX_MESSAGE else joined[: MAX_MESSAGE - 1] + "…"


class EdgeError(Exception):
    """Base of everything edge raises on purpose; anything else that escapes is a bug (exit 70)."""

    exit_code = 70

    def __init__(
        self,
        found: object,
        *,
        file: str | os.PathLike[str] | None = None,
        field: str | None = None,
        expected: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.file = os.fspath(file) if file is not None else None
        self.field, self.found, self.expected, self.hint = field, found, expected, hint
        head = "".join(f"{printable(part)}: " for part in (self.file, field) if part)
        text = head + printable(found)
        if expected is not None:
            text += f" (expected {printable(expected)})"
        super().__init__(text + (f". {printable(hint)}" if hint else ""))


class Usage(EdgeError):
    """The command line or an API argument is wrong."""

    exit_code = 2


class BadCheckpoint(EdgeError):
    """A file says something that cannot be true; it is refused, never run."""

    exit_code = 65


class MissingFile(EdgeError):
    """A file that is needed is not there, or is not a regular file."""

    exit_code = 66


class ParityFailed(EdgeError):
    """What was written does not compute what it was written from computes: a bug, but one that was looked for."""


class CannotCreate(EdgeError):
    """The output cannot be created."""

    exit_code = 73


class ReadFailed(EdgeError):
    """Reading or writing failed after the file had been accepted: I/O error, short read, full disk."""

    exit_code = 74


class NotPermitted(EdgeError):
    """The operating system refuses access."""

    exit_code = 77


class Unsupported(EdgeError):
    """The file is sound, but asks for a mechanism that edge does not implement."""

    exit_code = 78


class WontFit(EdgeError):
    """Nothing fits the budget. ``needed`` and ``budget`` are bytes; ``needed`` is the smallest total that would do."""

    exit_code = 80

    def __init__(self, found: object, *, needed: int, budget: int, hint: str | None = None) -> None:
        super().__init__(found, hint=hint)
        self.needed, self.budget = needed, budget


class OverBudget(EdgeError):
    """Stopped while running, because going on would break the budget."""

    exit_code = 81
