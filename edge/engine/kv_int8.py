"""Keys and values in int8 with one float16 scale per group of a head's values, and attention over them.

They are widened a part at a time: what a pass needs for that does not grow with the context on a CPU, and on a GPU
only where one head alone passes the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edge.budget.price import CUDA_TILE, KV_SCORES, KV_TILE, kv_group
from edge.engine.attend import attend as attend_widened

HALF_MAX, HALF_LEAST = 65504.0, 2.0**-24


@dataclass(frozen=True)
class Int8:
    """codes int8 [heads, n, dim], scales float16 [heads, n, groups]; value = code * scale. Indexed like a tensor."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the codes."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """What it is widened to: few CPUs have bfloat16 arithmetic."""
        return torch.float32 if self.codes.device.type == "cpu" else torch.bfloat16

    def __getitem__(self, at: Any) -> Int8:
        return Int8(self.codes[at], self.scales[at])

    def __setitem__(self, at: Any, values: Int8) -> None:
        self.codes[at], self.scales[at] = values.codes, values.scales

    def index_copy_(self, dim: int, at: torch.Tensor, values: Int8) -> None:
        """As torch's own."""
        self.codes.index_copy_(dim, at, values.codes)
        self.scales.index_copy_(dim, at, values.scales)

    def zero_(self) -> None:
        """As torch's own."""
        self.codes.zero_()
        self.scales.zero_()

    def widened(self, out: torch.Tensor) -> torch.Tensor:
        """The values, in ``out``, of the same shape."""
        group = self.shape[-1] // self.scales.shape[-1]
        out.copy_(self.codes)
        out.unflatten(-1, (-1, group)).mul_(self.scales.to(out.dtype if out.is_cpu else torch.float32)[..., None])
        return out


def empty(shape: tuple[int, int, int], device: torch.device) -> Int8:
    """Room for [heads, n, dim]."""
    groups = shape[2] // kv_group(shape[2])
    codes = torch.empty(shape, dtype=torch.int8, device=device)
    return Int8(codes, torch.empty((*shape[:2], groups), dtype=torch.float16, device=device))


def cat(old: Int8, new: Int8) -> Int8:
    """Along the tokens."""
    return Int8(torch.cat((old.codes, new.codes), 1), torch.cat((old.scales, new.scales), 1))


def quantize(k: torch.Tensor, v: torch.Tensor) -> tuple[Int8, Int8]:
    """k, v float32 [t, heads, dim] -> the same as [heads, t, dim]: largest value over 127, nearest codes."""
    both = torch.stack((k.transpose(0, 1), v.transpose(0, 1)))
    groups = both.unflatten(-1, (-1, kv_group(both.shape[-1])))
    scales = (groups.abs().amax(-1) / 127.0).clamp_max_(HALF_MAX).half()
    # A scale of zero: the values were next to nothing, and any code stands for zero.
    codes = groups.div_(scales.float().clamp_min_(HALF_LEAST)[..., None]).round_().clamp_(-127.0, 127.0)
    stored = codes.to(torch.int8).flatten(-2)
    return Int8(stored[0], scales[0]), Int8(stored[1], scales[1])


def attend(rows: torch.Tensor, k: Int8, v: Int8, mask: torch.Tensor | None, scale: float, one: bool) -> torch.Tensor:
    """rows [kv_heads, r, dim] over k, v [kv_heads, n, dim] -> [kv_heads, r, dim]; :func:`edge.engine.attend.attend`.

    Shapes depend on nothing but shapes, and nothing waits for the device: a recorded step may call this.
    """
    return over_tiles(rows, k, v, mask, scale) if rows.is_cpu else over_heads(rows, k, v, mask, scale, one)


def over_heads(
    rows: torch.Tensor, k: Int8, v: Int8, mask: torch.Tensor | None, scale: float, one: bool
) -> torch.Tensor:
    """rows [kv_heads, r, dim] -> the same; as many heads at a time as the bound holds widened."""
    heads, n, dim = k.shape
    step = min(heads, max(1, CUDA_TILE // (2 * n * dim * rows.element_size())))
    wide = torch.empty((2, step, n, dim), dtype=rows.dtype, device=rows.device)
    out = torch.empty(rows.shape, device=rows.device)
    for start in range(0, heads, step):
        part = slice(start, min(start + step, heads))
        size = part.stop - start
        ks, vs = k[part].widened(wide[0, :size]), v[part].widened(wide[1, :size])
        out[part] = attend_widened(rows[part], ks, vs, mask, scale, one)
    return out


def over_tiles(rows: torch.Tensor, k: Int8, v: Int8, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """rows float32 [kv_heads, r, dim] -> the same; scores are kept whole, keys and values widened a tile at a time."""
    heads, n, dim = k.shape
    some = min(heads, max(1, KV_SCORES // (4 * rows.shape[1] * n)))
    step = min(n, max(1, KV_TILE // (4 * some * dim)))
    tile, scores = torch.empty(some * step * dim), torch.empty(some * rows.shape[1] * n)
    out, hidden = torch.zeros_like(rows), None if mask is None else ~mask
    for start in range(0, heads, some):
        part = slice(start, min(start + some, heads))
        size = part.stop - start
        found = scores[: size * rows.shape[1] * n].view(size, rows.shape[1], n)
        spans = [slice(first, min(first + step, n)) for first in range(0, n, step)]
        for span in spans:
            wide = tile[: size * (span.stop - span.start) * dim].view(size, -1, dim)
            torch.bmm(rows[part], k[part, span].widened(wide).transpose(1, 2), out=found[..., span])
        if hidden is not None:
            found.masked_fill_(hidden, -torch.inf)
        weights = softmax_(found, scale)
        for span in spans:
            wide = tile[: size * (span.stop - span.start) * dim].view(size, -1, dim)
            out[part].baddbmm_(weights[..., span], v[part, span].widened(wide))
    return out


def softmax_(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax of ``scores * scale`` over the last axis, in place: a copy would double what a prefill holds."""
    scores.mul_(scale)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))
