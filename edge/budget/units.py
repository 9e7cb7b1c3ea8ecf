"""Sizes in bytes: what a person types and what a person reads."""

from __future__ import annotations

import math
import operator
import re
from fractions import Fraction
from numbers import Integral

from loaders.errors import Usage

LARGEST = 2**60
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")
_SIZE = re.compile(
    r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?) ?(?:(?P<prefix>[kmgt])(?P<binary>i)?)?b?",
    re.IGNORECASE | re.ASCII,
)
_MAX_TEXT = 64


def parse_bytes(text: str | int | float, field: str = "--budget") -> int:
    """Bytes meant by ``text``: '2GB' is 2 * 10**9, '2GiB' is 2 * 2**30, a bare number is bytes; rounded down.

    Units are k, M, G, T, upper or lower case, with an optional B or iB, after at most one space. Raises ``Usage``
    naming ``field`` unless the result lies between 1 and 2**60 bytes.
    """
    size = _from_text(text) if isinstance(text, str) else _from_number(text)
    if size is None:
        raise _refused(text, field, "is not a size")
    if size < 1:
        raise _refused(text, field, "is less than one byte")
    if size > LARGEST:
        raise _refused(text, field, "is more than 2^60 bytes")
    return size


def format_bytes(n: int) -> str:
    """``n`` bytes for a person: three significant digits and decimal units ('1.49 GB', '512 MB', '0 B', '-12.3 MB')."""
    sign, size = ("-" if n < 0 else ""), abs(int(n))
    if size < 1000:
        return f"{sign}{size} B"
    for power, unit in enumerate(_UNITS, start=1):
        scale = 1000**power
        for decimals in (2, 1, 0):
            rounded = (size * 10**decimals * 2 + scale) // (2 * scale)
            if rounded < 1000:
                return f"{sign}{_with_point(rounded, decimals)} {unit}"
    return f"{sign}{rounded} {unit}"


def _with_point(digits: int, decimals: int) -> str:
    text = str(digits)
    return f"{text[:-decimals]}.{text[-decimals:]}" if decimals else text


def _from_text(text: str) -> int | None:
    """Bytes, exact before rounding down; None where the text is no size. A leading minus gives a negative number."""
    body = text.strip()
    negative = body.startswith("-")
    match = _SIZE.fullmatch(body[negative:]) if len(body) <= _MAX_TEXT else None
    if match is None:
        return None
    power = _POWERS[(match["prefix"] or "").lower()]
    size: int = math.floor(Fraction(match["number"]) * (1024 if match["binary"] else 1000) ** power)
    return -size if negative else size


def _from_number(value: object) -> int | None:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return operator.index(value)
    return math.floor(value) if isinstance(value, float) and math.isfinite(value) else None


def _refused(found: object, field: str, why: str) -> Usage:
    # Python refuses to print an int of more than 4300 digits.
    shown = "a huge number" if isinstance(found, int) and found.bit_length() > 200 else repr(found)
    shown = shown if len(shown) <= _MAX_TEXT else shown[: _MAX_TEXT - 1] + "…"
    return Usage(f"{shown} {why}", field=field, expected="a size such as 2GB, 1.5GiB, 512M or 2000000000")
