"""A folder that appears whole or not at all: written as a temporary sibling, synced, renamed at the end."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loaders.errors import CannotCreate, EdgeError, NotPermitted, ReadFailed

TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# Seconds after which a folder that nobody holds is one that nobody is about to hold.
SETTLED = 2.0


@contextmanager
def fresh_folder(output: str | Path, needed: int = 0) -> Iterator[Path]:
    """A temporary sibling that becomes ``output`` when the block ends well, and disappears when it does not.

    ``needed``: bytes that have to be free on its file system. Everything in the folder is synced before it gets its
    name; what a killed process left of the same output goes first. Raises CannotCreate (``output`` exists, or its
    parent does not), NotPermitted, ReadFailed (disk full, I/O error; any OSError of the block becomes one).
    """
    output = Path(output)
    absent(output)
    parent = output.absolute().parent
    try:
        sweep(parent, temporary(output.name))
        free = shutil.disk_usage(parent).free
        folder = Path(tempfile.mkdtemp(prefix=temporary(output.name), suffix=".tmp", dir=parent))
        held = hold(folder)
    except PermissionError as e:
        raise NotPermitted(e.strerror, file=parent) from None
    except OSError as e:
        if e.errno in BROKEN:
            raise ReadFailed(e.strerror, file=parent) from None
        raise CannotCreate(e.strerror or type(e).__name__, file=parent, expected="a folder to write into") from None
    try:
        if needed > free:
            raise ReadFailed(f"disk full: needs {needed} bytes, has {free} bytes free", file=parent)
        yield folder
        os.chmod(folder, 0o755 & ~umask())
        sync_tree(folder)
        rename(folder, output)
    except OSError as e:
        raise ReadFailed(e.strerror or type(e).__name__, file=output) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)
    with suppress(OSError):  # it is there already, and some file systems cannot sync a folder
        sync(parent)


def hold(folder: Path) -> int | None:
    """A descriptor that locks a folder until it is closed, by whoever or by the system; None where it is locked, or
    where there are no such locks (some systems, some network file systems).
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def sweep(parent: Path, prefix: str) -> None:
    """Removes half-written folders that no process holds any more."""
    with suppress(OSError):
        for name in (n for n in os.listdir(parent) if n.startswith(prefix) and n.endswith(".tmp")):
            fd = hold(parent / name)
            if fd is None:
                continue
            try:
                if time.time() - os.fstat(fd).st_ctime > SETTLED:
                    shutil.rmtree(parent / name, ignore_errors=True)
            finally:
                os.close(fd)


def refusal(error: OSError, file: str | Path) -> EdgeError:
    """What a file that cannot be written is refused with: NotPermitted, ReadFailed where the disk is full or broken,
    CannotCreate.
    """
    if isinstance(error, PermissionError):
        return NotPermitted(error.strerror, file=file)
    kind = ReadFailed if error.errno in BROKEN else CannotCreate
    return kind(error.strerror or type(error).__name__, file=file)


def temporary(name: str) -> str:
    """What the names of a folder's temporary siblings begin with.

    The end of the name: with all of it, one of the longest that are allowed would be too long, and packs differ there.
    """
    return f".{name[-32:]}."


def absent(output: Path) -> None:
    """Raises CannotCreate for a path that is in use, or that no file system would take: before the work, not after."""
    try:
        os.lstat(output)
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            raise CannotCreate(e.strerror, file=output, expected="a shorter name") from None
        return
    raise taken(output)


def taken(output: Path) -> CannotCreate:
    """What a path that is in use is refused with."""
    return CannotCreate("already there", file=output, expected="a folder that does not exist yet")


def rename(folder: Path, output: Path) -> None:
    """Gives the folder its name, unless somebody else took it in the meantime."""
    try:
        os.rename(folder, output)
    except OSError as e:
        if e.errno in TAKEN:
            raise taken(output) from None
        raise


def sync_tree(folder: Path) -> None:
    """Every file and folder below ``folder``, and itself, on disk when this returns."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root, name))
        with suppress(OSError):  # some file systems cannot sync a folder
            sync(Path(root))


def sync(path: Path) -> None:
    """One file or folder on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
