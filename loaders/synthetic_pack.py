"""Packs of random weights, written as they lie: no checkpoint is written first, and nothing is quantized.

Codes are random bits. Scales are chosen so that what they give has the deviation that random checkpoints have, and
differ a little from row to row. int8 codes are the odd ones, -127 to 127, and half of all int4 scales are negative, so
that the mean is zero; as in every pack, codes and scales beyond a matrix are zero. Where a byte lies in its tensor
decides which bits it gets: neither threads nor the size of a band change it. Each format is drawn on its own: what a
pack holds at int8 and at int4 are two models of one shape.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.errors import Usage
from loaders.formats import manifest as manifests
from loaders.formats.atomic import fresh_folder
from loaders.formats.pack import PLE, ROOT, WEIGHTS, Pack, contents, parts_for, stored_tensors
from loaders.formats.panels import BLOCK_BYTES, PANEL, ZERO, panel_count, panel_shape, panels
from loaders.formats.quant import BITS, BLOCK, SCALE_BYTES, Codes, Scales, record_bytes
from loaders.formats.safetensors_writer import Writer
from loaders.formats.sharded import Notify, Specs, sizes_of
from loaders.formats.synthetic import SLACK, THREADS, band, levels, made_ahead, read_model, spread, words
from loaders.layout import Filed, refuse_many
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, Shape, tensors
from loaders.packing import put, seal_folder
from loaders.published import config_path

# Bytes of a band, about; a multiple of 32, so that one of plain values begins with a whole word.
BAND = 1 << 20
WORD = 8  # bytes drawn at once
LEVELS = 1 << 16
# Scales differ by a quarter in either direction.
JITTER = 0.25
# The root of the mean square of the codes: odd ones from -127 to 127, and all from -8 to 7.
DEVIATIONS = {
    "int8": float(np.sqrt(np.mean(np.arange(-127.0, 128.0, 2) ** 2))),
    "int4": float(np.sqrt(np.mean(np.arange(-8.0, 8.0) ** 2))),
}


def write_random_pack(
    config: str | Path,
    folder: str | Path,
    precisions: tuple[str, ...] = tuple(BITS),
    *,
    ple: str = "int8",
    seed: int = 0,
    notify: Notify = lambda *_: None,
) -> int:
    """Writes a pack with the shapes of a config.json, of the one in a folder, or of a published one by its name;
    returns its tensors' bytes.

    ``precisions``: the cores it holds, int8 or int4 or both. ``ple``: the format of per-layer embeddings. It has no
    tokenizer. The same arguments give the same bytes. ``folder`` appears whole or not at all.

    Raises MissingFile, BadCheckpoint, Unsupported (the config), Usage (the arguments), CannotCreate (``folder`` exists,
    or its parent does not), NotPermitted, ReadFailed (disk full).
    """
    held = tuple(kind for kind in BITS if kind in precisions)
    if not held or set(precisions) - set(BITS):
        raise Usage(", ".join(precisions) or "none", field="precisions", expected="int8, int4 or both")
    if ple not in BITS or seed < 0:
        raise Usage(f"ple {ple}, seed {seed}", expected="int8 or int4, and a seed that is not negative")
    path = config_path(os.fspath(config))
    raw, _, model = read_model(path)
    refuse_many(tensors(model), path)
    mark = fingerprint(raw, held, ple, seed)
    parts = {part: stored_tensors(model, part, ple) for part in parts_for(model, held)}
    needed = sum(part_bytes(specs) for specs in parts.values())
    with fresh_folder(folder, needed + SLACK) as temporary, ThreadPoolExecutor(THREADS) as pool:
        put(temporary / "config.json", json.dumps(raw, indent=2).encode())
        source = {"name": named(path), "synthetic": True, "seed": seed}
        seal_folder(temporary, ["config.json"], ROOT, mark, source=source)
        filler = Filler(model, ple, seed, mark, pool, Counter(notify, needed))
        largest = sorted(parts, key=lambda part: -part_bytes(parts[part]))
        at_once([partial(filler.part, part, parts[part], temporary / part) for part in largest], filler.counter.stop)
    return needed


def is_random(pack: Pack) -> bool:
    """Whether a pack says that its weights are random."""
    source = pack.manifest.get("source")
    return isinstance(source, dict) and source.get("synthetic") is True


def part_bytes(specs: Specs) -> int:
    """Bytes of a part's tensors."""
    return sum(sizes_of(specs).values())


