"""A Hugging Face checkpoint folder, validated: config to spec, tensors to canonical names, nothing left over.

Opening reads headers only. A weight is read later, window by window, straight into the caller's buffer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import BadCheckpoint, MissingFile, Unsupported
from loaders.families import Family, family_of
from loaders.formats.config import Config, read_json
from loaders.formats.placed import FP8, FP8_BLOCK, RAW, Piece, Placed
from loaders.formats.safetensors import Shards, Tensor
from loaders.formats.window import Window
from loaders.layout import file_name, place_of, refuse_many, spots
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, tensors

FLOATS = ("BF16", "F16", "F32")
SCALE = "_scale_inv"
HEAD_ROWS = 64


@dataclass
class Checkpoint:
    """``where`` maps canonical names to tensors in the shards; ``skipped_bytes`` belong to vision and audio."""

    folder: Path
    raw_config: dict[str, Any]
    family: Family
    model: Model
    shards: Shards
    where: dict[str, Placed]
    ignored: tuple[str, ...]
    skipped_bytes: int

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Reads and checks config.json and every shard's header.

        Raises MissingFile, BadCheckpoint or Unsupported, naming the file and the key or tensor.
        """
        folder = Path(folder)
        path = folder / "config.json"
        if not os.path.isdir(folder):  # which, unlike Path.is_dir, takes a name too long as absent
            raise MissingFile("no such folder", file=folder, expected="a checkpoint folder with config.json")
        raw = read_json(path)
        config = Config(raw, str(path))
        family = family_of(config.raw("model_type"), str(path))
        model = family.parse(config)
        config.finish()
        shards = Shards.open(folder)
        where, ignored, skipped = match(family, model, shards, path)
        checkpoint = cls(folder, raw, family, model, shards, where, ignored, skipped)
        if model.tied:
            checkpoint.refuse_other_head()
        return checkpoint

    @property
    def dtype(self) -> str:
        """The storage type that most of the weights have."""
        sizes: dict[str, int] = {}
        for tensor in self.where.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=sizes.__getitem__)

    @property
    def stored(self) -> dict[str, int]:
        """Canonical name -> bytes in the files."""
        return {name: tensor.nbytes for name, tensor in self.where.items()}

    def read_raw(self, name: str, window: Window | None = None) -> np.ndarray:
        """The stored bits of a window of a tensor, as unsigned integers of the window's shape."""
        placed = self.where[name]
        assert placed.exact is not None, f"{name} has no bits of its own: reading computes it"
        window = window or placed.window
        out = np.empty(window.shape, RAW[placed.dtype])
        placed.read(self.shards, window, out)
        return out

    def refuse_other_head(self) -> None:
        """A tied model may carry a copy of its embedding as head; a different one would be ignored in silence."""
        name = next((n for n in self.ignored if n.endswith("lm_head.weight")), None)
        if name is None:
            return
        head, embed = self.shards.tensors[name], self.where["embed"]
        same = head.shape == embed.shape and head.dtype == embed.dtype and embed.plain is not None
        if same:
            last = head.shape[0] - 1
            rows = sorted({i * last // (HEAD_ROWS - 1) for i in range(HEAD_ROWS)})
            sample = Window.of(((i, i + 1) for i in rows), ((0, head.shape[1]),))
            a, b = (np.empty(sample.shape, RAW[head.dtype]) for _ in range(2))
            self.shards.read_window(head, sample, a)
            embed.read(self.shards, sample, b)
            same = bool(np.array_equal(a, b))
        if not same:
            raise BadCheckpoint(
                "differs from the token embedding", file=head.shard, field=name, expected="a copy: the config ties them"
            )

    def close(self) -> None:
        """Closes the shards' descriptors."""
        self.shards.close()


def prefix_of(names: Iterable[str], embed: str, file: str | Path) -> str:
    """What stands before every text tensor, found by the token embedding: uploads differ in it.

    A module that predicts a further token may hold a copy of the embedding; it is a layer.
    """
    found = [name.removesuffix(embed) for name in names if name == embed or name.endswith("." + embed)]
    found = [prefix for prefix in found if "layers." not in prefix]
    if len(found) != 1:
        raise BadCheckpoint(
            "no token embedding" if not found else f"{len(found)} token embeddings",
            file=file,
            field=embed,
            expected="exactly one tensor of that name, under any prefix",
        )
    return found[0]


def match(family: Family, model: Model, shards: Shards, config: Path) -> tuple[dict[str, Placed], tuple[str, ...], int]:
    """Every tensor of the spec found once, with its shape; every other tensor explained, or refused by name."""
    prefix = prefix_of(shards.tensors, file_name(family.names, "embed"), shards.folder)
    table = tensors(model)
    refuse_many(table, config)
    where = {name: place(family, table, name, shards, prefix, config, model) for name in table}
    used = {p.tensor.name for placed in where.values() for p in placed.pieces}
    used |= {p.scale.name for placed in where.values() for p in placed.pieces if p.scale is not None}
    rest = [name for name in shards.tensors if name not in used]
    skipped = {name for name in rest if any(fnmatchcase(name, p) for p in family.text_only)}
    ignored = tuple(name for name in rest if name not in skipped and explained(family, model, name))
    left = sorted(set(rest) - skipped - set(ignored))
    if left:
        more = f" and {len(left) - 10} more" if len(left) > 10 else ""
        raise BadCheckpoint(
            "tensors that the config has no place for: " + ", ".join(left[:10]) + more,
            file=shards.folder,
            expected=f"those of {len(model.layers)} layers",
            hint="A config that says less than the file holds would run, slightly wrong",
        )
    return where, ignored, sum(shards.tensors[name].nbytes for name in skipped)


def place(
    family: Family,
    table: dict[str, tuple[int, ...]],
    canonical: str,
    shards: Shards,
    prefix: str,
    config: Path,
    model: Model,
) -> Placed:
    """The pieces of one tensor. Raises BadCheckpoint for one that is missing or has another shape."""
    pieces = []
    for spot in spots(family.names, table, canonical):
        name = find(shards, prefix, spot.name)
        if name is None:
            raise BadCheckpoint(
                "no such tensor",
                file=shards.folder,
                field=prefix + spot.name,
                expected=describe(config, model, canonical, spot.shape),
            )
        tensor = shards.tensors[name]
        # Rows of the per-layer embeddings are gathered as they are stored: there is no place for scales.
        scaled = tensor.dtype == FP8 and canonical != PLE_TABLE
        scale = scale_of(shards, tensor) if scaled else None
        pieces.append(Piece(check(tensor, spot.shape, scale), spot.block, scale))
    return Placed(table[canonical], tuple(pieces), place_of(family.names, canonical)[0].offset)


def scale_of(shards: Shards, tensor: Tensor) -> Tensor | None:
    """The scales of an fp8 tensor; BadCheckpoint where others have theirs, None where none has any."""
    found = shards.tensors.get(tensor.name + SCALE)
    if found is None and any(name.endswith(SCALE) for name in shards.tensors):
        raise BadCheckpoint("no such tensor", file=tensor.shard, field=tensor.name + SCALE, expected="scales in F32")
    return found


def find(shards: Shards, prefix: str, name: str) -> str | None:
    """The full name of a tensor; a head may stand outside the prefix."""
    for candidate in (prefix + name, name, prefix.removesuffix("model.") + name):
        if candidate in shards.tensors:
            return candidate
    return None


def explained(family: Family, model: Model, name: str) -> bool:
    """Whether a tensor that was not asked for is one this family is known to carry in vain."""
    if model.tied and name.endswith("lm_head.weight"):
        return True
    past = range(len(model.layers), len(model.layers) + model.lookahead)
    if any(fnmatchcase(name, p.format(past=i)) for p in family.ignore if "{past}" in p for i in past):
        return True
    if any(fnmatchcase(name, p) for p in family.ignore):
        number = name.partition("layers.")[2].partition(".")[0]
        return not number.isdecimal() or int(number) < len(model.layers)
    return False


def check(tensor: Tensor, shape: tuple[int, ...], scale: Tensor | None = None) -> Tensor:
    """Shape and type as the spec wants them, and an fp8 tensor's scales as the tensor wants them."""
    if tensor.shape != shape:
        raise BadCheckpoint(
            f"shape {list(tensor.shape)}",
            file=tensor.shard,
            field=tensor.name,
            expected=f"{list(shape)} by config.json",
        )
    if scale is not None:
        wanted = tuple(-(-n // FP8_BLOCK) for n in shape)
        if len(shape) != 2 or scale.shape != wanted or scale.dtype != "F32":
            found = f"{scale.dtype} of shape {list(scale.shape)}"
            raise BadCheckpoint(found, file=scale.shard, field=scale.name, expected=f"F32 of shape {list(wanted)}")
    elif tensor.dtype not in FLOATS:
        kind = Unsupported if tensor.dtype.startswith("F") else BadCheckpoint
        raise kind(tensor.dtype, file=tensor.shard, field=tensor.name, expected="one of " + ", ".join(FLOATS))
    return tensor


def describe(config: Path, model: Model, canonical: str, shape: tuple[int, ...]) -> str:
    """What a missing tensor should have been, and which number asked for it."""
    layers = f"; {config.name} says num_hidden_layers={len(model.layers)}" if canonical.startswith("layers.") else ""
    return f"shape {list(shape)}, {math.prod(shape):,} values{layers}"
