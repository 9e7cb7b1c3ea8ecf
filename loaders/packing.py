"""Makes packs: quantizes a checkpoint tensor by tensor, band by band, into folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, ReadFailed, Unsupported
from loaders.formats import manifest as manifests
from loaders.formats.atomic import fresh_folder
from loaders.formats.buffers import from_float32
from loaders.formats.config import read_bytes
from loaders.formats.measured import load, plain
from loaders.formats.pack import MEASURED, PLE, ROOT, VOCAB, WEIGHTS, contents, parts_for, stored_tensors
from loaders.formats.panels import PANEL, whole_panels
from loaders.formats.quant import BITS, quantize, quantize_rows
from loaders.formats.safetensors_writer import Writer
from loaders.formats.sharded import Notify, sizes_of
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, tensors
from loaders.ordered import THREADS, blaming, ordered
from loaders.rewrite import COMPANIONS
from loaders.text.compact import CompactTokenizer
from loaders.text.vocab import compile_vocab

# Values of a band, at most and at least: as read, as float32 and as codes, a few of them are in memory at once.
BANDS = (1 << 20, 1 << 16)
BAND_COST = 12
# Quantizing works in strips of its own, one in each thread. Rows that do not fill a panel wait, a few bytes a value.
STRIPS = 8 << 20
WAITING = 4
# Column weights of a tensor, float32 [cols], or None: where measured activations enter.
Importance = Callable[[str], npt.NDArray[np.float32] | None]


def unweighted(name: str) -> None:
    """Every column counts the same."""


def fingerprint(checkpoint: Checkpoint) -> str:
    """What identifies a checkpoint as it lies on disk: its config and text files, every header, and each shard's size
    and times of change. An edit of the same length with the modification time put back still moves the change time.
    Also the version of packs: those that another version made are not in the way.
    """
    found = hashlib.sha256(json.dumps([manifests.VERSION, checkpoint.raw_config], sort_keys=True).encode())
    for name in sorted(COMPANIONS):
        path = checkpoint.folder / name
        if path.exists():
            found.update(f"{name}\n".encode() + hashlib.sha256(read_bytes(path, COMPANIONS[name])).digest())
    for path_text in sorted({tensor.shard for tensor in checkpoint.shards.tensors.values()}):
        try:
            s = os.stat(path_text)
        except OSError as e:
            raise ReadFailed(f"changed since it was opened: {e.strerror}", file=path_text) from None
        found.update(f"{os.path.basename(path_text)} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}\n".encode())
    for name, t in sorted(checkpoint.shards.tensors.items()):
        found.update(f"{name} {t.dtype} {t.shape} {os.path.basename(t.shard)} {t.offset}\n".encode())
    return found.hexdigest()


def part_bytes(checkpoint: Checkpoint, part: str, ple: str = "int8") -> int:
    """Bytes of a part's file, its header aside."""
    return sum(sizes_of(stored_tensors(checkpoint.model, part, ple)).values())


def packing_bytes(checkpoint: Checkpoint, band: int = BANDS[1]) -> int:
    """What packing in bands of so many values holds in memory at most, beyond what the process held before."""
    table = tensors(checkpoint.model)
    widest = max(shape[-1] for shape in table.values() if len(shape) > 1)
    waiting = PANEL * widest * WAITING
    # What lies the other way round is read whole; while bands of one are converted the next is being read.
    turned = 2 * max(placed.plane_bytes for placed in checkpoint.where.values())
    return (THREADS + 1) * max(band, widest) * BAND_COST + waiting + turned + STRIPS


def band_for(checkpoint: Checkpoint, room: int | None) -> int:
    """The largest band with which packing stays within ``room`` bytes; the smallest there is, where none does."""
    band, least = BANDS
    while room is not None and band > least and packing_bytes(checkpoint, band) > room:
        band //= 2
    return band


def write_pack(
    checkpoint: Checkpoint,
    output: Path,
    precisions: tuple[str, ...] = tuple(BITS),
    *,
    ple: str = "int8",
    importance: Importance = unweighted,
    room: int | None = None,
    notify: Notify = lambda *_: None,
) -> int:
    """A whole pack in a folder of its own; bytes written. Raises what :func:`write_part` raises."""
    wanted = parts_for(checkpoint.model, precisions)
    needed = sum(part_bytes(checkpoint, part, ple) for part in wanted)
    mark = fingerprint(checkpoint)
    with fresh_folder(output, needed) as folder:
        fill_root(checkpoint, folder, mark)
        done = 0
        for part in wanted:
            (folder / part).mkdir()
            Packer(checkpoint, band_for(checkpoint, room), ple, importance).fill(
                part, folder / part, mark, shifted(notify, done, needed)
            )
            done += part_bytes(checkpoint, part, ple)
    return needed


def shifted(notify: Notify, before: int, total: int) -> Notify:
    """Progress of one part as progress of the whole."""
    return lambda what, done, _: notify(what, before + done, total)


def write_root(checkpoint: Checkpoint, output: Path, mark: str) -> None:
    """The folder of a pack without any part: config, tokenizer and defaults."""
    with fresh_folder(output) as folder:
        fill_root(checkpoint, folder, mark)


