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
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from loaders.errors import BadCheckpoint, CannotCreate, MissingFile, Unsupported
from loaders.formats.atomic import refusal, sync
from loaders.formats.config import MIB, open_regular, read_json, short, show
from loaders.formats.safetensors import read_exactly

NAME = "manifest.json"
FORMAT, VERSION = "edge pack", 1
MOST = 4 * MIB
PIECE = 4 * MIB
HEX = re.compile(r"[0-9a-f]{64}")
PLAIN_NAME = re.compile(r"[\w\-+=@,.]{1,200}")


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in pieces. Raises ReadFailed."""
    found, buffer = hashlib.sha256(), bytearray(PIECE)
    fd = open_regular(path)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            view = memoryview(buffer)[: min(PIECE, size - at)]
            read_exactly(fd, view, at, os.fspath(path))
            found.update(view)
            at += len(view)
    finally:
        os.close(fd)
    return found.hexdigest()


def seal(manifest: dict[str, Any]) -> str:
    """The sum of everything in a manifest but itself."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe(folder: Path, names: Iterable[str], **facts: Any) -> bytes:
    """The manifest of files that lie in ``folder``, as they are read back from there."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in sorted(names)}
    return sealed({"format": FORMAT, "version": VERSION, **facts, "files": files})


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
    path = Path(folder, NAME)
    if not os.path.lexists(path):
        return False
    return read_json(path, MOST).get("format") == FORMAT


def read(folder: Path, part: str, beside: Iterable[str] = ()) -> dict[str, Any]:
    """The manifest of one part, its seal and the size of every file checked.

    Hidden files and those ``beside`` may lie in the folder as well; nothing else may, as it might be read in the place
    of what was written. A link is followed: what counts is the content.

    Raises MissingFile without one, Unsupported for another version, BadCheckpoint for what does not agree.
    """
    path = folder / NAME
    manifest = read_json(path, MOST)
    if manifest.get("format") != FORMAT:
        raise BadCheckpoint(show(manifest.get("format")), file=path, field="format", expected=f'"{FORMAT}"')
    if manifest.get("version") != VERSION:
        found = f"pack version {show(manifest.get('version'))}"
        raise Unsupported(found, file=path, field="version", expected=str(VERSION), hint="Pack the checkpoint again")
    if manifest.get("seal") != seal(manifest):
        raise damaged("does not agree with its own sum", path, "seal")
    if manifest.get("part") != part:
        raise damaged(f"part {show(manifest.get('part'))}", path, "part", part)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise damaged(show(files), path, "files", "an object of files")
    for name, facts in files.items():
        _check_entry(path, name, facts)
        _check_size(folder / name, facts["bytes"])
    try:
        others = sorted(n for n in os.listdir(folder) if not n.startswith(".") and n not in (NAME, *files, *beside))
    except OSError as e:
        raise MissingFile(e.strerror, file=folder) from None
    if others:
        raise damaged("not a file of this pack", folder / short(others[0]), None, "those of its manifest alone")
    return manifest


def verify(folder: Path, manifest: dict[str, Any], most: int | None = None) -> int:
    """Reads every file of a manifest, of at most ``most`` bytes each, and compares its sum; returns the bytes read.

    Raises BadCheckpoint.
    """
    total = 0
    for name, facts in manifest["files"].items():
        if most is not None and facts["bytes"] > most:
            continue
        if digest(folder / name) != facts["sha256"]:
            raise damaged("differs from what was written (sha256)", folder / name)
        total += facts["bytes"]
    return total


def damaged(found: str, file: Path, field: str | None = None, expected: str | None = None) -> BadCheckpoint:
    """A pack that is not what was written."""
    return BadCheckpoint(
        found, file=file, field=field, expected=expected, hint="The pack is damaged: remove it and pack again"
    )


def _check_entry(path: Path, name: str, facts: Any) -> None:
    if not PLAIN_NAME.fullmatch(name) or name.startswith(".") or name == NAME:
        raise damaged(f"file name {show(name)}", path, "files", "a plain file name")
    if not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
        raise damaged(show(facts), path, f"files.{name}", "bytes and sha256")
    if type(facts["bytes"]) is not int or facts["bytes"] < 0:
        raise damaged(show(facts["bytes"]), path, f"files.{name}.bytes", "a size")
    if not isinstance(facts["sha256"], str) or not HEX.fullmatch(facts["sha256"]):
        raise damaged(show(facts["sha256"]), path, f"files.{name}.sha256", "64 hexadecimal digits")


def _check_size(path: Path, expected: int) -> None:
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if size != expected:
        raise damaged(f"{size} bytes", path, None, f"{expected} bytes")
