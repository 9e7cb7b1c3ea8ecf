"""Softmax attention of rows of queries over keys and values of the same heads, in the form a device does best."""

from __future__ import annotations

import torch
from torch.nn import functional

from edge.budget.price import CUDA_TILE

# torch multiplies 16-bit matrices into 32-bit sums on CUDA from this version on.
WIDE_SUMS = torch.__version__ >= "2.8"


def attend(
    rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, one: bool
) -> torch.Tensor:
    """rows [kv_heads, r, dim] over k [kv_heads, n, dim] and v -> [kv_heads, r, value dim].

    ``mask`` bool [r, n] marks what each row sees; ``one``: all rows are heads of one token. Values that are shorter
    than keys are the keys' own first ones.
    """
    scores = 3 * 4 * rows.shape[0] * rows.shape[1] * k.shape[1]
    if one and rows.is_cuda and scores <= CUDA_TILE and (WIDE_SUMS or k.dtype == torch.float32):
        return spread(rows, k, v, mask, scale)
    values = v.shape[-1]
    if values != k.shape[-1]:
        # torch has no fused form for two lengths and would copy the cache: the end of a longer sum is dropped.
        v = k
    return functional.scaled_dot_product_attention(rows[None], k[None], v[None], mask, scale=scale)[0, ..., :values]


def spread(
    rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """For few rows on a GPU: fused kernels give a head to one multiprocessor and leave the others idle.

    On an H100, over 4096 keys of 2 heads of 256 bfloat16 values, 21 us instead of 206.
    """
    scores = product(rows, k.transpose(1, 2))
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    return product(scores.mul_(scale).softmax(-1).to(v.dtype), v)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """float32 [heads, r, m] of a [heads, r, k] times b [heads, k, m]."""
    return torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)
