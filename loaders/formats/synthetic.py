"""Random checkpoints at any config's true shapes, streamed to disk: memory is measured before anything is downloaded.

Every value is one of 65536 equally likely quantiles of a normal distribution, drawn with 16 random bits. That is
several times faster than sampling. Where a value lies in its tensor decides which bits it gets, so neither threads nor
the size of a band nor the shards change it.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.checkpoint import FLOATS
from loaders.errors import Usage
from loaders.families import Family, family_of
from loaders.formats.atomic import fresh_folder
from loaders.formats.buffers import from_float32
from loaders.formats.config import Config, read_json
from loaders.formats.sharded import Notify, by_count, by_size, sizes_of, stored_name, write_tensors
from loaders.layout import Filed, files, refuse_many
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, Shape, tensors

LEVELS = 1 << 16
LANES = 4  # values drawn from one raw word of the generator
BAND = 1 << 18  # values; a multiple of LANES. What is drawn and what is written then stay in the processor's cache
THREADS = min(4, os.cpu_count() or 1)
SLACK = 1 << 20  # bytes beside the tensors: headers, index, config

Raw = npt.NDArray[Any]


def write_random(
    config: str | Path,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str = "BF16",
    shard_bytes: int | None = None,
    shards: int | None = None,
    notify: Notify = lambda *_: None,
) -> int:
    """Writes a checkpoint with the shapes of a config.json, or of the one in a folder; returns its tensors' bytes.

    ``dtype``: BF16, F16 or F32. One file, unless ``shard_bytes`` (the most in each) or ``shards`` (how many) is given.
    The same seed and type give the same values. ``folder`` appears whole or not at all.

    Raises MissingFile, BadCheckpoint, Unsupported (the config), Usage (the arguments), CannotCreate (``folder`` exists,
    or its parent does not), NotPermitted, ReadFailed (disk full).
    """
    if dtype not in FLOATS:
        raise Usage(dtype, field="dtype", expected="one of " + ", ".join(FLOATS))
    if seed < 0 or (shard_bytes is not None and (shard_bytes < 1 or shards is not None)):
        raise Usage("a negative seed, shards of no bytes, or both size and number of shards")
    raw, family, model = read_model(Path(config))
    shapes = tensors(model)
    refuse_many(shapes, config)
    filed = {stored_name(name): found for name, found in files(family.names, model).items()}
    specs = {stored: (dtype, found.shape) for stored, found in filed.items()}
    sizes = sizes_of(specs)
    groups = by_count(sizes, shards or 1) if shard_bytes is None else by_size(sizes, shard_bytes)
    needed = sum(sizes.values()) + SLACK
    with fresh_folder(folder, needed) as temporary, ThreadPoolExecutor(THREADS) as pool:

        def values(stored: str) -> Iterator[Raw]:
            found = filed[stored]
            table = levels(*spread(model, found, shapes[found.canonical]), dtype)
            return stream(pool, seed, stored, math.prod(found.shape), table)

        written = write_tensors(temporary, specs, groups, values, notify)
        (temporary / "config.json").write_text(json.dumps(raw, indent=2))
    return written


def read_model(config: Path) -> tuple[dict[str, Any], Family, Model]:
    """A config.json, or that of a folder, every key of it read."""
    path = config / "config.json" if os.path.isdir(config) else config
    raw = read_json(path)
    parsed = Config(raw, str(path))
    family = family_of(parsed.raw("model_type"), str(path))
    model = family.parse(parsed)
    parsed.finish()
    return raw, family, model


def spread(model: Model, filed: Filed, shape: Shape) -> tuple[float, float]:
    """(mean, standard deviation) that keep what flows between layers near one."""
    name = filed.canonical
    if len(shape) == 1:
        return (0.0 if name.endswith("bias") else 1.0 - filed.offset), 0.1
    # A row of the table is the inputs of all layers side by side, and each is scaled by the root of its own width.
    width = model.ple.dim if name == PLE_TABLE and model.ple is not None else shape[-1]
    return 0.0, width**-0.5


@cache
def quantiles() -> npt.NDArray[np.float64]:
    """float64 [65536], ascending and symmetric around zero: the middles of equally likely steps of a normal."""
    normal = NormalDist()
    lower = np.array([normal.inv_cdf((i + 0.5) / LEVELS) for i in range(LEVELS // 2)])
    return np.concatenate([lower, -lower[::-1]])


@lru_cache(maxsize=16)
def levels(mean: float, deviation: float, dtype: str) -> Raw:
    """The values a tensor can have, [65536] in the form they are stored in."""
    return from_float32((mean + deviation * quantiles()).astype(np.float32), dtype)


def stream(pool: ThreadPoolExecutor, seed: int, name: str, count: int, table: Raw) -> Iterator[Raw]:
    """``count`` values in bands, in order; a few of them are made ahead while one is written."""
    starts = range(0, count, BAND)
    return made_ahead(pool, (partial(band, seed, name, start, min(BAND, count - start), table) for start in starts))


def made_ahead(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], Raw]]) -> Iterator[Raw]:
    """What every job makes, in order; more of it ahead than there are threads, which never wait for who writes."""
    ahead: deque[Future[Raw]] = deque()
    for job in jobs:
        ahead.append(pool.submit(job))
        if len(ahead) > 2 * THREADS:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def words(seed: int, name: str, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Random words ``start`` to ``start + count`` of a tensor."""
    bits = np.random.PCG64(seeded(seed, name))
    bits.advance(start)
    return bits.random_raw(count)


@lru_cache(maxsize=16)
def seeded(seed: int, name: str) -> np.random.SeedSequence:
    """Where the bits of a tensor begin: dear to make, and asked for by every band."""
    return np.random.SeedSequence(seed, spawn_key=tuple(name.encode()))


def band(seed: int, name: str, start: int, count: int, table: Raw) -> Raw:
    """Values ``start`` to ``start + count`` of a tensor; ``start`` is a multiple of LANES."""
    drawn = words(seed, name, start // LANES, -(-count // LANES)).view(np.uint16)[:count]
    out = np.empty(count, table.dtype)
    # No draw is out of range; in the default mode take() would nevertheless fill a copy of ``out`` first.
    return np.take(table, drawn, out=out, mode="wrap")