def write_part(
    checkpoint: Checkpoint,
    part: str,
    output: Path,
    mark: str,
    *,
    ple: str = "int8",
    importance: Importance = unweighted,
    room: int | None = None,
    notify: Notify = lambda *_: None,
) -> None:
    """One part, streamed within ``room`` bytes of memory.

    Raises BadCheckpoint (weights that are not finite), CannotCreate, ReadFailed (full disk).
    """
    with fresh_folder(output, part_bytes(checkpoint, part, ple)) as folder:
        Packer(checkpoint, band_for(checkpoint, room), ple, importance).fill(part, folder, mark, notify)


def fill_root(checkpoint: Checkpoint, folder: Path, mark: str) -> None:
    """Config, tokenizer, its compiled form, defaults, and the manifest, with what the checkpoint's folder says was
    measured: that is no part of its fingerprint, and may be added to.
    """
    names = ["config.json"]
    put(folder / "config.json", json.dumps(checkpoint.raw_config, indent=2).encode())
    for name, limit in COMPANIONS.items():
        if (checkpoint.folder / name).exists():
            put(folder / name, read_bytes(checkpoint.folder / name, limit))
            names.append(name)
    if compiled_vocab(checkpoint.folder, folder / VOCAB):
        check_vocab(CompactTokenizer.open(folder / VOCAB).vocab_size, checkpoint.model, checkpoint.folder)
        names.append(VOCAB)
    source = {"name": checkpoint.folder.absolute().name, "path": str(checkpoint.folder.absolute())}
    results = plain(load(checkpoint.folder, checkpoint.model))
    seal_folder(folder, names, ROOT, mark, source=source, **({MEASURED: results} if results else {}))


def compiled_vocab(source: Path, output: Path) -> bool:
    """Writes the mapped form of a tokenizer; False where there is none, or none that edge's own encoder covers."""
    path = source / "tokenizer.json"
    if not path.exists():
        return False
    try:
        put(output, compile_vocab(read_bytes(path, COMPANIONS["tokenizer.json"]), str(path)))
    except Unsupported:
        return False
    return True


def check_vocab(size: int, model: Model, folder: Path) -> None:
    """A tokenizer's ids must have rows in the token embedding. Raises BadCheckpoint."""
    if size > model.vocab:
        raise BadCheckpoint(
            f"{size} tokens",
            file=folder / "tokenizer.json",
            expected=f"at most vocab_size={model.vocab}, the rows of the token embedding",
        )


@dataclass
class Packer:
    """How one checkpoint is packed: values a band, the table's format, and what each column counts."""

    checkpoint: Checkpoint
    band: int
    ple: str
    importance: Importance

    def fill(self, part: str, folder: Path, mark: str, notify: Notify) -> None:
        """A part's weights, quantized band by band, and its manifest."""
        specs = stored_tensors(self.checkpoint.model, part, self.ple)
        total, done = sum(sizes_of(specs).values()), 0

        def counted(pieces: Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
            nonlocal done
            for piece in pieces:
                yield piece
                done += piece.nbytes
                notify("packing", done, total)

        formats = contents(self.checkpoint.model, part)
        first = {name for name, stored in formats.items() if stored in BITS}
        with ThreadPoolExecutor(THREADS) as pool, Writer(folder / WEIGHTS, specs, first=first) as writer:
            for name, stored in formats.items():
                if name == PLE_TABLE:
                    pieces = self.ordered(name, self.records, pool)
                elif stored in BITS:
                    pieces = self.panels(name, stored, pool)
                else:
                    pieces = self.ordered(name, partial(from_float32, dtype=stored), pool)
                writer.write(name, counted(pieces))
        seal_folder(folder, [WEIGHTS], part, mark, **({"ple": self.ple} if part == PLE else {}))

    def panels(self, name: str, kind: str, pool: ThreadPoolExecutor) -> Iterator[npt.NDArray[np.uint8]]:
        """A quantized matrix, or every matrix of a stack, as its panels in order."""
        weights = self.importance(name)
        bands = self.ordered(name, lambda x: quantize(x, kind, weights), pool)
        return whole_panels(bands, self.checkpoint.where[name].shape[-2], kind)

    def records(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Rows of the per-layer-embedding table as records."""
        model = self.checkpoint.model
        assert model.ple is not None
        return quantize_rows(x.reshape(-1, len(model.layers), model.ple.dim), self.ple)

    def ordered(
        self, name: str, convert: Callable[[npt.NDArray[np.float32]], Any], pool: ThreadPoolExecutor
    ) -> Iterator[Any]:
        """``convert`` of every band of a tensor as float32, in order, a few of them under way at once."""
        placed = self.checkpoint.where[name]
        rows = max(1, self.band // (placed.shape[-1] if len(placed.shape) > 1 else 1))
        rows -= rows % PANEL if rows > PANEL else 0
        bands = placed.steps(self.checkpoint.shards, rows)
        yield from ordered(pool, (partial(blaming, placed, partial(after, convert, values)) for values in bands))


def after(convert: Callable[[npt.NDArray[np.float32]], Any], values: Callable[[], npt.NDArray[np.float32]]) -> Any:
    """One band: read, widened, converted."""
    return convert(values())


def seal_folder(folder: Path, names: Iterable[str], part: str, mark: str, **facts: Any) -> None:
    """The manifest, last: from here on the folder is a part."""
    put(folder / manifests.NAME, manifests.describe(folder, names, part=part, fingerprint=mark, **facts))


def put(path: Path, data: bytes) -> None:
    """One small file."""
    with open(path, "xb") as file:
        file.write(data)
