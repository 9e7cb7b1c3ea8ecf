"""Reading safetensors: headers checked before anything is allocated, sharded folders, reads by offset.

Nothing is mapped here: a truncated file is then a short read with a name, not a SIGBUS.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeAlias

import numpy.typing as npt

from loaders.errors import BadCheckpoint, MissingFile, NotPermitted, ReadFailed, Unsupported, Usage
from loaders.formats.buffers import as_bytes
from loaders.formats.config import MIB, known_other, open_regular, parse_json, read_json, short, show
from loaders.formats.window import Window

ITEMSIZE: dict[str, int] = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
}
MAX_HEADER = 100_000_000  # upstream's limit
MAX_TENSORS = 100_000
MAX_DIMS = 8
MAX_DIM = 2**31 - 1
MAX_INDEX = 64 * MIB  # DeepSeek-V3's index is 9 MB
MAX_OPEN = 64
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: ``nbytes`` bytes, little-endian, row-major, at byte ``offset`` of the file ``shard``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]


Identity: TypeAlias = tuple[int, int, int, int]


def _identity(fd: int) -> Identity:
    s = os.fstat(fd)
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def read_exactly(fd: int, view: memoryview, offset: int, path: str) -> None:
    """Fills ``view`` from byte ``offset``: loops over partial reads, refuses the end of the file."""
    got, wanted = 0, len(view)
    try:
        while got < wanted:
            n = os.preadv(fd, [view[got:]], offset + got)
            if n == 0:
                raise ReadFailed(f"read at offset {offset}: {got} bytes read, {wanted} wanted", file=path)
            got += n
    except OSError as e:
        raise ReadFailed(f"read at offset {offset + got}: {e.strerror}", file=path) from None


def _header(fd: int, size: int, path: str) -> tuple[dict[str, Any], int]:
    """The header's JSON and the byte at which the data starts."""
    head = bytearray(min(size, 256))
    read_exactly(fd, memoryview(head), 0, path)

    def bad(found: str, hint: str | None = None) -> BadCheckpoint:
        other = known_other(bytes(head))  # asked only now: a sound length may begin like gzip
        return BadCheckpoint(other or found, file=path, expected="a safetensors file", hint=None if other else hint)

    if size < 8:
        raise bad(f"file too short, {size} bytes")
    n = int.from_bytes(head[:8], "little")
    if not 2 <= n <= MAX_HEADER:
        raise bad(f"header length {n}")
    if n > size - 8:
        raise bad(f"shard is {size} bytes, header needs {n + 8}: download incomplete", "Fetch it again")
    if head[8:9] != b"{":
        raise bad("header does not start with '{'")
    # A tensor has 4 colons and at most MAX_DIMS + 4 commas. Parsing costs a hundred times the bytes: count first.
    colons, commas = 0, 0
    for at in range(8, 8 + n, MIB):
        piece = bytearray(min(MIB, 8 + n - at))
        read_exactly(fd, memoryview(piece), at, path)
        colons, commas = colons + piece.count(b":"), commas + piece.count(b",")
    if colons > 8 * MAX_TENSORS or commas > 20 * MAX_TENSORS or n > 16 * MIB + 256 * colons:
        raise BadCheckpoint(f"too many entries, or none, in {n} bytes", file=path, expected=f"{MAX_TENSORS} tensors")
    raw = bytearray(n)
    read_exactly(fd, memoryview(raw), 8, path)
    return parse_json(raw, path), 8 + n


