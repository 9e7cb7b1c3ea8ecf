"""Packs under the user's cache: found by their checkpoint's fingerprint, made part by part when a run first needs it.

Whoever makes a part holds the pack's lock; a second process that needs the same waits, and finds the work done. The
lock is the kernel's own (flock): a killed process leaves none behind.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edge.store.cache import ELSEWHERE, cache_root, make_folder
from loaders.checkpoint import Checkpoint
from loaders.errors import CannotCreate, EdgeError, MissingFile, NotPermitted, ReadFailed, Usage
from loaders.formats import manifest as manifests
from loaders.formats.atomic import BROKEN, temporary
from loaders.formats.pack import ROOT, Pack
from loaders.formats.sharded import Notify
from loaders.packing import fingerprint, write_part, write_root

WAIT = 0.1
# Folders: a killed packing leaves one. Should there be thousands, the next packings share the work.
MOST_SWEPT = 100


def packs_folder() -> Path:
    """Where cached packs lie."""
    return cache_root() / "packs"


def key_of(checkpoint: Checkpoint, mark: str) -> str:
    """The name of a cached pack: for people, then for the machine."""
    name = re.sub(r"[^\w\-.]+", "-", checkpoint.folder.absolute().name)[:60].lstrip(".-") or "model"
    return f"{name}-{mark[:16]}"


def cached(checkpoint: Checkpoint) -> Path | None:
    """The folder of a checkpoint's pack, where there is one."""
    folder = packs_folder() / key_of(checkpoint, fingerprint(checkpoint))
    return folder if os.path.lexists(folder / manifests.NAME) else None


def ensure(checkpoint: Checkpoint, parts: Sequence[str], *, notify: Notify, room: int | None = None) -> Pack:
    """The checkpoint's pack with at least these parts, made now where they are missing.

    ``room``: bytes of memory packing may use. Raises BadCheckpoint for a damaged pack, which is never made anew in
    silence, CannotCreate or NotPermitted for a cache that cannot be written or a pack of another user, ReadFailed for a
    full disk.
    """
    mark = fingerprint(checkpoint)
    folder = packs_folder() / key_of(checkpoint, mark)
    while True:
        if not there(folder, parts):
            make_folder(folder.parent)
            with locked(folder, notify):
                collect(folder)
                if not os.path.lexists(folder):
                    write_root(checkpoint, folder, mark)
                for part in parts:
                    if not os.path.lexists(folder / part):
                        write_part(checkpoint, part, folder / part, mark, room=room, notify=notify)
        try:
            refuse_foreign(folder)
            pack = Pack.open(folder)
            if pack.parts.keys() >= set(parts):
                return pack
            pack.close()
        except (MissingFile, ReadFailed):
            # Removed by another process since we looked: made again. What is there, and wrong, is refused.
            if there(folder, parts):
                raise


def there(folder: Path, parts: Sequence[str]) -> bool:
    """Whether a pack has these parts; they are whole if they are there."""
    return all(os.path.lexists(path) for path in (folder, *(folder / part for part in parts)))


def refuse_foreign(folder: Path) -> None:
    """In a cache that several can write to, a pack with any weights could lie in wait. The system's own are trusted."""
    if not hasattr(os, "geteuid"):
        return
    try:
        owner = os.stat(folder).st_uid
    except OSError:
        return
    if os.geteuid() not in (0, owner) and owner != 0:
        hint = "Set EDGE_CACHE to a folder of your own, or give the pack itself as MODEL"
        raise NotPermitted(f"belongs to user {owner}", file=folder, hint=hint)


@contextmanager
def locked(folder: Path, notify: Notify) -> Iterator[None]:
    """Alone with a pack. Waits for another process, saying so. Raises NotPermitted, CannotCreate, ReadFailed."""
    fd = open_lock(folder)
    try:
        while not try_lock(fd, lock_path(folder)):
            notify("waiting for another process to pack", 0, 1)
            time.sleep(WAIT)
            if not is_at(fd, lock_path(folder)):
                os.close(fd)
                fd = open_lock(folder)
        yield
    finally:
        os.close(fd)


def lock_path(folder: Path) -> Path:
    """The lock of a pack, beside it: it outlives the pack."""
    return folder.with_name(f".{folder.name}.lock")


def open_lock(folder: Path) -> int:
    """A descriptor of a pack's lock."""
    path = lock_path(folder)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError as e:
        raise NotPermitted(e.strerror, file=path, hint=ELSEWHERE) from None
    except OSError as e:
        kind = ReadFailed if e.errno in BROKEN else CannotCreate
        raise kind(e.strerror or type(e).__name__, file=path, hint=ELSEWHERE) from None


