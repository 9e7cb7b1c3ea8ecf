"""Keeps tables of which single rows are read from growing into memory: ONNX Runtime maps files, the kernel maps more
than what is touched, up to 2 MiB for a row of a few kilobytes.

What was touched is given back after every so many tokens; its pages are the file's, and clean. Where the system shows
no mappings nothing is done, and nothing is known.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

MAPS = Path("/proc/self/maps")
MADV_RANDOM, MADV_DONTNEED = 1, 4

# (file, offset, length)
Region = tuple[Path, int, int]


def cool(regions: Iterable[Region]) -> None:
    """Asks the kernel to forget what it read of these before: it maps what it has in large pieces, rows one by one."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file, offset, length in regions:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class Pages:
    """Mappings of ``regions`` in this process, of which at most the rows of ``most`` tokens stay."""

    def __init__(self, regions: Iterable[Region], most: int) -> None:
        self.most, self.tokens = most, 0
        self.mapped = mappings(regions)
        for start, size in self.mapped:
            advise(start, size, MADV_RANDOM)
        self.drop()

    def passed(self, tokens: int) -> None:
        """So many rows were read."""
        self.tokens += tokens
        if self.tokens >= self.most:
            self.drop()

    def drop(self) -> None:
        """Gives all of it back."""
        self.tokens = 0
        for start, size in self.mapped:
            advise(start, size, MADV_DONTNEED)


def mappings(regions: Iterable[Region]) -> list[tuple[int, int]]:
    """(address, bytes) of what is mapped of these regions alone: a mapping that holds more of the file is left out."""
    if not sys.platform.startswith("linux"):
        return []
    page = os.sysconf("SC_PAGE_SIZE")
    wanted = []
    for file, offset, length in regions:
        facts = os.stat(file)
        name = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}", facts.st_ino
        wanted.append((*name, offset // page * page, -(-(offset + length) // page) * page))
    try:
        lines = MAPS.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        span, mode, offset_text, device, inode = line.split(maxsplit=5)[:5]
        start, stop = (int(address, 16) for address in span.split("-"))
        first = int(offset_text, 16)
        for wanted_device, wanted_inode, low, high in wanted:
            same = device == wanted_device and int(inode) == wanted_inode and mode.endswith("p")
            if same and low <= first and first + stop - start <= high:
                found.append((start, stop - start))
                break
    return found


def advise(address: int, size: int, advice: int) -> None:
    """madvise of memory that this process has mapped."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise(address, size, advice)
