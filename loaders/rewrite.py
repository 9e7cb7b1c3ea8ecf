"""Writes a slice as a checkpoint folder of its own, streaming: one band of rows in memory at a time.

The folder appears whole or not at all: everything goes into a temporary sibling that is renamed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loaders.checkpoint import RAW, Checkpoint, bands, file_name
from loaders.errors import CannotCreate, NotPermitted, ReadFailed, Unsupported
from loaders.formats.config import read_bytes
from loaders.formats.safetensors_writer import Writer
from loaders.network.matformer import Part, Slice, parts

SHARD_BYTES = 4 * 10**9
BAND_BYTES = 8 << 20
PREFIX = "model."
HEAD = "lm_head.weight"
# What goes along unchanged, and the most each may hold.
COMPANIONS = {
    "tokenizer.json": 256 << 20,
    "tokenizer.model": 64 << 20,
    "tokenizer_config.json": 64 << 20,
    "special_tokens_map.json": 8 << 20,
    "generation_config.json": 8 << 20,
    "chat_template.jinja": 1 << 20,
}

Notify = Callable[[str, int, int], None]


def write_slice(checkpoint: Checkpoint, part: Slice, output: Path, notify: Notify = lambda *_: None) -> int:
    """Writes config, weights, tokenizer and defaults of a slice into a new folder; returns the bytes of its weights.

    Raises Unsupported for a family whose config cannot be cut, CannotCreate when ``output`` exists or its parent
    cannot be written, ReadFailed when the disk is full. The source is only read.
    """
    family = checkpoint.family
    if family.sliced_config is None:
        raise Unsupported(f"{family.title} has no slices", field="--slice")
    config = family.sliced_config(checkpoint.raw_config, checkpoint.model, part)
    wanted = parts(checkpoint.model, part)
    names = {canonical: file_name(family, canonical) for canonical in wanted}
    sizes = {c: p.window.count * checkpoint.where[p.name].itemsize for c, p in wanted.items()}
    total = sum(sizes.values())
    with new_folder(output, total) as folder:
        weight_map: dict[str, str] = {}
        groups, done = shards(sizes), 0
        for number, group in enumerate(groups, 1):
            name = "model.safetensors"
            if len(groups) > 1:
                name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            full = {c: names[c] if names[c] == HEAD else PREFIX + names[c] for c in group}
            specs = {full[c]: (checkpoint.where[wanted[c].name].dtype, wanted[c].window.shape) for c in group}
            with Writer(folder / name, specs) as writer:
                for canonical in group:
                    writer.write(full[canonical], raw_bands(checkpoint, wanted[canonical]))
                    weight_map[full[canonical]] = name
                    done += sizes[canonical]
                    notify("writing", done, total)
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
        write(folder / "config.json", json.dumps(config, indent=2).encode())
        for name, limit in COMPANIONS.items():
            if (checkpoint.folder / name).exists():
                write(folder / name, read_bytes(checkpoint.folder / name, limit))
    return total


def shards(sizes: dict[str, int]) -> list[list[str]]:
    """Tensors in order, grouped into files of a size every tool handles."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if held and held + size > SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def raw_bands(checkpoint: Checkpoint, part: Part) -> Iterator[np.ndarray]:
    """A window's raw bytes, a few rows at a time."""
    tensor = checkpoint.where[part.name]
    row = part.window.count // part.window.shape[0] * tensor.itemsize
    for window in bands(part.window, max(1, BAND_BYTES // max(1, row))):
        out = np.empty(window.shape, RAW[tensor.dtype])
        checkpoint.shards.read_window(tensor, window, out)
        yield out


@contextmanager
def new_folder(output: Path, needed: int) -> Iterator[Path]:
    """A temporary sibling that becomes ``output`` when the block ends well, and disappears when it does not."""
    if os.path.lexists(output):
        raise CannotCreate("already there", file=output, expected="a folder that does not exist yet")
    parent = output.absolute().parent
    try:
        free = shutil.disk_usage(parent).free
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=parent))
    except PermissionError as e:
        raise NotPermitted(e.strerror, file=parent) from None
    except OSError as e:
        raise CannotCreate(e.strerror or type(e).__name__, file=parent, expected="a folder to write into") from None
    try:
        if needed > free:
            raise ReadFailed(f"disk full: {free} bytes free", file=parent, expected=f"{needed} bytes")
        yield folder
        os.chmod(folder, 0o755 & ~umask())
        os.rename(folder, output)
    except OSError as e:
        raise ReadFailed(e.strerror or type(e).__name__, file=output) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write(path: Path, data: bytes) -> None:
    """One small file, on disk when this returns."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