def _tensor(name: str, info: Any, path: str, start: int) -> Tensor:
    """One header entry; its shape, dtype and span agree, its place in the file is not checked yet."""

    def bad(found: str, expected: str) -> BadCheckpoint:
        return BadCheckpoint(found, file=path, field=short(name), expected=expected)

    if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        raise bad("a name that is not Unicode", "UTF-8")
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad(show(info), "an object with dtype, shape and data_offsets only")
    dtype, shape, span = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise bad(f"dtype {show(dtype)}", f"one of {' '.join(ITEMSIZE)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise bad(f"shape is {show(shape)}", f"a list of at most {MAX_DIMS} dimensions")
    if any(type(n) is not int or not 1 <= n <= MAX_DIM for n in shape):
        raise bad(f"shape {show(shape)}", f"integers from 1 to {MAX_DIM}")
    if not isinstance(span, list) or len(span) != 2 or any(type(n) is not int for n in span):
        raise bad(f"data_offsets {show(span)}", "two integers")
    begin, end = span
    if not 0 <= begin <= end:
        raise bad(f"data_offsets {show(span)}", "0 <= begin <= end")
    needed = math.prod(shape) * ITEMSIZE[dtype]
    if needed != end - begin:
        raise bad(f"data_offsets {show(span)} span {end - begin} bytes", f"{needed} for {dtype} {show(shape)}")
    return Tensor(name, dtype, tuple(shape), path, start + begin, needed)


def _scan(path: str) -> tuple[dict[str, Tensor], Identity]:
    fd = open_regular(path)
    try:
        identity = _identity(fd)
        size = identity[2]
        entries, start = _header(fd, size, path)
    finally:
        os.close(fd)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise BadCheckpoint(show(metadata), file=path, field="__metadata__", expected="strings only")
    if len(entries) > MAX_TENSORS:
        raise BadCheckpoint(f"{len(entries)} tensors", file=path, expected=f"at most {MAX_TENSORS}")
    tensors = {name: _tensor(name, info, path, start) for name, info in entries.items()}
    end = start
    for t in sorted(tensors.values(), key=lambda t: t.offset):
        if t.offset != end:
            found = f"data starts at {t.offset - start}, {'overlap' if t.offset < end else 'hole'}"
            raise BadCheckpoint(found, file=path, field=short(t.name), expected=str(end - start))
        end += t.nbytes
    if size < end:
        found = f"shard is {size} bytes, header needs {end}: download incomplete"
        raise BadCheckpoint(found, file=path, hint="Fetch it again")
    if size > end:
        raise BadCheckpoint(f"{size - end} trailing bytes after the last tensor", file=path, expected=f"{end} bytes")
    return tensors, identity


def read_header(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor of one file, in the header's order, after a full check; no tensor data is read.

    Raises BadCheckpoint (the header is impossible, or does not cover exactly the file), MissingFile, NotPermitted,
    ReadFailed.
    """
    return _scan(os.fspath(path))[0]


@dataclass(slots=True)
class _Open:
    fd: int
    users: int = 0


class Shards:
    """The tensors of a checkpoint folder. Reads are safe from several threads; descriptors are opened when needed.

    ``tensors`` by name, ``folder``, ``total_bytes`` of all tensors, ``bytes_read`` by finished reads, and
    ``notes``: one line for each oddity that is not an error.
    """

    def __init__(self, folder: str, tensors: dict[str, Tensor], identities: dict[str, Identity]) -> None:
        self.folder, self.tensors = folder, tensors
        self.total_bytes = sum(t.nbytes for t in tensors.values())
        self.bytes_read = 0
        self.notes: tuple[str, ...] = ()
        self._identities = identities
        self._lock = Lock()
        self._open: OrderedDict[tuple[str, bool], _Open] = OrderedDict()
        self._closed = False

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Shards:
        """Reads every header of a checkpoint: the index's shards, or the folder's ``*.safetensors``.

        Raises BadCheckpoint, MissingFile, NotPermitted, ReadFailed; Unsupported when there are only pickles.
        """
        folder = os.fspath(folder)
        if sys.byteorder != "little":
            raise Unsupported("big-endian host", file=folder)
        try:
            names = sorted(n for n in os.listdir(folder) if not n.startswith("."))
        except PermissionError as e:
            raise NotPermitted(e.strerror, file=folder) from None
        except (OSError, ValueError) as e:
            found = e.strerror if isinstance(e, OSError) else "not a possible file name"
            raise MissingFile(found, file=folder, expected="a checkpoint folder") from None
        weight_map: dict[str, str] = {}
        claimed: object = None
        if INDEX in names:
            weight_map, claimed = _index(os.path.join(folder, INDEX))
        chosen = sorted(set(weight_map.values())) or _loose(folder, names)
        tensors: dict[str, Tensor] = {}
        identities: dict[str, Identity] = {}
        for name in chosen:
            path = os.path.join(folder, name)
            try:
                found_here, identities[path] = _scan(path)
            except MissingFile as e:
                raise MissingFile(e.found, file=path, expected="a shard", hint="Fetch it again") from None
            if twice := found_here.keys() & tensors.keys():
                t = tensors[min(twice)]
                other = f"also in {os.path.basename(t.shard)}"
                raise BadCheckpoint(other, file=path, field=short(t.name), expected="each tensor once")
            tensors |= found_here
        for tensor, shard in weight_map.items():
            if tensor not in tensors or os.path.basename(tensors[tensor].shard) != shard:
                path = os.path.join(folder, shard)
                raise BadCheckpoint("not in this shard, though the index says so", file=path, field=short(tensor))
        if not tensors:
            raise BadCheckpoint("no tensors", file=folder)
        shards = cls(folder, tensors, identities)
        extra = [n for n in names if n.endswith(".safetensors") and n not in chosen]
        if extra:
            shards.notes += (f"{len(extra)} safetensors files not used: {short(' '.join(extra))}",)
        if claimed not in (None, shards.total_bytes):
            shards.notes += (f"{INDEX} says total_size {show(claimed)}, the shards hold {shards.total_bytes}",)
        return shards

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Shards:
        """One file alone, whatever it is called. Raises BadCheckpoint, MissingFile, NotPermitted, ReadFailed."""
        file = os.fspath(path)
        tensors, identity = _scan(file)
        return cls(os.path.dirname(file), tensors, {file: identity})

    def close(self) -> None:
        """Closes every descriptor, those of running reads when they end. Later reads raise Usage."""
        with self._lock:
            self._closed = True
            self._evict(0)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _evict(self, keep: int) -> None:
        if len(self._open) <= keep:
            return
        idle = [key for key, entry in self._open.items() if entry.users == 0]
        for key in idle[: len(self._open) - keep]:
            os.close(self._open.pop(key).fd)

    @contextmanager
    def _descriptor(self, shard: str, scattered: bool) -> Iterator[int]:
        """``scattered`` has a descriptor of its own, so that the kernel reads ahead on the other one only."""
        key = (shard, scattered)
        with self._lock:
            if self._closed:
                raise Usage("closed", file=self.folder)
            entry = self._open.get(key)
            if entry is None:
                entry = self._open[key] = _Open(self._reopened(shard, scattered))
            self._open.move_to_end(key)
            entry.users += 1
        try:
            yield entry.fd
        finally:
            with self._lock:
                entry.users -= 1
                self._evict(0 if self._closed else MAX_OPEN)

    def _reopened(self, shard: str, scattered: bool) -> int:
        try:
            fd = open_regular(shard)
        except MissingFile as e:
            raise ReadFailed(f"changed since it was opened: {e.found}", file=shard) from None
        if _identity(fd) != self._identities[shard]:
            os.close(fd)
            raise ReadFailed("changed since it was opened", file=shard)
        if scattered and hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fd

    def _outside(self, tensor: Tensor, found: str) -> Usage:
        expected = f"within {list(tensor.shape)} of a tensor of these shards"
        return Usage(found, file=tensor.shard, field=short(tensor.name), expected=expected)

    def read_into(self, tensor: Tensor, buffer: bytearray | memoryview | npt.NDArray[Any], start: int = 0) -> None:
        """Fills a writable contiguous buffer with the tensor's bytes from byte ``start`` on.

        Raises ReadFailed (I/O error, end of file, file replaced), Usage (outside the tensor).
        """
        view = as_bytes(buffer)
        if self.tensors.get(tensor.name) != tensor or start < 0 or start + len(view) > tensor.nbytes:
            raise self._outside(tensor, f"bytes {start} to {start + len(view)}")
        with self._descriptor(tensor.shard, False) as fd:
            read_exactly(fd, view, tensor.offset + start, tensor.shard)
        with self._lock:
            self.bytes_read += len(view)

    def advise(self, tensor: Tensor, window: Window) -> bool:
        """Asks the kernel to start reading all of a window, and returns; False where it takes no such advice."""
        if not hasattr(os, "posix_fadvise") or window.cols is None:
            return False
        width, item = math.prod(tensor.shape[1:]), tensor.itemsize
        rows = (row for first, stop in window.rows for row in range(first, stop))
        with self._descriptor(tensor.shard, True) as fd, suppress(OSError):
            for at, n in ((row * width + a, b - a) for row in rows for a, b in window.cols):
                os.posix_fadvise(fd, tensor.offset + at * item, n * item, os.POSIX_FADV_WILLNEED)
            return True
        return False

    def read_window(self, tensor: Tensor, window: Window, out: npt.NDArray[Any]) -> None:
        """Fills ``out``, C-contiguous raw storage of the window's shape and the tensor's item size.

        No byte outside the window is read. Beyond two dimensions ``out`` may also be [rows, *tensor.shape[1:]] when the
        window holds whole rows. Raises what ``read_into`` raises.
        """
        height, *rest = tensor.shape or (1,)
        width, cols = math.prod(rest), ((0, 1),) if window.cols is None else window.cols
        ranges = all(0 <= a < b <= height for a, b in window.rows) and all(0 <= a < b <= width for a, b in cols)
        if self.tensors.get(tensor.name) != tensor or not ranges or (window.cols is None) != (not rest):
            raise self._outside(tensor, f"rows {show(window.rows)} and columns {show(window.cols)}")
        full = cols == ((0, width),)
        fits = out.shape == window.shape or (full and out.shape == (window.shape[0], *rest))
        if out.itemsize != tensor.itemsize or not (fits or (not tensor.shape and out.size == window.count)):
            found = f"{list(out.shape)} of {out.itemsize} bytes each"
            raise Usage(found, field=short(tensor.name), expected=f"{list(window.shape)} of {tensor.itemsize}")
        item, view = tensor.itemsize, as_bytes(out)
        runs: Iterable[tuple[int, int]]
        if full:
            runs = ((a * width, (b - a) * width) for a, b in window.rows)
        else:
            runs = ((row * width + a, b - a) for i, j in window.rows for row in range(i, j) for a, b in cols)
        scattered = not full or len(window.rows) > 1 or len(view) < MIB
        at = 0
        with self._descriptor(tensor.shard, scattered) as fd:
            for first, n in runs:
                read_exactly(fd, view[at : at + n * item], tensor.offset + first * item, tensor.shard)
                at += n * item
        with self._lock:
            self.bytes_read += at


def _index(path: str) -> tuple[dict[str, str], object]:
    """The index's weight_map, every shard name checked, and the total_size it claims."""
    index = read_json(path, MAX_INDEX)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(show(weight_map), file=path, field="weight_map", expected="an object of shard names")
    for tensor, shard in weight_map.items():
        # The name, not the resolved path: in the Hugging Face cache every shard is a link out of the folder.
        if not isinstance(shard, str) or not re.fullmatch(r"(?!\.)[\w\-+=@,. ]{1,243}\.safetensors", shard):
            found = f"{show(shard)}: a shard name must be a plain file name"
            raise BadCheckpoint(found, file=path, field=f"weight_map.{short(tensor)}", expected="name.safetensors")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _loose(folder: str, names: list[str]) -> list[str]:
    """The weight files of a folder without an index."""
    found = [n for n in names if n.endswith(".safetensors")]
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if found:
        return [n for n in found if not n.startswith("consolidated")] or found
    if pickles := [n for n in names if re.fullmatch(r"pytorch_model.*\.bin|.*\.(pt|pth|ckpt|pkl)", n)]:
        path = os.path.join(folder, pickles[0])
        raise Unsupported("pickle checkpoints are not loaded; convert to safetensors", file=path)
    raise MissingFile("no weights", file=folder, expected="*.safetensors")
