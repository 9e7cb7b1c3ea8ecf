"""What the tokenizers library takes each code point for: found by asking it. Only for compiling a vocabulary."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from loaders.errors import Unsupported
from loaders.text.compact_regex import KINDS, charset, translate, used

Range = tuple[int, int]
_PART = 1 << 16
_SURROGATES = range(0xD800, 0xE000)
_EMPTY = range(0x40000, 0xE0000)


def _parts() -> Iterator[str]:
    """Every code point but the surrogates; of planes 4 to 13, where Unicode has nothing, every sixteenth."""
    for start in [*range(0, 0x40000, _PART), *range(0xE0000, 0x110000, _PART)]:
        yield "".join(chr(c) for c in range(start, start + _PART) if c not in _SURROGATES)
    yield "".join(map(chr, _EMPTY[::16]))


def joined(codes: Sequence[int]) -> list[Range]:
    """Rising code points as ranges."""
    out: list[Range] = []
    for code in codes:
        if out and out[-1][1] == code - 1:
            out[-1] = (out[-1][0], code)
        else:
            out.append((code, code))
    return out


@cache
def classes() -> dict[str, list[Range]]:
    """The members of every class in KINDS, as the library's regex engine has them."""
    from tokenizers import Regex, pre_tokenizers

    spelt = {kind: "\\s" if kind == "s" else f"\\p{{{kind}}}" for kind in KINDS}
    every = pre_tokenizers.Split(Regex("|".join(f"{s}+" for s in spelt.values())), "isolated")
    runs = [run for part in _parts() for run, _ in every.pre_tokenize_str(part)]
    heads = "".join(run[0] for run in runs)  # a run is of one class, so its first character tells
    out = {}
    for kind, pattern in spelt.items():
        others = bytearray(b"\1") * len(heads)
        for _, (a, b) in pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(heads):
            others[a:b] = bytes(b - a)
        out[kind] = _merged([(ord(r[0]), ord(r[-1])) for r, mine in zip(runs, others, strict=True) if mine])
    if any(low in _EMPTY for ranges in out.values() for low, _ in ranges):
        raise Unsupported("characters in planes of Unicode that were empty", field="pre_tokenizer")
    return out


def _merged(ranges: list[Range]) -> list[Range]:
    out: list[Range] = []
    for low, high in ranges:
        if out and out[-1][1] == low - 1:
            out[-1] = (out[-1][0], high)
        else:
            out.append((low, high))
    return out


@cache
def digits() -> list[Range]:
    """What the Digits step takes for a digit."""
    from tokenizers import pre_tokenizers

    step, out = pre_tokenizers.Digits(individual_digits=True), list[int]()
    for part in _parts():
        for run, _ in step.pre_tokenize_str(part):
            out += [ord(run)] if len(run) == 1 else []
    # a single character between two digits stands alone too
    alone = "".join(map(chr, out))
    runs = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str("a".join(alone) + "a")
    return joined([ord(run) for run, _ in runs if run[0] != "a"])


@cache
def letters() -> list[Range]:
    """What a ``single_word`` token may not touch."""
    import tokenizers
    from tokenizers import AddedToken, models

    inner = tokenizers.Tokenizer(models.BPE())
    inner.add_tokens([AddedToken("\x01", single_word=True, normalized=False)])
    out = []
    for part in _parts():
        spans = inner.encode("".join(f" \x01{c}" for c in part)).offsets
        free = {a // 3 for a, b in spans}
        out += [ord(c) for at, c in enumerate(part) if at not in free and c != "\x01"]
    return joined(out)


@cache
def inert() -> list[Range]:
    """Code points that the library's NFC leaves alone although Python's, now or in a newer version, may not.

    They are those that Unicode had not assigned when the library's tables were made. What was assigned by then never
    changes. Raises Unsupported if the library's tables are newer than Python's.
    """
    from tokenizers import normalizers

    nfd, nfc = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    found: set[int] = set()
    for part in _parts():
        if part[0] >= "\U000f0000" or part[0] == chr(_EMPTY[0]):
            continue  # for private use, or as empty as ever: inert in every version
        known = "".join(c for c in part if c not in "\n\r")
        probe = "\n".join(f"a\u0301{c}\u0323" for c in known)
        here, there = unicodedata.normalize("NFD", probe), nfd(probe)
        for c, mine, its in zip(known, here.split("\n"), there.split("\n"), strict=True):
            if mine != its or unicodedata.category(c) == "Cn":
                found.add(ord(c))
                if its != f"a\u0301{c}\u0323":
                    raise _newer(c)
        whole = [c for c in known if unicodedata.normalize("NFD", c) != c and unicodedata.is_normalized("NFC", c)]
        for c, its in zip(
            whole, nfc("\n".join(unicodedata.normalize("NFD", c) for c in whole)).split("\n"), strict=False
        ):
            if its != c:
                found.update(map(ord, unicodedata.normalize("NFD", c)))
    for code in found:
        c = chr(code)
        if nfd(f"a\u0301{c}\u0323") != f"a\u0301{c}\u0323":
            raise _newer(c)
    return joined(sorted(found | set(_EMPTY)))


def _newer(char: str) -> Unsupported:
    return Unsupported(f"NFC of U+{ord(char):04X} by newer tables than Python's", field="normalizer")


def proved(pattern: str) -> None:
    """Splits made-up text by the library and by the translated pattern. Raises Unsupported if they differ."""
    from tokenizers import Regex, pre_tokenizers

    table = classes()
    needed = used(pattern)
    ours = re.compile(translate(pattern, {name: table[name] for name in needed}))
    theirs: Any = pre_tokenizers.Split(Regex(pattern), "isolated")
    random_ = random.Random(0)
    odd = [chr(end + step) for kind in KINDS for r in table[kind] for end in r for step in (-1, 0, 1) if end + step > 0]
    odd = [c for c in odd if ord(c) not in _SURROGATES]
    plain = [
        *" \n\r\t'sStTdDmMrReEvVlL019.,/-_<\u00a0\u2028éßſKﬀﬆŉ日の\u0301",
        "'ll",
        "'RE",
        "  ",
        "\r\n",
        "\n\n",
        "'ſ",
    ]
    for share in (0.05, 0.3, 0.8):
        text = "".join(random_.choice(odd if random_.random() < share else plain) for _ in range(20000))
        if [run for run, _ in theirs.pre_tokenize_str(text)] != list(isolated(ours, text)):
            raise Unsupported(f"the pattern {pattern}: splits otherwise here", field="pre_tokenizer")


def isolated(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    """The matches and what lies between them, in order."""
    at = 0
    for found in pattern.finditer(text):
        if found.start() > at:
            yield text[at : found.start()]
        if found.end() > found.start():
            yield found.group()
        at = found.end()
    if at < len(text):
        yield text[at:]


__all__ = ["charset", "classes", "digits", "inert", "isolated", "joined", "letters", "proved"]
