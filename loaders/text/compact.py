"""A tokenizer that keeps a few megabytes: its vocabulary stays in a mapped file, its merges are made here.

For BPE models it gives what the tokenizers library gives, to the id; ``compile_vocab`` refuses what it cannot do.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loaders.formats.config import open_regular
from loaders.text import bpe
from loaders.text.compact_file import HIDDEN, PRESENT, Head, Vocab, read_head
from loaders.text.compact_meta import Pipeline, read_pipeline
from loaders.text.compact_regex import WHITE
from loaders.text.tokenizer import REPLACEMENT, AnyTokenizer, checked_ids, clean

Json = dict[str, Any]
Span = tuple[int, int]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
_BLANKS = WHITE + bpe.BYTE_CHARS[32]


def resident_bytes(tokenizer: str | os.PathLike[str] | CompactTokenizer) -> int:
    """The most that an open tokenizer keeps in memory between calls, in bytes; of a path, once it is opened.

    Every page of the file, what is kept of words met before, the added tokens and the patterns. Raises BadCheckpoint
    for a file whose header is wrong, and what ``open_regular`` raises.
    """
    if isinstance(tokenizer, CompactTokenizer):
        return _resident(tokenizer.head)
    fd = open_regular(tokenizer)
    try:
        return _resident(read_head(fd, os.fspath(tokenizer)))
    finally:
        os.close(fd)


def _resident(head: Head) -> int:
    # meta stays as the added tokens that it was parsed into: a string, an Added and a place in two tables each
    return head.size + bpe.MAX_WORDS + bpe.MAX_CHARS + 4 * head.spans["meta"][1] + 600 * head.added + (4 << 20)


@dataclass(frozen=True)
class _Encoded:
    """An encoding; the offsets are found when they are asked for, by going through the text once more."""

    body: list[int]
    before: list[int]
    after: list[int]
    _spans: Callable[[], list[Span]]

    @cached_property
    def ids(self) -> list[int]:
        return [*self.before, *self.body, *self.after]

    @cached_property
    def offsets(self) -> list[Span]:
        return [*((0, 0) for _ in self.before), *self._spans(), *((0, 0) for _ in self.after)]

    @cached_property
    def special_tokens_mask(self) -> list[int]:
        return [1] * len(self.before) + [0] * len(self.body) + [1] * len(self.after)


class CompactTokenizer(AnyTokenizer):
    """The tokenizer of a compiled vocabulary, which stays mapped. Calls may come from several threads.

    The file must not be cut short while it is open: a mapped page that is gone ends the process.
    """

    def __init__(self, vocab: Vocab) -> None:
        """Raises BadCheckpoint for a vocabulary whose pipeline cannot be."""
        self._vocab, self.head = vocab, vocab.head
        self._pipeline: Pipeline = read_pipeline(vocab)
        self._merger = bpe.Merger(self._pipeline.model)
        self._learn(dict(sorted(self._pipeline.special.items())), vocab.ids)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> CompactTokenizer:
        """The tokenizer in a file that ``compile_vocab`` made.

        Raises BadCheckpoint for any other file or a damaged one, MissingFile, NotPermitted or ReadFailed if it cannot
        be read.
        """
        return cls(Vocab(path))

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        flags, count = self._vocab.flags, self._vocab.ids
        skip = 0 if specials else HIDDEN
        kept = [i for i in checked_ids(ids) if i < count and flags[i] & PRESENT and not flags[i] & skip]
        tokens = [self._token(i) for i in kept]
        steps = self._pipeline.decoder
        if steps is None:
            return " ".join(tokens)
        for step in steps:
            tokens = _DECODE[step["type"]](tokens, step)
        return "".join(tokens)

    def id_of(self, token: str) -> int | None:
        found = self._vocab.find(clean(token).encode())
        return None if found < 0 else found

    def token_of(self, token_id: int) -> str | None:
        known = 0 <= token_id < self._vocab.ids and self._vocab.flags[token_id] & PRESENT
        return self._token(token_id) if known else None

    def decoder_kinds(self) -> list[Json]:
        return copy.deepcopy(self._pipeline.decoder or [])

    def _token(self, token_id: int) -> str:
        form = self._pipeline.forms.get(token_id)
        return self._vocab.spelt(token_id).decode() if form is None else form

    def _encoding(self, text: str, *, plain: bool, add: bool) -> _Encoded:
        ids: list[int] = []
        for token, part, source in self._stretches(text, plain, exact=False):
            if token is not None:
                ids.append(token.id)
                continue
            for word, _ in bpe.run(self._pipeline.steps, part, source):
                ids += self._merger.ids(word)
        before, after = (self._pipeline.before, self._pipeline.after) if add else ([], [])
        return _Encoded(ids, before, after, lambda: self._spans(text, plain))

    def _stretches(self, text: str, plain: bool, *, exact: bool) -> Iterator[tuple[bpe.Added | None, str, bpe.Origin]]:
        """Added tokens, and normalized text between them. Unless ``exact`` an origin is right where it begins only."""
        pipeline = self._pipeline
        for token, a, b in pipeline.raw.find(text, plain):
            part: str = text[a:b]
            source: bpe.Origin = range(a, b)
            if token is not None:
                yield token, part, source
                continue
            if pipeline.model.byte_level and not exact:
                for rewrite in pipeline.normalize:
                    part = rewrite(part)
                source = range(a, a + len(part))
            else:
                for work in pipeline.normalizers:
                    part, source = work(part, source)
            for inner, c, d in pipeline.normalized.find(part, plain):
                yield inner, part[c:d], source[c:d]

    def _spans(self, text: str, plain: bool) -> list[Span]:
        out: list[tuple[str, Span]] = []
        for token, part, source in self._stretches(text, plain, exact=True):
            if token is not None:
                out.append((part, (source[0], source[-1] + 1)))
                continue
            for word, origin in bpe.run(self._pipeline.steps, part, source):
                out += self._word_spans(word, origin)
        for first in self._pipeline.trim:
            out = [(token, _trimmed(token, span, first, at == 0)) for at, (token, span) in enumerate(out)]
        return [span for _, span in out]

    def _word_spans(self, word: str, origin: bpe.Origin) -> Iterator[tuple[str, Span]]:
        if self._pipeline.model.byte_level:
            origin = [at for at, char in zip(origin, word, strict=True) for _ in char.encode()]
            word = bpe.to_bytes(word)
        places = [at for at, char in zip(origin, word, strict=True) for _ in char.encode()]
        at = 0
        for token, size in zip(*self._merger.tokens(word), strict=True):
            yield self._vocab.spelt(token).decode(), (places[at], places[at + size - 1] + 1)
            at += size


def _trimmed(token: str, span: Span, first: bool, leads: bool) -> Span:
    """Without the blanks at both ends of the token, one blank that was put first excepted."""
    start, end = span
    lead, tail = len(token) - len(token.lstrip(_BLANKS)), len(token) - len(token.rstrip(_BLANKS))
    if lead and not ((leads or start == 0) and first and lead == 1):
        start = min(start + lead, end)
    if tail and end >= tail:
        end = max(end - tail, start)
    return start, end


# Decoders: tokens in, tokens out


def _byte_level(tokens: list[str], _: Json) -> list[str]:
    out = bytearray()
    for token in tokens:
        codes = [bpe.CHAR_BYTES.get(char, -1) for char in token]
        out += token.encode() if -1 in codes else bytes(codes)
    return [out.decode(errors="replace")]


def _byte_fallback(tokens: list[str], _: Json) -> list[str]:
    out: list[str] = []
    run = bytearray()

    def flush() -> None:
        try:
            out.append(run.decode())
        except UnicodeDecodeError:
            out.extend(REPLACEMENT * len(run))
        run.clear()

    for token in tokens:
        found = _BYTE.fullmatch(token)
        if found:
            run.append(int(found[1], 16))
            continue
        if run:
            flush()
        out.append(token)
    if run:
        flush()
    return out


def _metaspace(tokens: list[str], step: Json) -> list[str]:
    blank, never = step["replacement"], step["prepend_scheme"] == "never"
    return [token.replace(blank, " " if at or never else "") for at, token in enumerate(tokens)]


def _replace(tokens: list[str], step: Json) -> list[str]:
    old, new = step["pattern"]["String"], step["content"]
    return [token.replace(old, new) for token in tokens]


def _strip(tokens: list[str], step: Json) -> list[str]:
    char, most = step["content"], step["start"]
    return [token[min(most, len(token) - len(token.lstrip(char))) :] for token in tokens]


_DECODE: dict[str, Callable[[list[str], Json], list[str]]] = {
    "ByteLevel": _byte_level,
    "ByteFallback": _byte_fallback,
    "Fuse": lambda tokens, _: ["".join(tokens)],
    "Metaspace": _metaspace,
    "Replace": _replace,
    "Strip": _strip,
}
