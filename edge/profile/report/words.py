"""Numbers for people: three digits, a unit, and nothing where nothing is known."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edge.budget.units import format_bytes

BLANK = "–"


def digits(value: float, count: int = 3) -> str:
    """``count`` significant digits, thousands set apart, never an exponent: 0.0123, 8.24, 16.4, 1,230."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{count - 1}e}")
    power = int(f"{abs(rounded):e}".partition("e")[2])
    return f"{rounded:,.{min(max(count - 1 - power, 0), 6)}f}"


def size(value: float | None) -> str:
    """Bytes: 1.75 GB."""
    return BLANK if value is None else format_bytes(int(value))


def short_size(value: float) -> str:
    """Bytes without zeros that say nothing: 2 GB, 1.5 GB."""
    number, _, unit = format_bytes(int(value)).partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def seconds(value: float | None) -> str:
    """640 ms, 7.1 s, 1 min 10 s."""
    if value is None:
        return BLANK
    if value < 0.9995:
        return f"{digits(value * 1000, 2)} ms" if value < 0.0995 else f"{value * 1000:.0f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes:,} min {rest} s"


def rate(value: float | None, deviation: float | None = None) -> str:
    """Tokens per second, with the deviation where there is one."""
    if value is None:
        return BLANK
    return digits(value) + (f" ± {digits(deviation, 2)}" if deviation else "")


def share(value: float | None) -> str:
    """97%."""
    return BLANK if value is None else f"{value * 100:.0f}%"


def signed_share(value: float | None) -> str:
    """+3.1%, of an error."""
    return BLANK if value is None else f"{value * 100:+.1f}%"


def whole(value: float | None) -> str:
    """4,096."""
    return BLANK if value is None else f"{value:,.0f}"


def times(value: float | None) -> str:
    """1.44x."""
    return BLANK if value is None else f"{digits(value)}x"


def span(values: Sequence[float], text: str = "") -> str:
    """The least and the most: 8.24 to 20.1; one number where they read the same."""
    least, most = digits(min(values)), digits(max(values))
    return (least if least == most else f"{least} to {most}") + text


def listed(names: Sequence[str], most: int = 4) -> str:
    """A, B and C; A, B, C, D and 3 more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def spaced(text: str) -> str:
    """A budget as it was typed, with a space before its unit: 2 GB."""
    return re.sub(r"(?<=\d)(?=[A-Za-z])", " ", text.strip(), count=1)
