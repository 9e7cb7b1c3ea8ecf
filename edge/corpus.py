"""Texts to score: a file of UTF-8, plain or packed, as the tokens it is made of and the bytes each stands for.

Read, unpacked and encoded a small piece at a time: what a file claims to hold is never taken on trust, nor held whole.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from loaders.errors import BadCheckpoint, ReadFailed
from loaders.formats.config import open_regular
from loaders.text.tokenizer import AnyTokenizer

# Bytes of text that are read at most, unpacked.
MOST_BYTES = 64 << 20
BLOCK = 1 << 16
# Characters encoded at a time; around a cut, those that must be encoded alike with and without it; cuts tried.
PIECE, AROUND, TRIES = 1 << 16, 256, 16
# Characters of a piece that cannot be cut: encoding takes some 75 bytes for each, and budgets are planned without it.
MAX_TEXT = 1 << 18
# What unpacking may take, whatever a header asks for: xz -9 needs 65 MiB.
XZ_MEMORY = 80 << 20
XZ, GZIP = b"\xfd7zXZ\0", b"\x1f\x8b"
CUTS = (re.compile(r"\n(?=\S)"), re.compile(r"\S(?=\s)"))
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Text:
    """``ids`` int32 [n], without special tokens; ``sizes`` int32 [n]: bytes of UTF-8 that each stands for.

    ``sha256`` is of exactly these bytes: a packed file has that of what was packed, and a text cut after so many tokens
    is another text. ``lead``: the tokens that go before a text.
    """

    ids: np.ndarray
    sizes: np.ndarray
    sha256: str
    lead: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Of UTF-8."""
        return int(self.sizes.sum())

    @property
    def held_bytes(self) -> int:
        """What it takes in memory."""
        return int(self.ids.nbytes + self.sizes.nbytes)


def read_text(path: str | os.PathLike[str], tokenizer: AnyTokenizer, most_tokens: int | None = None) -> Text:
    """The tokens of a file of UTF-8, plain or packed by xz or gzip. No more is read than they take.

    Raises MissingFile, NotPermitted, ReadFailed; BadCheckpoint for what is not UTF-8 or damaged, for fewer than two
    tokens, and above 64 MiB, which without ``most_tokens`` is known before anything is read.
    """
    file, found = Path(path), Tokens(tokenizer, most_tokens)
    with closing(open_text(file, most_tokens)) as stream:
        for piece, start in pieces(characters(blocks(stream, file), file), tokenizer, file, found.room):
            found.add(piece, start)
            if found.enough:
                break
    if found.count < 2:
        what = "one token" if found.count else "no token"
        raise BadCheckpoint(what, file=file, expected="text of two tokens or more")
    return found.text()


def open_text(file: Path, most_tokens: int | None) -> BinaryIO:
    """The file, if its kind and size will do. Raises MissingFile, NotPermitted, ReadFailed, BadCheckpoint."""
    stream = os.fdopen(open_regular(file), "rb")
    size = os.fstat(stream.fileno()).st_size
    if most_tokens is None and size > MOST_BYTES:
        stream.close()
        raise too_large(file, f"{size} bytes")
    return stream


def too_large(file: Path, found: str) -> BadCheckpoint:
    """Says what to do."""
    expected = f"at most {MOST_BYTES >> 20} MiB of text"
    return BadCheckpoint(found, file=file, expected=expected, hint="Score fewer tokens with --tokens")


