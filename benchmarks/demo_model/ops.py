"""The network's operators for training: a batch of sequences lies one after another on the token axis.

Matrix products run in ``dtype``, everything else in float32. All of it is meant to be compiled; as written it would
move far too much memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from edge.engine.torch_ops import frequencies
from loaders.network.spec import Activation, Attention, Model, Rope


class Nested(NamedTuple):
    """A weight of an FFN of which a token uses the first ``units`` [tokens, 1] hidden units only: its rows, or, where
    ``across``, its columns.
    """

    weight: Tensor
    units: Tensor
    across: bool


class Batch:
    """Ops and Cache for ``batch`` sequences of ``length`` tokens, each from position 0."""

    def __init__(self, model: Model, length: int, device: torch.device, dtype: torch.dtype) -> None:
        self.length, self.dtype = length, dtype
        self.positions = torch.arange(length, device=device)
        ropes = {layer.attention.rope for layer in model.layers if isinstance(layer.attention, Attention)}
        self.rotations = {rope: self.rotation(rope, device) for rope in ropes if rope is not None}
        self.units: Tensor | None = None

    def rotation(self, rope: Rope, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [length, 1, dim / 2]."""
        angles = self.positions.float()[:, None] * frequencies(rope).to(device)
        return angles.cos()[:, None], angles.sin()[:, None]

    def append(
        self, layer: int, k: Tensor, v: Tensor, window: int | None, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        return k, v

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        return functional.embedding(ids, table)

    def linear(self, x: Tensor, weight: Tensor | Nested) -> Tensor:
        if not isinstance(weight, Nested):
            return functional.linear(x.to(self.dtype), weight.to(self.dtype))
        if weight.across:
            return self.linear(x * inside(x, weight.units), weight.weight)
        out = self.linear(x, weight.weight)
        self.units = weight.units
        return out * inside(out, weight.units)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        # Four by four: a sum of products fuses with its neighbours, a batched product of such matrices would not.
        rows = [sum(a[:, i, j, None] * b[:, j] for j in range(b.shape[1])) for i in range(a.shape[1])]
        return torch.stack(rows, 1)

    def norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x = x.float()
        out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return out if weight is None else out * weight

    def rms(self, x: Tensor, floor: float) -> Tensor:
        return x.float().square().mean(-1, keepdim=True).clamp_min(max(floor, 1e-12)).sqrt()

    def rope(self, x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
        cos, sin = self.rotations[rope]
        a, b = x.view(-1, self.length, *x.shape[1:]).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).view(x.shape)

    def attention(
        self,
        q: Tensor,
        kv: tuple[Tensor, Tensor],
        positions: Tensor,
        scale: float,
        window: int | None,
        chunk: int | None = None,
    ) -> Tensor:
        q, k, v = (x.to(self.dtype).view(-1, self.length, *x.shape[1:]) for x in (q, *kv))
        near = window is not None and window < self.length and self.length % window == 0
        out = local(q, k, v, scale, window) if near else everything(q, k, v, scale, window)
        return out.reshape(-1, q.shape[2] * q.shape[3])

    def activation(self, x: Tensor, kind: Activation) -> Tensor:
        return functional.silu(x) if kind == "silu" else functional.gelu(x, approximate="tanh")

    def gaussian_topk(self, x: Tensor, cut: float) -> Tensor:
        # What lies outside of the prefix is zero here and adds to neither sum.
        assert self.units is not None
        x = x.float()
        mean = x.sum(-1, keepdim=True) / self.units
        deviation = (x.square().sum(-1, keepdim=True) / self.units - mean.square()).clamp_min(1e-12).sqrt()
        return functional.relu(x - (mean + cut * deviation))

    def tanh(self, x: Tensor) -> Tensor:
        return x.float().tanh()

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(tuple(shape))

    def slice(self, x: Tensor, axis: int, start: int, stop: int) -> Tensor:
        return x.narrow(axis, start, stop - start)

    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(tuple(xs), axis)


def inside(x: Tensor, units: Tensor) -> Tensor:
    """1 where a hidden unit of x [tokens, width] is among a token's first ``units``, else 0."""
    return (torch.arange(x.shape[-1], device=x.device) < units).to(x.dtype)


def everything(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [batch, t, heads, dim] over all keys before it, or those within ``window`` -> [batch, t, heads, dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None
    if window is not None:
        steps = torch.arange(q.shape[2], device=q.device)
        back = steps[:, None] - steps
        mask = (back >= 0) & (back < window)
    k, v = (x.expand(-1, q.shape[1] // x.shape[1] * x.shape[1], -1, -1) for x in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


def local(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """As ``everything``, window by window: a query sees no key but those of its own block and the one before."""
    batch, length, heads, dim = q.shape
    blocks = length // window
    q = q.view(batch, blocks, window, heads, dim)
    k, v = (before_and_own(x.view(batch, blocks, window, dim)) for x in (k, v))
    scores = torch.einsum("bnqhd,bnkd->bnhqk", q, k).float() * scale
    query = torch.arange(window, device=q.device)[:, None] + window
    key = torch.arange(2 * window, device=q.device)
    seen = (key <= query) & (key > query - window)
    first = torch.arange(blocks, device=q.device)[:, None, None] > 0
    scores = scores.masked_fill(~(seen & (first | (key >= window)))[:, None], float("-inf"))
    out = torch.einsum("bnhqk,bnkd->bnqhd", scores.softmax(-1).to(v.dtype), v)
    return out.reshape(batch, length, heads, dim)


def before_and_own(x: Tensor) -> Tensor:
    """Blocks [batch, n, window, dim] -> [batch, n, 2 * window, dim]: each behind the one before it."""
    before = functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat((before, x), 2)
