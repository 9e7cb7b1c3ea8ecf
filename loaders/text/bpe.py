"""Text to ids: normalise, split, merge. What the tokenizers library does, in the same order, to the same ids.

A stretch of text goes through the steps together with its ``origin``: for each character the index of the character
of the prompt that it came from. Every character has exactly one, also one that a step inserted.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loaders.text.compact_file import Vocab
from loaders.text.compact_regex import WHITE, Ranges, charset

Origin = Sequence[int]
Stretch = tuple[str, Origin]
Step = Callable[[str, Origin], Iterator[Stretch]]

_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = iter(range(256, 512))
BYTE_CHARS = "".join(chr(b) if b in _PLAIN else chr(next(_OTHERS)) for b in range(256))
CHAR_BYTES = {c: b for b, c in enumerate(BYTE_CHARS)}
_TO_CHARS = dict(enumerate(BYTE_CHARS))
# What is kept of words and characters met before, in bytes (by an upper estimate), and the longest word kept.
MAX_WORDS, MAX_CHARS, MAX_WORD = 1 << 20, 1 << 19, 64


def to_bytes(text: str) -> str:
    """The UTF-8 of ``text``, each byte as the character that byte-level vocabularies write it with."""
    return text.encode().decode("latin-1").translate(_TO_CHARS)


@dataclass(frozen=True)
class Added:
    """An added token, as the matcher sees it. ``special``: not matched in plain text."""

    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single: bool = False


class Matcher:
    """Finds added tokens: leftmost, of those the longest."""

    def __init__(self, tokens: Mapping[str, Added], word: Ranges = ()) -> None:
        """``word``: the code points that may not touch a ``single`` token."""
        self._tokens = tokens
        lengths: dict[str, set[int]] = {}
        for text in tokens:
            lengths.setdefault(text[:2], set()).add(len(text))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}
        heads = charset((ord(head[0]), ord(head[0])) for head in lengths)
        self._head = re.compile(heads) if tokens else None
        self._word = re.compile(charset(word))

    def find(self, text: str, plain: bool) -> Iterator[tuple[Added | None, int, int]]:
        """(token or None, start, end) of the pieces of ``text``; together they are all of it."""
        at = done = 0  # how far the search is, how far pieces were given: blanks may be taken twice
        while self._head is not None and (found := self._head.search(text, at)):
            start = found.start()
            end = self._longest(text, start)
            at = end or start + 1
            token = self._tokens[text[start:end]] if end else None
            if token is None or (plain and token.special) or (token.single and self._touched(text, start, end)):
                continue
            if token.lstrip:
                while start > done and text[start - 1] in WHITE:
                    start -= 1
            while token.rstrip and end < len(text) and text[end] in WHITE:
                end += 1
            if done < start:
                yield None, done, start
            yield token, start, end
            done = end
        if done < len(text):
            yield None, done, len(text)

    def _longest(self, text: str, start: int) -> int:
        for head in (text[start : start + 2], text[start]):
            for length in self._lengths.get(head, ()):
                if text[start : start + length] in self._tokens and start + length <= len(text):
                    return start + length
        return 0

    def _touched(self, text: str, start: int, end: int) -> bool:
        before = start > 0 and self._word.match(text[start - 1])
        return bool(before or (end < len(text) and self._word.match(text[end])))


# Steps that rewrite


def replace(old: str, new: str, text: str, origin: Origin) -> Stretch:
    """Each ``old`` becomes ``new``, both one character."""
    return text.replace(old, new), origin


def prepend(new: str, text: str, origin: Origin) -> Stretch:
    """``new`` before a text that is not empty; it counts as coming from the first character."""
    if not text:
        return text, origin
    return new + text, array("I", [origin[0]] * len(new)) + array("I", origin)


class Composer:
    """NFC by the tables of the library's Unicode version. ``inert``: what had no meaning then."""

    def __init__(self, inert: Ranges) -> None:
        self._known, self._inert = re.compile(charset(inert, True) + "+"), re.compile(charset(inert))

    def text(self, text: str) -> str:
        """The composed text."""
        if text.isascii() or (unicodedata.is_normalized("NFC", text) and not self._inert.search(text)):
            return text
        return self._known.sub(lambda found: unicodedata.normalize("NFC", found[0]), text)

    def both(self, text: str, origin: Origin) -> Stretch:
        """The composed text with its origin, counted as the library counts."""
        if max(text, default="") < "\u0300":
            return text, origin
        out: list[str] = []
        source, at = array("I"), 0
        for char, change in self._compose(self._decompose(text)):
            out.append(char)
            if change > 0:
                source.append(origin[at - 1])
            else:
                source.append(origin[at])
                at += 1 - change
        return "".join(out), source

    def _class(self, char: str) -> int:
        return 0 if self._inert.match(char) else unicodedata.combining(char)

    def _decompose(self, text: str) -> Iterator[tuple[str, int, int]]:
        """(character, combining class, 1 if it has no character of the text to itself) in canonical order."""
        pending: list[tuple[str, int, int]] = []
        for char in text:
            whole = char if self._inert.match(char) else unicodedata.normalize("NFD", char)
            for nth, part in enumerate(whole):
                rank = self._class(part)
                if rank == 0:
                    yield from sorted(pending, key=lambda p: p[1])
                    pending.clear()
                pending.append((part, rank, int(nth > 0)))
        yield from sorted(pending, key=lambda p: p[1])

    def _compose(self, parts: Iterator[tuple[str, int, int]]) -> Iterator[tuple[str, int]]:
        base: tuple[str, int] | None = None
        marks: list[tuple[str, int]] = []
        last: int | None = None  # the class of the last mark that stayed apart
        for char, rank, change in parts:
            if base is None:
                if rank:
                    yield char, change
                else:
                    base = char, change
                continue
            blocked = last is not None and last >= rank
            whole = None if blocked else self._pair(base[0], char)
            if whole is not None:
                base = whole, base[1] + change - 1
            elif rank == 0:
                yield base
                yield from marks
                marks.clear()
                base, last = (char, change), None
            else:
                marks.append((char, change))
                last = rank
        if base is not None:
            yield base
        yield from marks

    def _pair(self, first: str, second: str) -> str | None:
        if self._inert.match(first) or self._inert.match(second):
            return None
        whole = unicodedata.normalize("NFC", first + second)
        apart = unicodedata.normalize("NFD", first) + second
        return whole if len(whole) == 1 and unicodedata.normalize("NFD", whole) == apart else None


