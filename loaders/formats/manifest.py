"""The manifest of a folder that edge writes: what is in it, how large, with which sums. Without one it is not a pack.

A manifest is written last and names every file, so a folder that was left half-written has none; it carries a sum of
itself, so an edited one is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.errors import BadCheckpoint, CannotCreate, MissingFile, Unsupported
from loaders.formats.atomic import refusal, sync
from loaders.formats.config import MIB, open_regular, read_json, short, show
from loaders.formats.safetensors import read_exactly

NAME = "manifest.json"
FORMAT, VERSION = "edge pack", 2
MOST = 4 * MIB
PIECE = 4 * MIB
HEX = re.compile(r"[0-9a-f]{64}")
PLAIN_NAME = re.compile(r"[\w\-+=@,.]{1,200}")


@dataclass(frozen=True)
class Kind:
    """A kind of folder. ``word`` and the two hints are for people: of a damaged one, and of another version.

    ``folders``: files may also lie in folders of these names, one level down. ``own``: every file must be one of its
    own, under one name alone: what is read through a link is not what was checked.
    """

    format: str
    version: int
    word: str
    damaged: str
    again: str
    folders: tuple[str, ...] = ()
    own: bool = False

    def bad(self, found: str, file: Path, field: str | None = None, expected: str | None = None) -> BadCheckpoint:
        """One that is not what was written."""
        return BadCheckpoint(found, file=file, field=field, expected=expected, hint=self.damaged)


PACK = Kind(FORMAT, VERSION, "pack", "The pack is damaged: remove it and pack again", "Pack the checkpoint again")


def digest(path: str | os.PathLike[str], progress: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, read in pieces; ``progress`` is told the bytes of each. Raises ReadFailed."""
    found, buffer = hashlib.sha256(), bytearray(PIECE)
    fd = open_regular(path)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            view = memoryview(buffer)[: min(PIECE, size - at)]
            read_exactly(fd, view, at, os.fspath(path))
            found.update(view)
            at += len(view)
            progress(len(view))
    finally:
        os.close(fd)
    return found.hexdigest()


def seal(manifest: dict[str, Any]) -> str:
    """The sum of everything in a manifest but itself."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe(folder: Path, names: Iterable[str], kind: Kind = PACK, **facts: Any) -> bytes:
    """The manifest of files that lie in ``folder``, as they are read back from there."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in sorted(names)}
    return sealed({"format": kind.format, "version": kind.version, **facts, "files": files})


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as its file, with a sum of itself."""
    return (json.dumps({**manifest, "seal": seal(manifest)}, indent=1, sort_keys=True) + "\n").encode()


def rewrite(folder: Path, manifest: dict[str, Any]) -> None:
    """Puts another manifest in the place of the one that is there, at once or not at all.

    Only for the one that holds the pack's lock, and read what it changes while holding it. Raises NotPermitted,
    CannotCreate (a pack that cannot be written to, or a manifest that nobody would read), ReadFailed (full disk, I/O).
    """
    path, data = folder / NAME, sealed(manifest)
    if len(data) > MOST:
        raise CannotCreate(f"{len(data)} bytes", file=path, expected=f"at most {MOST}")
    try:
        # A folder: what a killed process leaves in a pack is swept away as one.
        with tempfile.TemporaryDirectory(
            prefix=f".{NAME}.", suffix=".tmp", dir=folder, ignore_cleanup_errors=True
        ) as place:
            fresh = Path(place, NAME)
            fresh.write_bytes(data)
            shutil.copymode(path, fresh)
            sync(fresh)
            os.replace(fresh, path)
    except OSError as e:
        raise refusal(e, path) from None
    with suppress(OSError):  # it is there already, and some file systems cannot sync a folder
        sync(folder)


def is_pack(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder says it is a pack; what else is wrong with it is for :func:`read`."""
    return says(folder, PACK)


def says(folder: str | os.PathLike[str], kind: Kind) -> bool:
    """Whether a folder says it is of a kind. Raises what reading JSON raises, but for a file that is not there."""
    path = Path(folder, NAME)
    if not os.path.lexists(path):
        return False
    return read_json(path, MOST).get("format") == kind.format


def read(folder: Path, part: str, beside: Iterable[str] = ()) -> dict[str, Any]:
    """The manifest of one part of a pack: :func:`opened`, and of that part."""
    manifest = opened(folder, PACK, beside)
    if manifest.get("part") != part:
        raise damaged(f"part {show(manifest.get('part'))}", folder / NAME, "part", part)
    return manifest


