"""Where what was measured of a model is kept: in its pack. A user's own checkpoint folder is read, never written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge.store import packs
from edge.store.packages import Opened
from loaders.errors import CannotCreate, MissingFile, NotPermitted, ReadFailed
from loaders.formats import manifest as manifests
from loaders.formats.measured import MOST, Measured, load, merge, parse, plain
from loaders.formats.pack import MEASURED, PARTS, ROOT, Pack, measured_in
from loaders.formats.package import Package
from loaders.formats.sharded import Notify
from loaders.network.spec import Model
from loaders.sketch import has_weights
from loaders.weights import Source


def measured(source: Opened) -> tuple[Measured, ...]:
    """What is known of a source: a pack's results; those in a checkpoint's cached pack, over those in its folder.

    Raises BadCheckpoint or Unsupported for results that cannot be, and for a damaged pack.
    """
    if isinstance(source, Pack | Package):
        return source.measured
    beside = load(source.folder, source.model)
    folder = packs.cached(source) if has_weights(source) else None
    if folder is None:
        return beside
    try:
        packs.refuse_foreign(folder)
        return merge(beside, read(folder, source.model)[1])
    except (MissingFile, NotPermitted, ReadFailed):
        return beside  # removed since, or another user's: a run would not take it either


def read(folder: Path, model: Model) -> tuple[dict[str, object], tuple[Measured, ...]]:
    """The root manifest of a pack as it is now, and the results in it."""
    manifest = manifests.read(folder, ROOT, PARTS)
    return manifest, measured_in(manifest, folder, model)


def save(source: Source, found: Iterable[Measured], notify: Notify) -> Path:
    """Adds results to a source's pack, for a checkpoint the one in the cache, made without weights where there is none;
    its folder. A result of the same slice, precision, text and context is replaced.

    Raises NotPermitted or CannotCreate for a pack that cannot be written to or holds as many as it may, ReadFailed
    (full disk), BadCheckpoint for a damaged pack, or results that no pack could hold.
    """
    if isinstance(source, Pack):
        folder = source.folder
    else:
        with packs.pack_closed(packs.ensure(source, (), notify=notify)) as pack:
            folder = pack.folder
    # What would be refused when the pack is opened must not get into it.
    checked = parse(plain(found), folder / manifests.NAME, source.model)
    with alone(folder, notify):
        manifest, old = read(folder, source.model)
        results = merge(old, checked)
        if len(results) > MOST:
            raise CannotCreate(f"{len(results)} results", file=folder / manifests.NAME, expected=f"at most {MOST}")
        manifest = {**manifest, MEASURED: plain(results)}
        manifests.rewrite(folder, manifest)
    if isinstance(source, Pack):
        source.manifest, source.measured = manifest, results
    return folder


@contextmanager
def alone(folder: Path, notify: Notify) -> Iterator[None]:
    """Alone with a pack: by its lock in the cache; by one inside it, gone at the end, where nothing beside it is ours.

    Raises NotPermitted, CannotCreate, ReadFailed.
    """
    folder = folder.resolve()
    if folder.parent == packs.packs_folder().resolve():
        with packs.locked(folder, notify):
            packs.sweep(folder)
            yield
        return
    inside = folder / manifests.NAME
    try:
        with packs.locked(inside, notify):
            try:
                yield
            finally:
                with suppress(OSError):  # while it is ours: whoever waits for it sees that, and takes the next
                    os.unlink(packs.lock_path(inside))
    except (NotPermitted, CannotCreate) as error:
        hint = "Results are kept in the pack: copy it to a folder of your own"
        raise type(error)(error.found, file=folder, expected=error.expected, hint=hint) from None


__all__ = ["Measured", "measured", "save"]
