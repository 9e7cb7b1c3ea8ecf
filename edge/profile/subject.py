"""What is profiled: a model that is there, or random weights at the shapes of a config, made for the purpose."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.budget.plan import Plan
from edge.demo import model_path
from edge.profile import box
from edge.store import packs
from edge.store.cache import cache_root, make_folder
from edge.store.packages import Opened, open_source, weighty
from loaders.checkpoint import Checkpoint
from loaders.errors import MissingFile, Usage
from loaders.formats.manifest import VERSION
from loaders.formats.pack import Pack, parts_for
from loaders.formats.quant import BITS
from loaders.formats.sharded import Notify
from loaders.formats.synthetic import write_random
from loaders.network.tensors import total
from loaders.packing import fingerprint
from loaders.published import config_path
from loaders.synthetic_pack import is_random, write_random_pack

# Files that weights lie in.
DATA = (".safetensors", ".onnx", ".data")


@dataclass(frozen=True)
class Subject:
    """``source`` has the shapes to plan with; ``config``, where there are no weights, is what they are made of."""

    name: str
    source: Opened
    path: Path | None
    config: Path | None = None

    @property
    def random(self) -> bool:
        """Whether weights are random ones of ours."""
        return self.config is not None or (isinstance(self.source, Pack) and is_random(self.source))

    def facts(self) -> dict[str, Any]:
        """``model`` of a line of results."""
        if not isinstance(self.source, Checkpoint):
            mark = str(self.source.manifest.get("fingerprint"))
        else:
            mark = fingerprint(self.source) if weighty(self.source) else shape_mark(self.source)
        return {
            "name": self.name,
            "family": self.source.family.title,
            "parameters": total(self.source.model),
            "fingerprint": mark,
            "weights": "synthetic" if self.random else "real",
        }


def find(model: str | None, config: str | None) -> Subject:
    """MODEL, what --config names, or the demo. Raises Usage for both, and what opening them raises."""
    if model is not None and config is not None:
        raise Usage("given together", field="MODEL, --config", expected="one of them")
    if config is not None:
        path = config_path(config)
        name = path.name if path.is_dir() else path.stem
        return Subject(path.absolute().parent.name if name == "config" else name, sketched(path), None, path)
    path = model_path() if model is None else Path(model)
    try:
        source = open_source(path)
    except MissingFile as error:
        if error.file == os.fspath(path) and not path.exists():
            hint = "--config NAME measures random weights at a published model's shapes"
            raise MissingFile(error.found, file=path, expected=error.expected, hint=hint) from None
        raise
    return Subject("demo" if model is None else path.absolute().name, source, path)


def sketched(config: Path) -> Opened:
    """The shapes of a config.json, or of a folder's."""
    return open_source(config / "config.json" if config.is_dir() else config, shapes=True)


def shape_mark(source: Checkpoint) -> str:
    """What identifies shapes without weights."""
    return hashlib.sha256(json.dumps([VERSION, source.raw_config], sort_keys=True).encode()).hexdigest()


@contextmanager
def weights(subject: Subject, plans: Sequence[Plan], keep: bool, notify: Notify) -> Iterator[Path]:
    """What children open. Of a config: a pack of random weights, or a checkpoint where some plan wants more than eight
    bits, made under the cache, and gone in the end unless ``keep``.

    Raises ReadFailed for a disk that is too full, before anything is written.
    """
    if subject.path is not None:
        yield subject.path
        return
    assert subject.config is not None
    folder = made_folder(subject, plans)
    make_folder(folder.parent)
    with shared(folder) as alone:
        made = not folder.exists()
        try:
            if made:
                make(subject.config, folder, precisions_of(plans), notify)
            yield folder
        finally:
            # What an earlier run was told to keep stays.
            if made and not keep and alone():
                remove(folder)


@contextmanager
def shared(folder: Path) -> Iterator[Callable[[], bool]]:
    """While entered, others know that a folder is in use; what it gives says whether nobody else uses it."""
    try:
        import fcntl
    except ImportError:
        yield lambda: True
        return
    lock = packs.lock_path(folder)
    fd = packs.open_lock(folder)

    def alone() -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        lock.unlink(missing_ok=True)
        return True

    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_SH)
        yield alone
    finally:
        os.close(fd)


def precisions_of(plans: Sequence[Plan]) -> tuple[str, ...]:
    """Of the plans, in the order packs have them, and what else they want."""
    wanted = {plan.precision for plan in plans}
    return (*(p for p in BITS if p in wanted), *sorted(wanted - {*BITS}))


def made_folder(subject: Subject, plans: Sequence[Plan]) -> Path:
    """Where random weights lie: other shapes and other precisions lie elsewhere."""
    assert isinstance(subject.source, Checkpoint)
    mark = hashlib.sha256(f"{shape_mark(subject.source)} {precisions_of(plans)}".encode()).hexdigest()
    return cache_root() / "synthetic" / f"{subject.name[:60]}-{mark[:16]}"


def make(config: Path, folder: Path, precisions: tuple[str, ...], notify: Notify) -> None:
    """A pack where it will do, else a checkpoint."""
    if all(precision in BITS for precision in precisions):
        write_random_pack(config, folder, precisions, notify=notify)
    else:
        write_random(config, folder, notify=notify)


def remove(folder: Path) -> None:
    """Random weights, and the pack that was made of them."""
    if folder.exists():
        if not (folder / "manifest.json").exists():
            with packed(folder) as pack:
                if pack is not None:
                    packs.remove(pack)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def packed(path: Path) -> Iterator[Path | None]:
    """The cached pack of a checkpoint, where there is one."""
    source = open_source(path)
    try:
        yield packs.cached(source) if isinstance(source, Checkpoint) else None
    finally:
        source.close()


def needs_packing(path: Path, plan: Plan) -> bool:
    """Whether the first run of a plan would make a pack, or a part of one."""
    if plan.precision not in BITS:
        return False
    source = open_source(path)
    try:
        if not isinstance(source, Checkpoint):
            return False
        folder = packs.cached(source)
        return folder is None or not packs.there(folder, parts_for(source.model, (plan.precision,)))
    finally:
        source.close()


def files_of(path: Path, precision: str) -> list[Path]:
    """The files that runs of a model at a precision read: those of its pack, or its own."""
    with packed(path) as pack:
        folder = path if pack is None or precision not in BITS else pack
    return sorted(file for file in folder.rglob("*") if file.suffix in DATA and file.is_file())


def drop(files: Sequence[Path]) -> bool:
    """Puts files out of the page cache; False where the system cannot be asked to. Of files that went, nothing."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        with suppress(OSError):
            box.drop_from_page_cache(file)
    return True


def cached_share(files: Sequence[Path]) -> float | None:
    """The share of files that is in the page cache; None where the system does not say."""
    if not hasattr(os, "posix_fadvise"):
        return None
    try:
        size = sum(file.stat().st_size for file in files)
        return min(1.0, sum(map(box.cached_bytes, files)) / size) if size else 0.0
    except OSError:
        return None