def blocks(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    """The text's bytes, unpacked, a small block at a time. Raises BadCheckpoint, ReadFailed."""
    total = 0
    try:
        for block in unpacked(stream):
            total += len(block)
            if total > MOST_BYTES:
                raise too_large(file, "more text")
            yield block
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise BadCheckpoint(f"cannot be unpacked: {error}", file=file) from None
    except OSError as error:
        raise ReadFailed(error.strerror or type(error).__name__, file=file) from None


def unpacked(stream: BinaryIO) -> Iterator[bytes]:
    """By what the file begins with, which no UTF-8 does."""
    head = stream.read(len(XZ))
    stream.seek(0)
    if head == XZ:
        return unxz(stream)
    plain = gzip.GzipFile(fileobj=stream) if head.startswith(GZIP) else stream
    return iter(lambda: plain.read(BLOCK), b"")


def unxz(stream: BinaryIO) -> Iterator[bytes]:
    """One or more streams of xz, at most BLOCK bytes at a time: lzma.open knows no limit of memory."""
    data = stream.read(BLOCK)
    while data:
        engine = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
        while not engine.eof:
            yield engine.decompress(data, BLOCK)
            data = b""
            if engine.needs_input and not engine.eof:
                data = stream.read(BLOCK)
                if not data:
                    raise EOFError("it ends too early")
        data = engine.unused_data.lstrip(b"\0")  # streams may be padded
        while not data and (more := stream.read(BLOCK)):
            data = more.lstrip(b"\0")


def characters(parts: Iterator[bytes], file: Path) -> Iterator[str]:
    """The blocks, decoded. Raises BadCheckpoint with the offset of the first byte that is not UTF-8."""
    decoder, seen, final = codecs.getincrementaldecoder("utf-8")(), 0, False
    while not final:
        block = next(parts, None)
        final = block is None
        begun = seen - len(decoder.getstate()[0])
        try:
            yield decoder.decode(block or b"", final)
        except UnicodeDecodeError as error:
            found = f"byte {begun + error.start} is not UTF-8: {error.reason}"
            raise BadCheckpoint(found, file=file, expected="text in UTF-8") from None
        seen += len(block or b"")


def pieces(parts: Iterator[str], tokenizer: AnyTokenizer, file: Path, usual: int) -> Iterator[tuple[str, bool]]:
    """The text in pieces that are encoded as they are within the whole, and whether it is the first.

    ``usual``: characters of one, if it can be cut there. Raises BadCheckpoint where there is no place to cut, and the
    piece would take more memory than a budget leaves.
    """
    held, start, room = "", True, usual
    for part in parts:
        held += part
        while len(held) >= room + AROUND:
            at = cut(held, room, tokenizer)
            if at:
                yield held[:at], start
                held, start, room = held[at:], False, usual
            elif 2 * room > MAX_TEXT - AROUND:
                found = f"no end of a line or word in {room} characters at which to cut it"
                raise BadCheckpoint(found, file=file, expected="text of lines or words")
            else:
                room *= 2
    if held:
        yield held, start


def cut(text: str, room: int, tokenizer: AnyTokenizer) -> int:
    """Where a line ends, or at least a word, before ``room``, and no token goes across; 0 for nowhere."""

    def ids(part: str) -> list[int]:
        return tokenizer.encode_piece(part, plain=True, start=False)

    for pattern in CUTS:
        places = [match.end() for match in pattern.finditer(text, max(room // 2, room - PIECE), room)]
        for at in reversed(places[-TRIES:]):
            before, after = text[max(0, at - AROUND) : at], text[at : at + AROUND]
            if ids(before) + ids(after) == ids(before + after):
                return at
    return 0


class Tokens:
    """The tokens of a text, piece by piece, no more than ``most``."""

    def __init__(self, tokenizer: AnyTokenizer, most: int | None) -> None:
        self.tokenizer, self.most, self.count = tokenizer, most, 0
        self.ids: list[np.ndarray] = []
        self.sizes: list[np.ndarray] = []
        self.hash, self.owed = hashlib.sha256(), b""
        self.known: dict[int, int] = {}
        self.kinds = {step.get("type") for step in tokenizer.decoder_kinds()}

    @property
    def room(self) -> int:
        """Characters worth encoding at a time: for a few tokens not many."""
        return PIECE if self.most is None else min(PIECE, 16 * self.most + AROUND)

    @property
    def enough(self) -> bool:
        """There are as many as were asked for."""
        return self.most is not None and self.count >= self.most

    def add(self, piece: str, start: bool) -> None:
        """The next piece; bytes that give no token are the next token's."""
        data = self.owed + piece.encode()
        ids = self.tokenizer.encode_piece(piece, plain=True, start=start)
        self.owed = b"" if ids else data
        if not ids:
            return
        sizes = shared_out([self.size(i) for i in ids], len(data))
        if self.most is not None:
            ids, sizes = ids[: self.most - self.count], sizes[: self.most - self.count]
        self.ids.append(np.array(ids, np.int32))
        self.sizes.append(sizes)
        self.hash.update(data[: int(sizes.sum())])
        self.count += len(ids)

    def size(self, token_id: int) -> int:
        """Bytes of text a token stands for, by its spelling."""
        if token_id not in self.known:
            token = self.tokenizer.token_of(token_id) or ""
            # Byte-level vocabularies spell each byte as a character, the others a blank as U+2581.
            size = len(token) if "ByteLevel" in self.kinds else len(token.replace("\u2581", " ").encode())
            self.known[token_id] = 1 if BYTE.fullmatch(token) and "ByteFallback" in self.kinds else size
        return self.known[token_id]

    def text(self) -> Text:
        """All that was added."""
        if self.owed:
            self.sizes[-1][-1] += len(self.owed)
            self.hash.update(self.owed)
        return Text(np.concatenate(self.ids), np.concatenate(self.sizes), self.hash.hexdigest(), lead(self.tokenizer))


def shared_out(sizes: list[int], total: int) -> np.ndarray:
    """int32 sizes with the sum ``total``: as they are, or in proportion where a normalizer changed the text."""
    ends = np.cumsum(sizes, dtype=np.int64)
    if ends[-1] != total:
        ends = ends * total // max(1, int(ends[-1]))
        ends[-1] = total
    return np.diff(ends, prepend=0).astype(np.int32)


def lead(tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself: the start token, or nothing."""
    plain, whole = tokenizer.encode("a", bos=False), tokenizer.encode("a")
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:at])
