"""A file that is written at many places and summed from its first byte to its last, as far as it is done."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from loaders.errors import ReadFailed
from loaders.formats.atomic import refusal
from loaders.formats.buffers import Buffer, as_bytes, write_exactly
from loaders.formats.safetensors import read_exactly

PIECE = 1 << 20


class Output:
    """A new file of ``size`` bytes, zero where nothing is put. It is removed when the ``with`` block fails.

    Raises CannotCreate, NotPermitted, ReadFailed (disk full, I/O error).
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._sum = hashlib.sha256()
        self._summed = self._wanted = 0
        self._piece = bytearray(PIECE)
        self._behind = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._fd = -1

    def __enter__(self) -> Output:
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, self.size)
        except OSError as e:
            self._discard()
            raise refusal(e, self.path) from None
        return self

    def put(self, data: Buffer, offset: int) -> None:
        """Bytes at an offset."""
        write_exactly(self._fd, as_bytes(data, writable=False), offset, self.path)

    def put_strips(self, data: Buffer, width: int, offset: int, line: int) -> None:
        """Strips of ``width`` bytes, one of each line of ``line`` bytes; the first one at ``offset``."""
        view = as_bytes(data, writable=False)
        if width == line:
            self.put(view, offset)
            return
        for at in range(0, len(view), width):
            strip = view[at : at + width]
            try:
                whole = os.pwrite(self._fd, strip, offset) == width
            except OSError as e:
                raise ReadFailed(f"write at offset {offset}: {e.strerror}", file=self.path) from None
            if not whole:
                self.put(strip, offset)
            offset += line

    def finished(self, end: int) -> None:
        """Nothing more is put before ``end``: it can be summed, while what was written is still in memory."""
        if end > self._wanted:
            self._wanted = end
            self._last = self._behind.submit(self._sum_to, end)

    def _sum_to(self, end: int) -> None:
        view = memoryview(self._piece)
        while self._summed < end:
            piece = view[: min(PIECE, end - self._summed)]
            read_exactly(self._fd, piece, self._summed, str(self.path))
            self._sum.update(piece)
            self._summed += len(piece)

    def sha256(self) -> str:
        """Of the whole file, which must be finished."""
        self.finished(self.size)
        if self._last is not None:
            self._last.result()
        return self._sum.hexdigest()

    def _discard(self) -> None:
        if self._fd >= 0:
            with suppress(OSError):
                os.unlink(self.path)
            os.close(self._fd)
            self._fd = -1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._behind.shutdown(cancel_futures=kind is not None)
        if kind is not None:
            self._discard()
            return
        try:
            os.close(self._fd)
        except OSError as e:
            raise refusal(e, self.path) from None
        self._fd = -1