def at_once(jobs: Iterable[Callable[[], None]], stop: Callable[[], None]) -> None:
    """Runs jobs two at a time: while one waits for the disk, or reads back what it wrote, another goes on. ``stop``
    ends those that are running when one fails, or when this is interrupted. Raises what the first to fail raised.
    """
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop()
            pool.shutdown(wait=False, cancel_futures=True)
    errors = [job.exception() for job in running if not job.cancelled()]
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, Stopped)):
        raise error


def fingerprint(raw: dict[str, Any], precisions: tuple[str, ...], ple: str, seed: int) -> str:
    """What identifies a random pack: everything that decides its bytes, and the version of packs."""
    decides = [manifests.VERSION, "synthetic", raw, precisions, ple, seed]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def named(config: Path) -> str:
    """What a config is called: its own name, or that of its folder."""
    config = config.absolute()
    return config.parent.name if config.name == "config.json" else config.name.removesuffix(".json")


class Stopped(Exception):
    """Another part failed."""


class Counter:
    """Bytes written by all parts, which are written in several threads; said one at a time."""

    def __init__(self, notify: Notify, total: int) -> None:
        self.notify, self.total, self.done = notify, total, 0
        self.lock, self.stopped = Lock(), False

    def add(self, size: int) -> None:
        """Counts a piece. Raises Stopped, and what ``notify`` raises."""
        with self.lock:
            if self.stopped:
                raise Stopped
            self.done += size
            try:
                self.notify("writing", self.done, self.total)
            except BaseException:
                self.stopped = True
                raise

    def stop(self) -> None:
        """Lets every part end with its next piece."""
        self.stopped = True


