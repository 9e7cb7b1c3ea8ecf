"""Where edge keeps what it can make again: packs, and what it has measured of this machine."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from loaders.errors import CannotCreate, EdgeError, NotPermitted
from loaders.formats.config import read_json

MOST = 1 << 20
MOUNTS = Path("/proc/self/mountinfo")
ELSEWHERE = "Set EDGE_CACHE to a folder that can be written"


def cache_root() -> Path:
    """``EDGE_CACHE``, or the user's cache folder. It may not exist yet."""
    if named := os.environ.get("EDGE_CACHE"):
        return Path(named).absolute()
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "edge"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "edge"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "edge"


def make_folder(path: Path) -> Path:
    """The folder, made if it was not there. Raises NotPermitted or CannotCreate, naming it and EDGE_CACHE."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except PermissionError as e:
        raise NotPermitted(e.strerror, file=path, hint=ELSEWHERE) from None
    except OSError as e:
        raise CannotCreate(e.strerror, file=path, hint=ELSEWHERE) from None
    return path


def in_memory(path: Path) -> bool:
    """Whether a folder lies on a file system that is memory itself; False where the system does not say."""
    try:
        device = os.stat(path).st_dev
        mounts = MOUNTS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = (line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == number)
    return any(kind in ("tmpfs", "ramfs") for kind in kinds)


def recall(name: str) -> dict[str, Any]:
    """A small file of the cache, as data; empty where there is none or it cannot be read."""
    try:
        return read_json(cache_root() / name, MOST)
    except EdgeError:
        return {}


def remember(name: str, key: str, value: Any) -> None:
    """Sets one key of a small file; where the cache cannot be written, nothing is remembered."""
    with suppress(OSError, EdgeError):
        folder = make_folder(cache_root())
        data = json.dumps({**recall(name), key: value}, indent=1, sort_keys=True).encode()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.replace(file.name, folder / name)
            except BaseException:
                os.unlink(file.name)
                raise
