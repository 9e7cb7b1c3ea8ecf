"""Parameters of a nested model, and its loss: :func:`loaders.network.altup.altup_decoder` over batches.

A matrix of an FFN is kept in blocks, one for each trained width: the first is the narrowest sub-model's own matrix,
every further one what the next width adds. Each is a parameter of its own, so that an optimizer which looks at whole
matrices (Muon) gives each block a full step, however well the narrower ones do already.
"""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.demo_model.ops import Batch, Nested
from loaders.network.altup import altup_decoder
from loaders.network.matformer import full, sliced, source_name
from loaders.network.spec import Gated, Model
from loaders.network.tensors import PLE_TABLE, flat, tensors
from loaders.slices import SKIP_FIRST_SHARED, named

Params = dict[str, list[Tensor]]
# What multiplies a layer's own share of the stream begins small, so that the embedding is not drowned at first.
BRANCHES = (".norm.attn_out", ".norm.ffn_out", ".laurel.norm", ".ple.norm")
START = 0.5


def axis_of(name: str) -> int | None:
    """Along which axis a tensor narrows with the FFN; None where it does not."""
    return {".ffn.gate": 0, ".ffn.up": 0, ".ffn.down": 1}.get(name[name.rfind(".ffn.") :] if ".ffn." in name else "")


def initial(model: Model, generator: torch.Generator) -> Params:
    """float32 parameters by canonical name, each a list of blocks."""
    assert model.nested is not None
    assert model.ple is not None
    edges = (0, *sorted(model.nested.widths))
    sizes = [high - low for low, high in pairwise(edges)]
    found: Params = {}
    for name, shape in tensors(model).items():
        whole, axis = first(name, flat(shape), model.ple.dim**-0.5, generator), axis_of(name)
        blocks = [whole] if axis is None else whole.split(sizes, axis)
        found[name] = [block.clone().requires_grad_() for block in blocks]
    return found


def first(name: str, shape: tuple[int, ...], table: float, generator: torch.Generator) -> Tensor:
    """A tensor before training; ``table``: the spread of per-layer embeddings."""
    if len(shape) == 1:
        if name.endswith((".q_norm", ".k_norm")):
            return torch.full(shape, shape[0] ** -0.25)  # attention scores are not scaled: this scales them
        return torch.full(shape, START if name.endswith(BRANCHES) else 1.0)
    if name.endswith((".altup.predict", ".altup.correct")):
        return torch.zeros(shape)  # a plain residual stream, until it learns better
    if name == PLE_TABLE:
        return torch.randn(shape, generator=generator) * table  # as loud as the context it is added to
    spread = 0.02 if name == "embed" else 1.0 / sqrt(shape[1])
    return torch.randn(shape, generator=generator) * spread


def whole(params: Params) -> dict[str, Tensor]:
    """Canonical name -> the full tensor, joined from its blocks."""
    return {name: joined(name, blocks).detach() for name, blocks in params.items()}


def joined(name: str, blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, axis_of(name) or 0)


class Network:
    """The loss of a model, or of what is left of it when its skippable block is left out."""

    def __init__(self, model: Model, length: int, device: torch.device, dtype: torch.dtype, skip: bool = False) -> None:
        self.part = named(model, SKIP_FIRST_SHARED) if skip else full(model)
        self.model, self.length = sliced(model, self.part), length
        self.device, self.dtype = device, dtype
        self.op = Batch(model, length, device, dtype)
        # Found out once, here: a compiler does not follow how.
        _ = self.model.donors, self.model.last_writer
        _ = [layer.ffn.cut for layer in self.model.layers if isinstance(layer.ffn, Gated) and layer.ffn.sparsity]

    def logits(self, params: Params, ids: Tensor, units: Tensor, table: float | Tensor = 1.0) -> Tensor:
        """ids [batch, length] -> [batch * length, vocab]; ``units`` [batch, layers of the full model]: the width that
        each sequence uses of each layer; ``table`` multiplies the per-layer embeddings.
        """
        assert self.model.ple is not None
        op, flat_ids = self.op, ids.reshape(-1)
        per_token = units[:, None].expand(-1, self.length, -1).reshape(len(flat_ids), -1)

        def w(name: str) -> Tensor | Nested:
            source = source_name(self.part, name)
            weight, axis = joined(source, params[source]), axis_of(source)
            if axis is not None:
                layer = int(source.split(".")[1])
                return Nested(weight, per_token[:, layer : layer + 1], axis == 1)
            if source == "ple.proj":
                return self.kept(weight, 0)
            return weight

        rows = self.kept(functional.embedding(flat_ids, params[PLE_TABLE][0]), 1) * table
        rows = rows.reshape(-1, len(self.model.layers), self.model.ple.dim)
        out = altup_decoder(op, self.model, w, flat_ids, rows, op, want="all")
        assert isinstance(out, Tensor)
        return out

    def kept(self, x: Tensor, axis: int) -> Tensor:
        """The blocks of the layers that are there, of an axis that has one block for each of the full model."""
        assert self.model.ple is not None
        count = x.shape[axis] // self.model.ple.dim
        if count == len(self.part.keep):
            return x
        blocks = x.split(self.model.ple.dim, axis)
        return torch.cat([blocks[i] for i in self.part.keep], axis)

    def loss(self, params: Params, ids: Tensor, targets: Tensor, units: Tensor, table: float | Tensor = 1.0) -> Tensor:
        """Nats per token, the mean over the batch."""
        out = self.logits(params, ids, units, table)
        return functional.cross_entropy(out.float(), targets.reshape(-1))
