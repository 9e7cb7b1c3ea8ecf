"""Split patterns: the part of Oniguruma's language that published tokenizers use, said in Python's.

Character classes come as ranges that were taken from the library, for Python's own tables are of another Unicode
version. A pattern is parsed here and written anew; what the grammar does not know raises Unsupported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from loaders.errors import Unsupported

Ranges = Sequence[tuple[int, int]]  # first and last code point, both inside

# Unicode's White_Space, and so \s of the library's other regex engine; stable since Unicode 6.3.
WHITE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
KINDS = ("Lu", "Ll", "Lt", "Lm", "Lo", "M", "N", "P", "S", "s")  # disjoint; s is \s
MAX_PATTERN = 2048
_TOKEN = re.compile(
    r"(?P<kind>\\p\{[A-Z][a-z]?\}|\\[sS])"
    r"|(?P<set>\[\^?(?:\\p\{[A-Z][a-z]?\}|\\[^\W\d_a-oq-z]|\\.|[^\\\[\]])+\])"
    r"|(?P<open>\(\?(?:i:|:|!))|(?P<close>\))|(?P<bar>\|)"
    r"|(?P<times>(?:[?*+]|\{\d{1,2}(?:,\d{0,2})?\}))(?P<own>\+?)"
    r"|(?P<char>\\[rnt\W]|[^\\\[\]{}().^$|?*+])",
    re.DOTALL,
)
_ITEM = re.compile(r"\\p\{(?P<kind>[A-Z][a-z]?)\}|\\(?P<white>s)|(?P<char>\\[rnt\W]|[^\\\[\]])", re.DOTALL)
_ESCAPES = {"r": "\r", "n": "\n", "t": "\t"}


def names(kind: str) -> tuple[str, ...]:
    """The disjoint classes that make up ``\\p{kind}``, or ``s``. Raises Unsupported for an unknown one."""
    if kind == "L":
        return KINDS[:5]
    if kind in KINDS:
        return (kind,)
    raise Unsupported(f"\\p{{{kind}}}", field="pattern")


def used(pattern: str) -> set[str]:
    """The classes that a pattern needs. Raises Unsupported."""
    found = {part for kind in re.findall(r"\\p\{(\w+)\}", pattern) for part in names(kind)}
    return found | ({"s"} if re.search(r"\\[sS]", pattern) else set())


def charset(ranges: Iterable[tuple[int, int]], negated: bool = False) -> str:
    """A bracket expression; of no ranges at all, one that never (or always) matches."""
    merged: list[list[int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    if not merged:
        return r"[\s\S]" if negated else r"[^\s\S]"
    body = "".join(f"\\U{low:08x}" + (f"-\\U{high:08x}" if high > low else "") for low, high in merged)
    return f"[{'^' if negated else ''}{body}]"


def translate(pattern: str, classes: Mapping[str, Ranges]) -> str:
    """The same pattern for Python's ``re``. ``classes``: at least ``used(pattern)``. Raises Unsupported."""
    out: list[str] = []
    at, depth, before, folded = 0, 0, "", 0
    while at < len(pattern):
        found = _TOKEN.match(pattern, at)
        if found is None or len(pattern) > MAX_PATTERN:
            raise _bad(pattern)
        kind, text = found.lastgroup or "", found.group()
        if found["times"]:
            if before not in ("kind", "set", "char") and not (before == "close" and text == "?"):
                raise _bad(pattern)  # a repeated group, or a quantifier of a quantifier
            out.append(text)
            kind = "times"
        elif kind == "open":
            depth += 1
            folded = depth if text == "(?i:" else folded
            out.append(text)
        elif kind == "close":
            folded = 0 if folded == depth else folded
            depth -= 1
            out.append(text)
        elif kind == "char":
            out.append(_char(text, folded > 0, pattern))
        elif kind == "kind":
            out.append(_kind(text, classes))
        else:
            out.append(_set(text, classes, pattern) if kind == "set" else text)
        if depth < 0 or (folded and kind in ("kind", "set")):
            raise _bad(pattern)
        before, at = kind, found.end()
    if depth or before in ("", "bar", "open"):
        raise _bad(pattern)
    return "".join(out)


def _bad(pattern: str) -> Unsupported:
    return Unsupported(f"the pattern {pattern}", field="pre_tokenizer")


def _unescape(text: str) -> str:
    return _ESCAPES.get(text[1], text[1]) if text[0] == "\\" else text


def _char(text: str, folded: bool, pattern: str) -> str:
    char = _unescape(text)
    if folded and not char.isascii():
        raise _bad(pattern)  # engines fold other letters differently
    return char if char.isascii() and char.isalnum() else f"\\U{ord(char):08x}"


def _kind(text: str, classes: Mapping[str, Ranges]) -> str:
    if text[1] in "sS":
        return charset(classes["s"], text[1] == "S")
    return charset([r for name in names(text[3:-1]) for r in classes[name]])


def _set(text: str, classes: Mapping[str, Ranges], pattern: str) -> str:
    negated = text[1] == "^"
    inside, at, ranges = text[1 + negated : -1], 0, list[tuple[int, int]]()
    if "&&" in inside:
        raise _bad(pattern)  # an intersection
    while at < len(inside):
        found = _ITEM.match(inside, at)
        if found is None:
            raise _bad(pattern)
        at = found.end()
        if found["kind"]:
            ranges += [r for name in names(found["kind"]) for r in classes[name]]
        elif found["white"]:
            ranges += classes["s"]
        else:
            low = high = ord(_unescape(found["char"]))
            if found["char"] == "-" or (inside[at : at + 1] == "-" and at + 1 < len(inside)):
                last = _ITEM.match(inside, at + 1) if found["char"] != "-" else None
                if last is None or not last["char"]:
                    raise _bad(pattern)
                high, at = ord(_unescape(last["char"])), last.end()
            if high < low:
                raise _bad(pattern)
            ranges.append((low, high))
    return charset(ranges, negated)