# Steps that split


def isolate(pattern: re.Pattern[str]) -> Step:
    """The matches, and what lies between them."""

    def step(text: str, origin: Origin) -> Iterator[Stretch]:
        at = 0
        for found in pattern.finditer(text):
            start, end = found.span()
            if start > at:
                yield text[at:start], origin[at:start]
            if end > start:
                yield found.group(), origin[start:end]
            at = end
        if at < len(text):
            yield text[at:], origin[at:]

    return step


def cut(boundary: re.Pattern[str]) -> Step:
    """Cuts before each match: there no merge reaches across, so the parts can be merged one by one."""

    def step(text: str, origin: Origin) -> Iterator[Stretch]:
        at = 0
        for found in boundary.finditer(text, 1):
            yield text[at : found.start()], origin[at : found.start()]
            at = found.start()
        yield text[at:], origin[at:]

    return step


def prefix(blank: str, first_only: bool = False) -> Step:
    """``blank`` before a text that does not begin with it; ``first_only``: where the prompt begins."""

    def step(text: str, origin: Origin) -> Iterator[Stretch]:
        if text[0] != blank and not (first_only and origin[0] != 0):
            yield prepend(blank, text, origin)
        else:
            yield text, origin

    return step


def replaced(old: str, new: str) -> Step:
    """``replace`` as a step."""

    def step(text: str, origin: Origin) -> Iterator[Stretch]:
        yield replace(old, new, text, origin)

    return step


def run(steps: Sequence[Step], text: str, origin: Origin) -> Iterator[Stretch]:
    """What the steps, one after another, make of a text that is not empty."""
    if not steps:
        yield text, origin
        return
    for part, source in steps[0](text, origin):
        yield from run(steps[1:], part, source)


# The model


@dataclass(frozen=True)
class Model:
    """How words become ids. ``unknown``: -1 if there is no such token. ``cut``: where no merge ever crosses."""

    vocab: Vocab
    unknown: int
    fuse: bool
    fallback: bool
    whole: bool  # a word that is a token is that token, whatever the merges say
    byte_level: bool