def opened(folder: Path, kind: Kind, beside: Iterable[str] = ()) -> dict[str, Any]:
    """A folder's manifest, its seal and the size of every file checked.

    Hidden files and those ``beside`` may lie in the folder as well; nothing else may, as it might be read in the place
    of what was written. A link is followed, as what counts is the content, unless files must be the folder's own.

    Raises MissingFile without one, Unsupported for another version, BadCheckpoint for what does not agree.
    """
    path = folder / NAME
    manifest = read_json(path, MOST)
    if manifest.get("format") != kind.format:
        raise BadCheckpoint(show(manifest.get("format")), file=path, field="format", expected=f'"{kind.format}"')
    if manifest.get("version") != kind.version:
        found = f"{kind.word} version {show(manifest.get('version'))}"
        raise Unsupported(found, file=path, field="version", expected=str(kind.version), hint=kind.again)
    if manifest.get("seal") != seal(manifest):
        raise kind.bad("does not agree with its own sum", path, "seal")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise kind.bad(show(files), path, "files", "an object of files")
    for name, facts in files.items():
        _check_entry(path, name, facts, kind)
    places = {name.rpartition("/")[0] for name in files} - {""}
    if kind.own:
        for name in (NAME, *places, *files):
            _check_own(folder / name, kind)
    for name, facts in files.items():
        _check_size(folder / name, facts["bytes"], kind)
    others = foreign(folder, {NAME, *files, *beside}, places)
    if others:
        raise kind.bad(
            f"not a file of this {kind.word}", folder / short(others[0]), None, "those of its manifest alone"
        )
    return manifest


def foreign(folder: Path, known: set[str], places: Iterable[str] = ()) -> list[str]:
    """Names that are not hidden and not ``known``, in a folder and in its ``places``. Raises MissingFile."""
    found = []
    for place in ("", *sorted(places)):
        try:
            there = sorted(name for name in os.listdir(folder / place) if not name.startswith("."))
        except OSError as e:
            raise MissingFile(e.strerror, file=folder / place) from None
        found += [f"{place}/{name}" if place else name for name in there]
    return [name for name in found if name not in known and name not in places]


def verify(
    folder: Path,
    manifest: dict[str, Any],
    most: int | None = None,
    kind: Kind = PACK,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Reads every file of a manifest, of at most ``most`` bytes each, and compares its sum; returns the bytes read.

    Raises BadCheckpoint.
    """
    total = 0
    for name, facts in manifest["files"].items():
        if most is not None and facts["bytes"] > most:
            continue
        compare(folder / name, digest(folder / name, progress), facts["sha256"], kind)
        total += facts["bytes"]
    return total


def compare(path: Path, found: str, wanted: str, kind: Kind = PACK) -> None:
    """Raises BadCheckpoint for a file of another sum."""
    if found != wanted:
        raise kind.bad("differs from what was written (sha256)", path)


damaged = PACK.bad


def _check_entry(path: Path, name: str, facts: Any, kind: Kind) -> None:
    place, _, last = name.rpartition("/")
    plain = PLAIN_NAME.fullmatch(last) and not last.startswith(".") and name != NAME
    if not plain or (place not in kind.folders and "/" in name) or name in kind.folders:
        raise kind.bad(f"file name {show(name)}", path, "files", "a plain file name")
    if not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
        raise kind.bad(show(facts), path, f"files.{name}", "bytes and sha256")
    if type(facts["bytes"]) is not int or facts["bytes"] < 0:
        raise kind.bad(show(facts["bytes"]), path, f"files.{name}.bytes", "a size")
    if not isinstance(facts["sha256"], str) or not HEX.fullmatch(facts["sha256"]):
        raise kind.bad(show(facts["sha256"]), path, f"files.{name}.sha256", "64 hexadecimal digits")


def _check_own(path: Path, kind: Kind) -> None:
    """Not a link, and without a second name. Raises MissingFile, BadCheckpoint."""
    try:
        found = os.lstat(path)
    except OSError as e:
        raise MissingFile(e.strerror, file=path) from None
    if stat.S_ISLNK(found.st_mode):
        raise kind.bad("a symbolic link", path, None, "a file of its own")
    if stat.S_ISREG(found.st_mode) and found.st_nlink != 1:
        raise kind.bad(f"a file with {found.st_nlink} names (hard links)", path, None, "a file of its own")


def _check_size(path: Path, expected: int, kind: Kind) -> None:
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if size != expected:
        raise kind.bad(f"{size} bytes", path, None, f"{expected} bytes")
