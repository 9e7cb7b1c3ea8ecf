"""Fused forms of a few operators on CUDA, in Triton: decoding is bound by launches and by bytes of weights read.

The product of one token with a matrix reads 16-bit weights once and multiplies in float32, with no cast before or
after it; a rotation and a Gaussian cut-off are one kernel each instead of six.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from edge.engine import cuda_blocks, cuda_experts
from edge.engine.cuda_blocks import MOST_TOKENS
from edge.engine.torch_blocks import Blocks
from edge.engine.torch_experts import Stack, grouped
from edge.engine.torch_ops import TorchOps
from loaders.network.spec import Experts, Rope, Router

# Programs enough to keep every multiprocessor busy with several.
PROGRAMS = 1024
MOST_ROWS = 8
MOST_COLUMNS = 1024


@triton.jit
def gemv_kernel(weight, x, out, rows, columns, row_block: tl.constexpr, column_block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * row_block + tl.arange(0, row_block)
    inside = row < rows
    total = tl.zeros((row_block, column_block), dtype=tl.float32)
    for start in range(0, columns, column_block):
        column = start + tl.arange(0, column_block)
        used = column < columns
        value = tl.load(x + column, mask=used, other=0.0)
        tile = tl.load(
            weight + row[:, None] * columns + column[None, :], mask=inside[:, None] & used[None, :], other=0.0
        )
        total += tile.to(tl.float32) * value[None, :]
    tl.store(out + row, tl.sum(total, axis=1), mask=inside)


@triton.jit
def rope_kernel(x, cos, sin, out, heads, dim, half, block: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0).to(tl.int64)
    token = index // heads
    i = tl.arange(0, block)
    used = i < half
    c = tl.load(cos + token * half + i, mask=used)
    s = tl.load(sin + token * half + i, mask=used)
    a = tl.load(x + index * dim + i, mask=used)
    b = tl.load(x + index * dim + half + i, mask=used)
    tl.store(out + index * dim + i, a * c - b * s, mask=used)
    tl.store(out + index * dim + half + i, b * c + a * s, mask=used)


@triton.jit
def gaussian_topk_kernel(x, out, width, cut, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    used = i < width
    value = tl.load(x + row * width + i, mask=used, other=0.0)
    mean = tl.sum(value) / width
    centred = tl.where(used, value - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred) / width)
    tl.store(out + row * width + i, tl.maximum(value - (mean + cut * deviation), 0.0), mask=used)


class CudaOps(TorchOps):
    """TorchOps with the kernels above where they apply."""

    # What the router last returned, and the experts it chose: their layer comes next.
    routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def embed(self, table: torch.Tensor | Blocks, ids: torch.Tensor) -> torch.Tensor:
        return cuda_blocks.embed(table, ids) if isinstance(table, Blocks) else super().embed(table, ids)

    def linear(self, x: torch.Tensor, weight: torch.Tensor | Blocks) -> torch.Tensor:
        if isinstance(weight, Blocks):
            return cuda_blocks.linear(x, weight)
        if x.shape[0] != 1 or x.dim() != 2 or not weight.is_contiguous():
            return super().linear(x, weight)
        rows, columns = weight.shape
        row_block = MOST_ROWS
        while row_block > 1 and rows // row_block < PROGRAMS:
            row_block //= 2
        out = torch.empty((1, rows), dtype=torch.float32, device=x.device)
        column_block = min(MOST_COLUMNS, triton.next_power_of_2(columns))
        gemv_kernel[(triton.cdiv(rows, row_block),)](
            weight, x.contiguous(), out, rows, columns, row_block=row_block, column_block=column_block
        )
        return out

    def head_linear(self, x: torch.Tensor, weight: Stack) -> torch.Tensor:
        if len(x) <= MOST_TOKENS and (isinstance(weight, Blocks) or weight.is_contiguous()):
            return cuda_experts.per_head(x, weight)
        return cuda_experts.per_head_many(x, weight) if isinstance(weight, Blocks) else super().head_linear(x, weight)

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, experts: int, active: int, router: Router
    ) -> torch.Tensor:
        if len(logits) > MOST_TOKENS or not cuda_experts.routable(experts, router):
            return super().route(logits, bias, experts, active, router)
        self.routed = cuda_experts.route(logits, bias, active, router)
        return self.routed[0]

    def experts(
        self, x: torch.Tensor, weights: torch.Tensor, gate: Stack, up: Stack, down: Stack, spec: Experts
    ) -> torch.Tensor:
        routed, self.routed = self.routed, None
        if len(x) > MOST_TOKENS:
            return grouped(self, x, weights, gate, up, down, spec)
        if routed is None or routed[0] is not weights:
            shares, chosen = weights.topk(spec.active, -1)
            routed = weights, chosen.int(), shares
        return cuda_experts.experts(x, routed[1], routed[2].contiguous(), gate, up, down, spec)

    def rope(self, x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
        tokens, heads, dim = x.shape
        if rope.dim != dim or rope.interleaved:
            return super().rope(x, positions, rope)
        cos, sin = self.rotation(positions, rope)
        x, out, half = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format), dim // 2
        rope_kernel[(tokens * heads,)](x, cos, sin, out, heads, dim, half, block=triton.next_power_of_2(half))
        return out

    def gaussian_topk(self, x: torch.Tensor, cut: float) -> torch.Tensor:
        x, width = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        block = triton.next_power_of_2(width)
        warps = 16 if block >= 8192 else 4
        gaussian_topk_kernel[(x.numel() // width,)](x, out, width, cut, block=block, num_warps=warps)
        return out