class Merger:
    """Applies the merges of a model. Keeps the ids of words and characters, a bounded number of each."""

    def __init__(self, model: Model) -> None:
        self._model, self._vocab = model, model.vocab
        self._words: dict[str, tuple[int, ...]] = {}
        self._held = 0
        self._chars: dict[str, int] = {}
        found = [self._vocab.find(f"<0x{b:02X}>".encode(), model=True) for b in range(256)] if model.fallback else []
        self._bytes: list[int] | None = found or None

    def ids(self, word: str) -> Sequence[int]:
        """The ids of a word, as it came from the steps."""
        known = self._words.get(word)
        if known is None:
            ids, _ = self.tokens(to_bytes(word) if self._model.byte_level else word)
            if len(word) > MAX_WORD:
                return ids
            self._held += 300 + 4 * len(word) + 40 * len(ids)
            if self._held > MAX_WORDS:
                self._words.clear()
                self._held = 0
            self._words[word] = known = tuple(ids)
        return known

    def tokens(self, word: str) -> tuple[Sequence[int], Sequence[int]]:
        """The ids of a word in the model's letters, and how many bytes of it each stands for."""
        if self._model.whole:
            found = self._vocab.find(word.encode(), model=True)
            if found >= 0:
                return [found], [len(word.encode())]
        return self._merged(*self._symbols(word))

    def _char(self, char: str) -> int:
        found = self._chars.get(char)
        if found is None:
            if len(self._chars) >= MAX_CHARS // 200:
                self._chars.clear()
            found = self._chars[char] = self._vocab.find(char.encode(), model=True)
        return found

    def _symbols(self, word: str) -> tuple[array[int], array[int]]:
        ids, sizes, unknown = array("I"), array("I"), 0  # unknown: bytes of an unknown token not yet added
        for char in word:
            found = self._char(char)
            size = 1 if char < "\x80" else len(char.encode())
            if found >= 0:
                if unknown:
                    ids.append(self._model.unknown)
                    sizes.append(unknown)
                    unknown = 0
                ids.append(found)
                sizes.append(size)
            elif self._bytes and min(parts := [self._bytes[b] for b in char.encode()]) >= 0:
                # An unknown token that waits goes on waiting and ends up behind these: so does the library's.
                ids.extend(parts)
                sizes.extend([1] * size)
            elif self._model.unknown >= 0:
                if unknown and not self._model.fuse:
                    ids.append(self._model.unknown)
                    sizes.append(unknown)
                    unknown = 0
                unknown += size
        if unknown:
            ids.append(self._model.unknown)
            sizes.append(unknown)
        return ids, sizes

    def _merged(self, ids: array[int], sizes: array[int]) -> tuple[Sequence[int], Sequence[int]]:
        count, merge = len(ids), self._vocab.merge
        rank, new = self._vocab.rank, self._vocab.new
        after, before = array("I", range(1, count + 1)), array("i", range(-1, count))
        heap: list[int] = []  # rank, position, merge: 32 bits each
        for at in range(count - 1):
            found = merge(ids[at], ids[at + 1])
            if found >= 0:
                heap.append(rank[found] << 64 | at << 32 | found)
        heapq.heapify(heap)
        while heap:
            top = heapq.heappop(heap)
            at, found = top >> 32 & 0xFFFFFFFF, top & 0xFFFFFFFF
            right = after[at]
            if sizes[at] == 0 or right == count:
                continue
            # An entry is stale unless its neighbours still make the same token, by whichever merge.
            now = merge(ids[at], ids[right])
            if now < 0 or new[now] != new[found]:
                continue
            ids[at] = new[found]
            sizes[at] += sizes[right]
            sizes[right] = 0
            after[at] = behind = after[right]
            if behind < count:
                before[behind] = at
                found = merge(ids[at], ids[behind])
                if found >= 0:
                    heapq.heappush(heap, rank[found] << 64 | at << 32 | found)
            ahead = before[at]
            if ahead >= 0:
                found = merge(ids[ahead], ids[at])
                if found >= 0:
                    heapq.heappush(heap, rank[found] << 64 | ahead << 32 | found)
        kept = [at for at in range(count) if sizes[at]]
        return [ids[at] for at in kept], [sizes[at] for at in kept]