@dataclass
class Filler:
    """How the parts of one pack are drawn."""

    model: Model
    ple: str
    seed: int
    mark: str
    pool: ThreadPoolExecutor
    counter: Counter

    def part(self, part: str, specs: Specs, folder: Path) -> None:
        """One part: its folder, weights and manifest."""
        folder.mkdir()
        formats, shapes = contents(self.model, part), tensors(self.model)
        first = {name for name, stored in formats.items() if stored in BITS}
        with Writer(folder / WEIGHTS, specs, first=first) as writer:
            for name, stored in formats.items():
                jobs = self.table(name) if name == PLE_TABLE else self.jobs(name, stored, shapes[name])
                writer.write(name, self.counted(made_ahead(self.pool, jobs)))
        seal_folder(folder, [WEIGHTS], part, self.mark, **({"ple": self.ple} if part == PLE else {}))

    def counted(self, pieces: Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
        """The pieces, each counted when it has been written."""
        for piece in pieces:
            yield piece
            self.counter.add(piece.nbytes)

    def jobs(self, name: str, stored: str, shape: Shape) -> Iterator[Callable[[], npt.NDArray[Any]]]:
        """What makes a tensor, band by band."""
        key, about = f"{name} {stored}", spread(self.model, Filed(shape, name, 0.0), shape)
        if stored not in BITS:
            values, step = levels(*about, stored), BAND // WORD
            total = math.prod(shape)
            for start in range(0, total, step):
                yield partial(band, self.seed, key, start, min(step, total - start), values)
            return
        count, width = panel_shape(shape, stored)
        step = max(1, BAND // width)
        scales, edges = scale_levels(stored, about[1]), Edges.of(shape, stored)
        for start in range(0, count, step):
            yield partial(panel_band, self.seed, key, start, min(step, count - start), width, scales, edges)

    def table(self, name: str) -> Iterator[Callable[[], Codes]]:
        """What makes the per-layer-embedding table, band by band."""
        ple = self.model.ple
        assert ple is not None
        scales = scale_levels(self.ple, spread(self.model, Filed((ple.rows,), name, 0.0), (ple.rows, ple.dim))[1])
        size, layers, key = record_bytes(ple.dim, self.ple), len(self.model.layers), f"{name} {self.ple}"
        # Bands of a multiple of WORD rows begin with a whole word.
        step = max(1, BAND // (size * layers * WORD)) * WORD
        for start in range(0, ple.rows, step):
            shape = (min(step, ple.rows - start), layers, size)
            yield partial(record_band, self.seed, key, start, shape, self.ple, scales)


@lru_cache(maxsize=64)
def scale_levels(kind: str, deviation: float) -> Scales:
    """The scales a block can have, float16 [65536]: with random codes, values have mean 0 and this deviation."""
    steps = (np.arange(LEVELS) + 0.5) / LEVELS
    if kind == "int4":
        steps = np.concatenate([steps[::2], steps[::2]])
    factors = 1 + JITTER * (2 * steps - 1)
    scales = factors * deviation / (DEVIATIONS[kind] * np.sqrt(np.mean(factors**2)))
    if kind == "int4":
        scales[LEVELS // 2 :] *= -1
    halves: Scales = scales.astype(np.float16)
    return halves


@dataclass(frozen=True)
class Edges:
    """What lies beyond a matrix of ``kind``: bits that stay in the last block of columns and in the last panel of each
    matrix of ``panels`` ones, uint8 [B], None where these are whole; and what all others are.
    """

    kind: str
    panels: int
    columns: Codes | None
    rows: Codes | None
    zero: Codes

    @classmethod
    def of(cls, shape: Shape, kind: str) -> Edges:
        """Those of a matrix [rows, cols] or of a stack [n, rows, cols]."""
        *_, rows, cols = shape
        width = BLOCK * BITS[kind] // 8
        nothing = np.full((PANEL, width), ZERO[kind], np.uint8)
        zero = panels(nothing, np.zeros((PANEL, 1), np.float16), kind)[0]
        columns = kept(PANEL, cols % BLOCK, kind) if cols % BLOCK else None
        return cls(kind, panel_count(rows), columns, kept(rows % PANEL, BLOCK, kind) if rows % PANEL else None, zero)

    def clear(self, found: Codes, start: int) -> None:
        """In place: panels uint8 [n, nb, B] from number ``start`` of a stack on."""
        if self.columns is not None:
            found[:, -1] = (found[:, -1] & self.columns) | (self.zero & ~self.columns)
        if self.rows is not None:
            last = found[-(start + 1) % self.panels :: self.panels]
            last[...] = (last & self.rows) | (self.zero & ~self.rows)


def kept(rows: int, cols: int, kind: str) -> Codes:
    """Ones in the bits of the first ``rows`` and ``cols`` of a block of a panel, scales included: uint8 [B]."""
    inside = np.zeros((PANEL, BLOCK), np.uint8)
    inside[:rows, :cols] = 0xFF
    half = BLOCK // 2
    low, high = inside[:, :half] & np.uint8(0x0F), inside[:, half:] & np.uint8(0xF0)
    # The scale is that of all columns.
    scales = np.repeat(inside[:, :1], SCALE_BYTES, axis=1).view(np.float16)
    found: Codes = panels(inside if kind == "int8" else low | high, scales, kind)[0]
    return found


def panel_band(seed: int, key: str, start: int, count: int, width: int, scales: Scales, edges: Edges) -> Codes:
    """Panels ``start`` to ``start + count`` of a matrix or a stack, uint8 [count, width]."""
    drawn = words(seed, key, start * width // WORD, count * width // WORD)
    found, head = drawn.view(np.uint8).reshape(count, -1, BLOCK_BYTES[edges.kind]), PANEL * SCALE_BYTES
    halves = drawn.view(np.uint16).reshape(*found.shape[:2], -1)[..., :PANEL]
    halves[...] = np.take(scales.view(np.uint16), halves, mode="wrap")
    if edges.kind == "int8":
        found[..., head:] |= 1
    edges.clear(found, start)
    return found.reshape(count, width)


def record_band(seed: int, key: str, start: int, shape: tuple[int, int, int], kind: str, scales: Scales) -> Codes:
    """Records of rows from ``start`` on, a multiple of WORD, of ``shape`` [rows, layers, size]: uint8 [rows, -1]."""
    total, row = math.prod(shape), shape[1] * shape[2]
    drawn = words(seed, key, start // WORD * row, -(-total // WORD))
    found = drawn.view(np.uint8)[:total].reshape(shape)
    halves = np.ascontiguousarray(found[..., :SCALE_BYTES]).view(np.uint16)
    found[..., :SCALE_BYTES] = np.take(scales.view(np.uint16), halves, mode="wrap").view(np.uint8)
    if kind == "int8":
        found[..., SCALE_BYTES:] |= 1
    return found.reshape(len(found), -1)
