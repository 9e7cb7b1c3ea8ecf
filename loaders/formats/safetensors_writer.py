"""Writing safetensors: streamed, and never there by halves."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType

from loaders.errors import CannotCreate, ReadFailed, Usage
from loaders.formats.buffers import Buffer, as_bytes, write_exactly
from loaders.formats.config import short
from loaders.formats.safetensors import ITEMSIZE

# Where the data begins, a multiple of this: what is mapped is aligned for the widest loads.
ALIGNED = 64


class Writer:
    """Streams tensors to a safetensors file that appears, whole and synced, only when the ``with`` block succeeds.

    ``specs``: name -> (dtype, shape). Tensors lie in spec order within each item size, larger items first (torch cannot
    view unaligned data), and may be written in any order, each exactly once. Those of ``first`` lie before all others:
    the data begins at a multiple of 64 bytes of the file, and where their sizes are multiples of some, so do they.

    Raises CannotCreate (no such folder, read-only), ReadFailed (disk full, too large, I/O error), Usage.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, tuple[str, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
        first: Collection[str] = (),
    ) -> None:
        self.path = os.fspath(path)
        folder, name = os.path.split(self.path)
        self._folder = folder or "."
        self._temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
        header: dict[str, object] = {"__metadata__": dict({"format": "pt"} if metadata is None else metadata)}
        self._places: dict[str, tuple[int, int]] = {}
        self._written: set[str] = set()
        self._fd = -1
        end = 0
        ranks = {tensor: (tensor not in first, -ITEMSIZE.get(dtype, 0)) for tensor, (dtype, _) in specs.items()}
        for tensor, (dtype, shape) in sorted(specs.items(), key=lambda spec: ranks[spec[0]]):
            if dtype not in ITEMSIZE or any(n < 1 for n in shape) or tensor == "__metadata__":
                raise Usage(f"{dtype} {tuple(shape)}", file=self.path, field=short(tensor))
            nbytes = math.prod(shape) * ITEMSIZE[dtype]
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
            self._places[tensor] = (end, nbytes)
            end += nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % ALIGNED)
        self._head = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> Writer:
        with suppress(OSError):  # left by a killed process that had our id: in containers ids repeat
            os.unlink(self._temporary)
        try:
            if os.path.isdir(self.path):
                raise IsADirectoryError(errno.EISDIR, "is a folder")
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as e:
            kind = ReadFailed if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else CannotCreate
            raise kind(f"cannot create: {e.strerror}", file=self.path) from None
        try:
            self._put(memoryview(self._head), 0)
        except BaseException:
            self._discard()
            raise
        return self

    def _put(self, view: memoryview, offset: int) -> None:
        write_exactly(self._fd, view, offset, self.path)

    def write(self, name: str, chunks: Iterable[Buffer]) -> None:
        """One tensor's bytes, in pieces that together have exactly its size."""
        if name not in self._places or name in self._written or self._fd < 0:
            raise Usage("not in the specs, or written already", file=self.path, field=short(name))
        start, nbytes = self._places[name]
        at = 0
        for chunk in chunks:
            view = as_bytes(chunk, writable=False)
            if at + len(view) > nbytes:
                raise Usage(f"more than {nbytes} bytes", file=self.path, field=short(name))
            self._put(view, len(self._head) + start + at)
            at += len(view)
        if at != nbytes:
            raise Usage(f"{at} bytes", file=self.path, field=short(name), expected=str(nbytes))
        self._written.add(name)

    def _discard(self) -> None:
        if self._fd < 0:
            return
        with suppress(OSError):
            if self._owned():
                os.unlink(self._temporary)
        os.close(self._fd)
        self._fd = -1

    def _owned(self) -> bool:
        """Another writer of this process to the same path may have replaced the temporary file."""
        return os.path.samestat(os.fstat(self._fd), os.stat(self._temporary))

    def _publish(self) -> None:
        if missing := self._places.keys() - self._written:
            raise Usage("never written", file=self.path, field=short(min(missing)))
        try:
            os.fsync(self._fd)
            if not self._owned():
                raise ReadFailed("another writer took the temporary file", file=self.path)
            os.replace(self._temporary, self.path)
        except OSError as e:
            raise ReadFailed(f"cannot finish: {e.strerror}", file=self.path) from None
        with suppress(OSError):  # the file is whole already, and some file systems cannot sync a folder
            folder = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._discard()
