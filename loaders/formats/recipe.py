"""Which format each tensor is kept in at a precision: the one table behind planning, packing and loading.

Formats are ``F32`` and ``BF16``, as they are, and the blocks ``int8`` and ``int4`` of :mod:`loaders.formats.quant`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loaders.formats.quant import BITS, BLOCK, quantized_bytes
from loaders.formats.safetensors import ITEMSIZE
from loaders.network.tensors import flat

PLAIN = {"float32": "F32", "bf16": "BF16"}
PRECISIONS = (*PLAIN, *BITS)
# Small and sensitive: they steer how streams are mixed or where tokens are sent, and weigh nothing.
STEERING = ("altup.router", "altup.predict", "altup.correct", "experts.router")
# Few bytes that every token passes through: int8 even where the core is int4.
CAREFUL = ("ple.gate", "ple.proj", "attn.k_b", "attn.v_b", "positions")
EMBEDDINGS = ("embed", "head")


@dataclass(frozen=True)
class Recipe:
    """How a run keeps its weights. ``head``: the format of the embedding and the head, at int4 the one choice left."""

    precision: str
    head: str

    @property
    def label(self) -> str:
        """For people: the precision, and the head's where it is less than usual."""
        return self.precision if self.head == usual_head(self.precision) else f"{self.precision}, head {self.head}"


def usual_head(precision: str) -> str:
    """A tied head decides every token: it stays at int8 unless the budget forces it lower."""
    return "int8" if precision == "int4" else precision


def recipes(precision: str) -> tuple[Recipe, ...]:
    """What a precision can mean, best first."""
    first = Recipe(precision, usual_head(precision))
    return (first, Recipe("int4", "int4")) if precision == "int4" else (first,)


def stored_as(name: str, shape: tuple[int, ...], recipe: Recipe) -> str:
    """The format of one tensor: F32, BF16, int8 or int4. Vectors and steering matrices are float32 at every precision.

    A matrix narrower than a block is not worth quantizing and stays in bf16.
    """
    if len(shape) == 1 or name.endswith(STEERING):
        return "F32"
    if recipe.precision in PLAIN:
        return PLAIN[recipe.precision]
    if shape[-1] < BLOCK:
        return "BF16"
    if name in EMBEDDINGS:
        return recipe.head
    careful = name.endswith(CAREFUL) or name.startswith("altup.")
    return "int8" if careful else recipe.precision


def stored_bytes(shape: tuple[int, ...], stored: str) -> int:
    """Bytes of a tensor of ``shape`` in a format of :func:`stored_as`."""
    return quantized_bytes(flat(shape), stored) if stored in BITS else math.prod(shape) * ITEMSIZE[stored]
