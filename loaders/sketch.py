"""A checkpoint that is only a config: its shapes, and no bytes. Enough to plan and to look at before a download."""

from __future__ import annotations

import math
import os
from pathlib import Path

from loaders.checkpoint import Checkpoint
from loaders.formats.pack import Pack
from loaders.formats.placed import Block, Piece, Placed
from loaders.formats.safetensors import ITEMSIZE, Shards, Tensor
from loaders.formats.synthetic import read_model
from loaders.layout import file_name
from loaders.network.tensors import Shape, flat, tensors


def sketch(config: Path, dtype: str = "BF16") -> Checkpoint:
    """A config.json, or that of a folder, as a checkpoint in ``dtype`` whose tensors cannot be read.

    Each canonical tensor lies in one piece, whatever a file would do: a mixture has tens of thousands of matrices.
    Raises what reading the config raises: MissingFile, BadCheckpoint, Unsupported.
    """
    raw, family, model = read_model(config)
    where, at = {}, 0
    for name, shape in tensors(model).items():
        size = math.prod(shape) * ITEMSIZE[dtype]
        tensor = Tensor(file_name(family.names, name), dtype, flat(shape), str(config), at, size)
        where[name] = Placed(shape, (Piece(tensor, whole(flat(shape))),))
        at += size
    folder = config if os.path.isdir(config) else config.parent
    return Checkpoint(folder, raw, family, model, Shards(str(config), {}, {}), where, (), 0)


def whole(shape: Shape) -> Block:
    """All of a vector or a matrix."""
    return Block(0, (0, shape[0]), (0, shape[1]) if len(shape) > 1 else None)


def has_weights(source: Checkpoint | Pack) -> bool:
    """Whether there is anything to read behind the shapes."""
    return isinstance(source, Pack) or bool(source.shards.tensors)
