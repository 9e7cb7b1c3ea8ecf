"""Protobuf's wire format, walked and not built: nothing is kept, and whatever a message should not hold is refused.

Stricter than any parser: every field is one the message is said to have, of the type it has, once where it may be
there once, within the message it is in, and numbers are spelled in their shortest way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from loaders.errors import BadCheckpoint

Span = tuple[int, int]

MOST_FIELDS = 1_000_000
MOST_NAME = 1024
INT, F64, BYTES, F32 = 0, 1, 2, 5
WIDTH = {F64: 8, F32: 4}
ONCE, MANY, PACKED = range(3)


class Message(NamedTuple):
    """The fields a message may have: tag -> ONCE, MANY, or PACKED for many numbers in one field.

    ``refused``: what some that it may not have are called.
    """

    name: str
    tags: Mapping[int, int]
    refused: Mapping[int, str]


def message(name: str, one: dict[int, int], many: dict[int, int] | None = None, **refused: int) -> Message:
    """Of field number -> wire type. Repeated numbers may also come packed."""
    tags = {number << 3 | wire: ONCE for number, wire in one.items()}
    for number, wire in (many or {}).items():
        tags[number << 3 | BYTES] = PACKED
        tags[number << 3 | wire] = MANY
    return Message(name, tags, {number: what for what, number in refused.items()})


def texts(*numbers: int) -> dict[int, int]:
    """Fields that are bytes: strings and messages."""
    return dict.fromkeys(numbers, BYTES)


def signed(value: int) -> int:
    """A varint as int64."""
    return value - (1 << 64) if value >> 63 else value


class Wire:
    """The bytes of one file. Reads at most MOST_FIELDS fields of it, counted over all messages."""

    def __init__(self, data: bytes, file: str) -> None:
        self.data, self.file, self.left = data, file, MOST_FIELDS
        self.known: dict[bytes, str] = {}

    def bad(self, found: str, at: int, where: str, expected: str | None = None) -> BadCheckpoint:
        """Something at byte ``at``."""
        return BadCheckpoint(f"{found} at byte {at}", file=self.file, field=where, expected=expected)

    def varint(self, at: int, end: int, where: str) -> Span:
        """(an unsigned integer of 64 bits, where the next thing begins)."""
        value = 0
        for i in range(at, min(end, at + 10)):
            byte = self.data[i]
            value |= (byte & 127) << 7 * (i - at)
            if byte < 128:
                if (byte == 0 and i > at) or value >> 64:
                    raise self.bad("an overlong number", at, where)
                return value, i + 1
        raise self.bad("an overlong number" if end - at >= 10 else "cut off in a number", at, where)

    def fields(self, span: Span, kind: Message) -> Iterator[tuple[int, int, int]]:
        """(number, first, last) of each field: the span of bytes or of a fixed number; of a varint, itself and -1.

        Numbers that came packed are a span under their negative number. Raises BadCheckpoint.
        """
        data, tags, (at, end), seen = self.data, kind.tags, span, 0
        while at < end:
            self.left -= 1
            if self.left < 0:
                raise self.bad(f"more than {MOST_FIELDS} fields", at, kind.name)
            start, tag = at, data[at]
            at += 1
            if tag >= 128:
                tag, at = self.varint(start, end, kind.name)
            times = tags.get(tag)
            if times is None:
                raise self.unknown(tag, start, kind)
            number, wire = tag >> 3, tag & 7
            if times == ONCE:
                if seen >> number & 1:
                    raise self.bad(f"field {number} a second time", start, kind.name)
                seen |= 1 << number
            if wire in WIDTH:
                size = WIDTH[wire]
            elif at < end and data[at] < 128:
                size, at = data[at], at + 1
            else:
                size, at = self.varint(at, end, kind.name)
            if wire == INT:
                yield number, size, -1
                continue
            if size > end - at:
                raise self.bad(f"{size} bytes where {end - at} are left", start, kind.name)
            yield (-number if times == PACKED else number), at, at + size
            at += size

    def numbers(self, span: Span, wire: int, where: str) -> Iterator[tuple[int, int]]:
        """Packed numbers, as :meth:`fields` would give them one by one: (first, last)."""
        at, end = span
        if wire in WIDTH and (end - at) % WIDTH[wire]:
            raise self.bad(f"{end - at} bytes of packed numbers", at, where, f"a multiple of {WIDTH[wire]}")
        while at < end:
            self.left -= 1
            if self.left < 0:
                raise self.bad(f"more than {MOST_FIELDS} fields", at, where)
            if wire in WIDTH:
                yield at, at + WIDTH[wire]
                at += WIDTH[wire]
            else:
                value, at = self.varint(at, end, where)
                yield value, -1

    def unknown(self, tag: int, at: int, kind: Message) -> BadCheckpoint:
        """A field that is not one of these, or of another type."""
        number, wire = tag >> 3, tag & 7
        if number in kind.refused:
            return self.bad(kind.refused[number], at, kind.name, "none")
        if any(known >> 3 == number for known in kind.tags):
            return self.bad(f"field {number} with wire type {wire}", at, kind.name, "the type it has")
        return self.bad(f"unknown field {number}", at, kind.name, "fields that packages use")

    def text(self, first: int, last: int, where: str) -> str:
        """A short string."""
        if last - first > MOST_NAME:
            raise self.bad(f"{last - first} bytes of text", first, where, f"at most {MOST_NAME}")
        raw = self.data[first:last]
        found = self.known.get(raw)
        if found is None:
            try:
                found = self.known[raw] = raw.decode()
            except UnicodeDecodeError:
                raise self.bad("text that is not UTF-8", first, where) from None
        return found
