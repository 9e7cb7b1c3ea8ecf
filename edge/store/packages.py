"""What can be run, opened: checkpoints, packs, and exported packages, whose every byte is looked at once."""

from __future__ import annotations

import os
from pathlib import Path

from edge.store.cache import recall, remember
from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, MissingFile, Unsupported
from loaders.formats.contract import EMBEDS
from loaders.formats.manifest import NAME, is_pack
from loaders.formats.pack import Pack
from loaders.formats.package import Package, is_package
from loaders.formats.sharded import Notify
from loaders.sketch import has_weights, sketch

FILE = "verified.json"
# What a checkpoint's weights, or their index, are called in the end.
WEIGHTS = (".safetensors", ".safetensors.index.json")
# What can be run.
Opened = Checkpoint | Pack | Package


def open_source(path: Path, *, shapes: bool = False) -> Opened:
    """A checkpoint folder, a pack or an exported package; with ``shapes`` a config.json will do, as a checkpoint
    without weights.

    Raises MissingFile, BadCheckpoint, Unsupported.
    """
    hint = "`edge plan` and `edge inspect` take its config.json alone"
    config = path.suffix == ".json" and os.path.isfile(path)
    if shapes and config:
        return sketch(path)
    if not os.path.isdir(path):  # which, unlike Path.is_dir, takes a name too long as absent
        expected = "a checkpoint folder with config.json, a pack or a package"
        raise MissingFile("no such folder", file=path, expected=expected, hint=hint if config else None)
    if is_pack(path):
        return Pack.open(path)
    if is_package(path):
        return Package.open(path)
    if is_unsigned(path):
        expected = "the manifest of an exported package"
        raise BadCheckpoint("no such file", file=path / NAME, expected=expected, hint="Export the model again")
    try:
        return Checkpoint.open(path)
    except MissingFile as error:
        if error.file != os.fspath(path):
            raise
        raise MissingFile(error.found, file=path, expected=error.expected, hint=hint) from None


def is_unsigned(path: Path) -> bool:
    """Whether a folder holds a graph and nothing that a checkpoint has: a package without its manifest."""
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return any(n.endswith(".onnx") for n in names) and not any(
        n.startswith("model") and n.endswith(WEIGHTS) for n in names
    )


def weighty(source: Opened) -> bool:
    """Whether there is anything to read behind the shapes."""
    return isinstance(source, Package) or has_weights(source)


def verify(package: Package, notify: Notify) -> None:
    """Reads every file and compares its sum, unless these very files were seen before: by size, times and inode.

    Raises BadCheckpoint, ReadFailed.
    """
    key, stamp = os.path.abspath(package.folder), package.stamp()
    if recall(FILE).get(key) == stamp:
        return
    package.verify(notify)
    if package.stamp() == stamp:
        remember(FILE, key, stamp)


def engine_for(source: Opened, engine: str) -> str:
    """What 'auto' comes to for a source. Raises Unsupported for an engine that cannot run it."""
    if isinstance(source, Package):
        if engine not in ("auto", "ort"):
            raise Unsupported(
                "an exported package", file=source.folder, field=f"--engine {engine}", expected="ort",
                hint="Run the checkpoint it was exported from",
            )  # fmt: skip
        if source.contract.input(EMBEDS) is not None:
            raise Unsupported(
                "a decoder that is given embeddings", file=source.graph, expected="one that looks them up",
                hint="Export the model with --layout edge",
            )  # fmt: skip
        return "ort"
    if engine == "ort":
        what = "a pack" if isinstance(source, Pack) else "a checkpoint"
        raise Unsupported(
            what, file=source.folder, field="--engine ort", expected="an exported package",
            hint="`edge export MODEL -o DIR` makes one",
        )  # fmt: skip
    return engine


__all__ = ["Opened", "engine_for", "open_source", "verify", "weighty"]