def is_at(fd: int, path: Path) -> bool:
    """Whether a descriptor is of the file that lies at ``path`` now."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def try_lock(fd: int, path: Path) -> bool:
    """Takes the lock of an open file if it is free, and still the one at ``path``: whoever removes a pack removes it.

    Without flock (some systems, some network file systems) there is no lock: the rename alone decides.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise ReadFailed(e.strerror or type(e).__name__, file=path) from None
    return is_at(fd, path)


def collect(folder: Path) -> None:
    """Removes what killed processes left half-written, of this pack, whose lock is ours, and of those nobody locks."""
    sweep(folder)
    with suppress(OSError):
        locks = [name for name in os.listdir(folder.parent) if name.startswith(".") and name.endswith(".lock")]
        for other in (folder.with_name(name[1:-5]) for name in locks if name != lock_path(folder).name):
            fd = open_lock(other)
            try:
                if try_lock(fd, lock_path(other)):
                    sweep(other)
                    if not os.path.lexists(other):
                        os.unlink(lock_path(other))
            finally:
                os.close(fd)


def sweep(folder: Path) -> None:
    """Removes the half-written of one pack, MOST_SWEPT of it at a time. Only for the one that holds its lock."""
    for parent, prefix in ((folder.parent, temporary(folder.name)), (folder, ".")):
        with suppress(OSError):
            found = (n for n in os.listdir(parent) if n.startswith(prefix) and n.endswith(".tmp"))
            for name in islice(found, MOST_SWEPT):
                shutil.rmtree(parent / name, ignore_errors=True)


@dataclass(frozen=True)
class Entry:
    """A cached pack for a listing. ``state``: ready, source changed, source missing, or what is wrong with it."""

    key: str
    folder: Path
    source: str
    parts: dict[str, int]
    state: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "key": self.key, "folder": str(self.folder), "source": self.source, "parts": self.parts,
            "bytes": sum(self.parts.values()), "state": self.state,
        }  # fmt: skip


def listing() -> list[Entry]:
    """Every pack in the cache, by name."""
    try:
        names = sorted(n for n in os.listdir(packs_folder()) if not n.startswith("."))
    except OSError:
        return []
    return [entry(packs_folder() / name) for name in names if os.path.isdir(packs_folder() / name)]


def entry(folder: Path) -> Entry:
    """One pack of the cache, from its manifests and headers."""
    try:
        pack = Pack.open(folder)
    except EdgeError as error:
        return Entry(folder.name, folder, "", {}, str(error))
    with pack_closed(pack):
        source = pack.manifest.get("source", {})
        path = str(source.get("path", "")) if isinstance(source, dict) else ""
        return Entry(folder.name, folder, path, dict(pack.sizes()), state(path, str(pack.manifest.get("fingerprint"))))


@contextmanager
def pack_closed(pack: Pack) -> Iterator[Pack]:
    """The pack, closed at the end."""
    try:
        yield pack
    finally:
        pack.close()


def state(path: str, mark: str) -> str:
    """Whether a pack's source is still what it was made of."""
    if not os.path.isdir(path):
        return "source missing"
    try:
        checkpoint = Checkpoint.open(path)
    except EdgeError:
        return "source changed"
    try:
        return "ready" if fingerprint(checkpoint) == mark else "source changed"
    finally:
        checkpoint.close()


def named(text: str) -> Path:
    """The cached pack that a key, or a checkpoint's path, means. Raises MissingFile, Usage where it means several."""
    found = [e for e in listing() if e.key == text or e.source == str(Path(text).absolute())]
    found = found or [e for e in listing() if text and e.key.startswith(text)]
    if not found:
        raise MissingFile("no such pack", file=packs_folder() / text, hint="`edge pack --list` shows what there is")
    if len(found) > 1:
        raise Usage(f"{text} means {len(found)} packs", expected="one of " + ", ".join(e.key for e in found))
    return found[0].folder


def remove(folder: Path) -> None:
    """Takes a pack out of the cache. A run that reads it goes on: its descriptors stay open.

    Raises NotPermitted, MissingFile where another process was faster, ReadFailed.
    """
    with locked(folder, lambda *_: None):
        sweep(folder)
        doomed = folder.with_name(f"{temporary(folder.name)}removed.tmp")
        try:
            os.rename(folder, doomed)
        except FileNotFoundError as e:
            raise MissingFile(e.strerror, file=folder) from None
        except PermissionError as e:
            raise NotPermitted(e.strerror, file=folder) from None
        except OSError as e:
            raise ReadFailed(e.strerror or type(e).__name__, file=folder) from None
        shutil.rmtree(doomed, ignore_errors=True)
        with suppress(OSError):  # while it is ours: whoever waits for it sees that it is gone, and takes the next
            os.unlink(lock_path(folder))


__all__ = ["ROOT", "Entry", "cached", "ensure", "listing", "named", "packs_folder", "remove"]
