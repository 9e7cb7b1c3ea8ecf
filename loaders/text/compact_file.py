"""The compiled vocabulary: one file, mapped read-only, from which a tokenizer works without holding it.

Little-endian: magic, CRC-32 of all that follows it, version, number of ids and of merges, number of added tokens, then
(offset, length) of each section. Everything is checked when the file is opened, by reading it in small parts: a mapped
page counts as resident once it is touched, a page that was read does not.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import zlib
from bisect import bisect_left
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loaders.errors import BadCheckpoint, ReadFailed, Unsupported
from loaders.formats.config import MIB, open_regular

MAGIC, VERSION = b"EDGEBPE\0", 1
# name -> item size; rows, right, rank and new are the merges, grouped by their left half
SECTIONS = {"meta": 1, "flags": 1, "blob": 1, "ends": 4, "order": 4, "rows": 4, "right": 4, "rank": 4, "new": 4}
HEAD = struct.Struct(f"<8s2I3Q{2 * len(SECTIONS)}Q")
MAX_IDS, MAX_MERGES, MAX_META, MAX_BLOB = 1 << 24, 1 << 25, 8 * MIB, 1 << 30
PRESENT, MODEL, HIDDEN = 1, 2, 4  # flags of an id: has a token; the merges may give it; decode leaves it out
PART = 1 << 18

Span = tuple[int, int]


class Head(NamedTuple):
    """The first bytes of the file, checked against its size. ``spans``: section -> (offset, bytes)."""

    size: int
    crc: int
    ids: int
    merges: int
    added: int
    spans: dict[str, Span]


def pack(arrays: Mapping[str, bytes | npt.NDArray[np.generic]], ids: int, merges: int, added: int) -> bytes:
    """The file. ``arrays``: every section, as bytes or as an array of its item size."""
    at, spans, parts = HEAD.size, [], []
    for name in SECTIONS:
        raw = arrays[name]
        data = raw if isinstance(raw, bytes) else raw.tobytes()
        pad = -at % 8
        parts.append(bytes(pad) + data)
        spans += [at + pad, len(data)]
        at += pad + len(data)
    head = bytearray(HEAD.pack(MAGIC, 0, VERSION, ids, merges, added, *spans))
    crc = zlib.crc32(memoryview(head)[12:])
    for part in parts:
        crc = zlib.crc32(part, crc)
    struct.pack_into("<I", head, 8, crc)
    return b"".join([bytes(head), *parts])


def read_head(fd: int, file: str) -> Head:
    """Reads and checks the header of an open file. Raises BadCheckpoint, or Unsupported for another version."""
    size = os.fstat(fd).st_size
    data = _pread(fd, HEAD.size, 0, file)
    if len(data) < HEAD.size or data[:8] != MAGIC:
        raise BadCheckpoint("not a compiled vocabulary", file=file)
    _, crc, version, ids, merges, added, *flat = HEAD.unpack(data)
    if version != VERSION:
        raise BadCheckpoint(f"version {version}", file=file, expected=VERSION, hint="Compile the vocabulary again.")
    spans = dict(zip(SECTIONS, zip(flat[::2], flat[1::2], strict=True), strict=True))
    want = {"flags": ids, "ends": 4 * ids, "rows": 4 * ids + 4, "right": 4 * merges, "rank": 4 * merges}
    want["new"] = 4 * merges
    at = HEAD.size
    for name, (start, length) in spans.items():
        if start != at + -at % 8 or length > size or start + length > size or length != want.get(name, length):
            raise BadCheckpoint(f"{length} bytes at {start} of {size}", file=file, field=name)
        at = start + length
    small = spans["meta"][1] <= MAX_META and spans["blob"][1] <= MAX_BLOB and spans["order"][1] <= 4 * ids
    if at != size or not small or not (ids <= MAX_IDS and merges <= MAX_MERGES and added <= ids):
        raise BadCheckpoint("sizes that cannot be", file=file)
    if spans["order"][1] % 4:
        raise BadCheckpoint(f"{spans['order'][1]} bytes", file=file, field="order")
    return Head(size, crc, ids, merges, added, spans)


def _pread(fd: int, length: int, at: int, file: str) -> bytes:
    try:
        return os.pread(fd, length, at)
    except OSError as error:
        raise ReadFailed(f"read at offset {at}: {error.strerror}", file=file) from None


@dataclass
class _Checker:
    """Reads the sections part by part and refuses what no reader could use."""

    fd: int
    file: str
    head: Head

    def all(self) -> None:
        self._crc()
        ids, merges, blob = self.head.ids, self.head.merges, self.head.spans["blob"][1]
        self._below("order", ids)
        self._below("new", ids)
        self._below("right", ids)
        self._rising("ends", blob)
        self._rising("rows", merges)
        self._text()

    def _parts(self, start: int, length: int) -> Iterator[bytes]:
        end = start + length
        while start < end:
            part = _pread(self.fd, min(PART, end - start), start, self.file)
            if not part:
                raise ReadFailed(f"nothing more at offset {start}", file=self.file)
            start += len(part)
            yield part

    def _numbers(self, name: str) -> Iterator[npt.NDArray[np.uint32]]:
        for part in self._parts(*self.head.spans[name]):
            if len(part) % 4:
                raise ReadFailed("a short read", file=self.file)
            yield np.frombuffer(part, np.uint32)

    def _bad(self, name: str, found: str) -> BadCheckpoint:
        return BadCheckpoint(found, file=self.file, field=name)

    def _crc(self) -> None:
        crc = 0
        for part in self._parts(12, self.head.size - 12):
            crc = zlib.crc32(part, crc)
        if crc != self.head.crc:
            raise BadCheckpoint("the checksum does not match", file=self.file, hint="Compile the vocabulary again.")

    def _below(self, name: str, limit: int) -> None:
        if any(part.max() >= limit for part in self._numbers(name)):
            raise self._bad(name, "an id beyond the last")

    def _rising(self, name: str, last: int) -> None:
        before = 0
        for part in self._numbers(name):
            if part[0] < before or bool((part[1:] < part[:-1]).any()):
                raise self._bad(name, "offsets that go back")
            before = int(part[-1])
        if before != last:
            raise self._bad(name, f"ends at {before}, not {last}")

    def _text(self) -> None:
        decoder, starts, at = getincrementaldecoder("utf-8")(), self._numbers("ends"), 0
        ends = next(starts, None)
        try:
            for part in self._parts(*self.head.spans["blob"]):
                decoder.decode(part)
                codes = np.frombuffer(part, np.uint8)
                while ends is not None and ends[0] < at + len(part):
                    inside = ends[ends < at + len(part)]
                    if bool((codes[inside - at] & 0xC0 == 0x80).any()):
                        raise self._bad("ends", "a token that starts inside a character")
                    ends = ends[len(inside) :] if len(inside) < len(ends) else next(starts, None)
                at += len(part)
            decoder.decode(b"", True)
        except UnicodeDecodeError:
            raise self._bad("blob", "not UTF-8") from None


class Vocab:
    """A compiled vocabulary, mapped. Ids are in [0, ``ids``); a method given one outside raises IndexError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises BadCheckpoint for a file that is not one or is damaged, and what ``open_regular`` raises."""
        self.file = os.fspath(path)
        if sys.byteorder != "little":
            raise Unsupported("a big-endian machine", file=self.file)
        fd = open_regular(path)
        try:
            self.head = read_head(fd, self.file)
            _Checker(fd, self.file, self.head).all()
            try:
                whole = memoryview(mmap.mmap(fd, self.head.size, access=mmap.ACCESS_READ))
            except (OSError, ValueError) as error:
                raise ReadFailed(f"cannot be mapped: {error}", file=self.file) from None
            meta = self.head.spans["meta"]
            self.meta = _pread(fd, meta[1], meta[0], self.file)
        finally:
            os.close(fd)
        self.ids = self.head.ids

        def view(name: str) -> memoryview:
            start, length = self.head.spans[name]
            part = whole[start : start + length]
            return part if SECTIONS[name] == 1 else part.cast("I")

        self.flags, self._blob, self._ends = view("flags"), view("blob"), view("ends")
        self._order, self._rows = view("order"), view("rows")
        self._right, self.rank, self.new = view("right"), view("rank"), view("new")

    def spelt(self, token: int) -> bytes:
        """The token's UTF-8; empty for an id without one."""
        return bytes(self._blob[self._ends[token - 1] if token else 0 : self._ends[token]])

    def find(self, token: bytes, *, model: bool = False) -> int:
        """The id of a token, -1 if there is none; with ``model`` only one that the merges may give."""
        at = bisect_left(self._order, token, key=self.spelt)
        if at == len(self._order):
            return -1
        found: int = self._order[at]
        if self.spelt(found) != token or (model and not self.flags[found] & MODEL):
            return -1
        return found

    def merge(self, left: int, right: int) -> int:
        """The index of a merge in ``rank`` and ``new``, or -1."""
        end = self._rows[left + 1]
        at = bisect_left(self._right, right, self._rows[left], end)
        return at if at < end and self._right[at] == right else -1
