"""Block-quantized weights on CUDA, in Triton: codes and scales are read once, as they lie in memory.

One token is bound by the bytes of the codes, on fast memory nearly by the instructions that unpack them: hence
integers become floats without a conversion, by an OR into the mantissa of 2**23.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional

from edge.budget.price import CUDA_TILE
from edge.engine.torch_blocks import BLOCK, Blocks

# Tokens that are multiplied one by one: the codes come from memory for the first, from the cache for the others.
MOST_TOKENS = 8
# Bytes of a widened tile of a matrix: what the product reads next should still lie in the cache.
TILE_BYTES = CUDA_TILE
# From here on there are programs enough when each is a single warp.
MANY_ROWS = 8192
# Blocks of 32 values that a program widens.
WIDENED = 128


@triton.jit
def masked(word, mask):  # type: ignore[no-untyped-def]
    """word & mask in the mantissa of 2**23: one instruction, where the compiler would make two."""
    mask = tl.full((1,), mask, tl.int32)
    magic = tl.full((1,), 0x4B000000, tl.int32)
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [word, mask, magic], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def nibble(word, place: tl.constexpr):  # type: ignore[no-untyped-def]
    """The code in bits 4 * place to 4 * place + 3, place below 5: float32, exactly code * 16**place."""
    return masked(word, 15 << (4 * place)).to(tl.float32, bitcast=True) - (8388608.0 + (8 << (4 * place)))


@triton.jit
def byte(word, place: tl.constexpr):  # type: ignore[no-untyped-def]
    """The code + 128 in byte ``place``, 0 or 1: float32, exactly code * 256**place."""
    return masked(word, 255 << (8 * place)).to(tl.float32, bitcast=True) - (8388608.0 + (128 << (8 * place)))


@triton.jit
def four(x, column, used, columns, whole: tl.constexpr):  # type: ignore[no-untyped-def]
    """x at columns ``column`` [n] + 0 to 3, each as [1, n]; zeros where not ``used`` [n], and beyond ``columns``."""
    n: tl.constexpr = column.shape[0]
    at = column[:, None] + tl.arange(0, 4)[None, :]
    mask = tl.broadcast_to(used[:, None], (n, 4))
    if not whole:
        mask = mask & (at < columns)
    even, odd = tl.split(tl.reshape(tl.load(x + at, mask=mask, other=0.0), (n, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a[None, :], b[None, :], c[None, :], d[None, :]


@triton.jit
def dot8(total, word, x, column, used, columns, whole: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total`` and the four int8 codes of each word [rows, n] times x at ``column`` [n] to column + 3."""
    a, b, c, d = four(x, column, used, columns, whole)
    word = word ^ -2139062144
    rest = word >> 16
    total += byte(word, 0) * a
    total += byte(word, 1) * (b * (1.0 / 256))
    total += byte(rest, 0) * c
    total += byte(rest, 1) * (d * (1.0 / 256))
    return total


@triton.jit
def dot4(total, word, x, column, used, columns, whole: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total`` and the eight int4 codes of each word times x at ``column`` to column + 3 and 16 columns further."""
    a, b, c, d = four(x, column, used, columns, whole)
    e, f, g, h = four(x, column + 16, used, columns, whole)
    rest = word >> 20
    total += nibble(word, 0) * a
    total += nibble(word, 1) * (e * (1.0 / 16))
    total += nibble(word, 2) * (b * (1.0 / 256))
    total += nibble(word, 3) * (f * (1.0 / 4096))
    total += nibble(word, 4) * (c * (1.0 / 65536))
    total += nibble(rest, 0) * g
    total += nibble(rest, 1) * (d * (1.0 / 16))
    total += nibble(rest, 2) * (h * (1.0 / 256))
    return total


@triton.jit(do_not_specialize=["rows", "units", "blocks", "columns"])
def gemv_kernel(  # type: ignore[no-untyped-def]
    codes,
    scales,
    x,
    out,
    rows,
    units,
    blocks,
    columns,
    tokens,
    bits: tl.constexpr,
    whole: tl.constexpr,
    row_block: tl.constexpr,
    unit_block: tl.constexpr,
):
    """Some rows times a token, by units of 8 bytes of codes; there are at least as many as in a block of each.

    The last block begins earlier instead of being cut off: rows are computed twice, units meet zeros of x.
    """
    per_block: tl.constexpr = bits // 2
    index = tl.program_id(0).to(tl.int64)
    token = index % tokens
    first = tl.minimum(index // tokens * row_block, rows - row_block)
    row = tl.arange(0, row_block)
    lane = tl.arange(0, unit_block)
    x += token * (blocks * 32 if whole else columns)
    codes = codes.to(tl.pointer_type(tl.int64)) + first * units
    codes = codes + row[:, None].to(tl.int64) * units
    scales = scales + first * blocks + row[:, None].to(tl.int64) * blocks
    total = tl.zeros((row_block, unit_block), dtype=tl.float32)
    for start in range(0, units, unit_block):
        base = tl.minimum(start, units - unit_block)
        used = base + lane >= start
        tile = tl.load(codes + base + lane[None, :], eviction_policy="evict_first")
        low, high = tile.to(tl.int32), (tile >> 32).to(tl.int32)
        # Not true: several units share a scale. But only so do neighbouring threads load neighbouring ones, and no
        # load is made wider, since nothing is known of the alignment.
        near = tl.max_contiguous(lane // per_block, unit_block)
        scale = tl.load(scales + base // per_block + near[None, :]).to(tl.float32)
        column = (base // per_block + lane // per_block) * 32 + lane % per_block * 8
        part = tl.zeros((row_block, unit_block), dtype=tl.float32)
        if bits == 4:
            part = dot4(part, low, x, column, used, columns, whole)
            part = dot4(part, high, x, column + 4, used, columns, whole)
        else:
            part = dot8(part, low, x, column, used, columns, whole)
            part = dot8(part, high, x, column + 4, used, columns, whole)
        total += part * scale
    tl.store(out + token * rows + first + row, tl.sum(total, axis=1))


@triton.jit(do_not_specialize=["rows", "first", "count", "blocks", "columns"])
def widen_kernel(  # type: ignore[no-untyped-def]
    codes,
    scales,
    ids,
    out,
    rows,
    first,
    count,
    blocks,
    columns,
    bits: tl.constexpr,
    gather: tl.constexpr,
    whole: tl.constexpr,
    block_block: tl.constexpr,
):
    """``count`` rows from ``first`` on, or those of ``ids``, to out [count, columns] of any float type.

    An id that is no row becomes NaNs: nothing outside the matrix is read.
    """
    index = tl.program_id(0) * block_block + tl.arange(0, block_block)
    place = (index // blocks).to(tl.int64)
    block = index % blocks
    inside = place < count
    if gather:
        row = tl.load(ids + place, mask=inside, other=0)
        valid = inside & (row >= 0) & (row < rows)
    else:
        row = first + place
        valid = inside
    scale = tl.load(scales + row * blocks + block, mask=valid, other=float("nan")).to(tl.float32)[:, None]
    width: tl.constexpr = 4 * bits
    j = tl.arange(0, width)
    code = tl.load(codes + ((row * blocks + block) * width)[:, None] + j[None, :], mask=valid[:, None], other=0)
    column = block[:, None] * 32 + j[None, :]
    to = out + ((index.to(tl.int64) * 32)[:, None] + j[None, :] if whole else place[:, None] * columns + column)
    kind = out.dtype.element_ty
    # Where columns are whole blocks a mask that depends on the row alone lets stores be as wide as they can.
    if bits == 8:
        value = code.to(tl.int8, bitcast=True).to(tl.float32) * scale
        tl.store(to, value.to(kind), mask=inside[:, None] if whole else inside[:, None] & (column < columns))
    else:
        value = ((code & 15).to(tl.int32) - 8).to(tl.float32) * scale
        tl.store(to, value.to(kind), mask=inside[:, None] if whole else inside[:, None] & (column < columns))
        value = ((code >> 4).to(tl.int32) - 8).to(tl.float32) * scale
        tl.store(to + 16, value.to(kind), mask=inside[:, None] if whole else inside[:, None] & (column + 16 < columns))


def linear(x: torch.Tensor, weight: Blocks) -> torch.Tensor:
    """x float32 [..., cols] -> float32 [..., rows]. A few tokens as with float32 weights; more in bfloat16."""
    flat = x.reshape(-1, weight.cols)
    out = torch.empty((len(flat), weight.rows), dtype=torch.float32, device=x.device)
    if len(flat) <= MOST_TOKENS:
        gemv(flat.contiguous(), weight, out)
    else:
        product(flat.bfloat16(), weight, out)
    return out.view(*x.shape[:-1], weight.rows)


def gemv(x: torch.Tensor, weight: Blocks, out: torch.Tensor) -> None:
    """x float32 [t, cols] into out float32 [t, rows], both contiguous, one token after the other."""
    if not len(x):
        return
    row_block, unit_block, warps = shape_of(weight)
    blocks = weight.width // BLOCK
    grid = (triton.cdiv(weight.rows, row_block) * len(x),)
    gemv_kernel[grid](
        *(weight.codes, weight.scales, x, out, weight.rows),
        *(blocks * weight.bits // 2, blocks, weight.cols, len(x)),
        bits=weight.bits,
        whole=weight.cols == weight.width,
        row_block=row_block,
        unit_block=unit_block,
        num_warps=warps,
    )


def shape_of(weight: Blocks) -> tuple[int, int, int]:
    """Rows and units of codes that a program takes at once, and its warps: the fastest found on an H100.

    Many rows: a warp for each few, which adds up without waiting for others. Else warps enough to fill the GPU.
    """
    units = weight.width // BLOCK * weight.bits // 2
    unit_block = min(64 if weight.rows >= MANY_ROWS else 256, floor_power(units))
    warps = 1 if weight.rows >= MANY_ROWS else max(1, unit_block // 32)
    return min(4, floor_power(weight.rows)), unit_block, warps


def floor_power(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << (n.bit_length() - 1)


def product(x: torch.Tensor, weight: Blocks, out: torch.Tensor) -> None:
    """x bfloat16 [t, cols] into out float32 [t, rows], the matrix widened to bfloat16 some rows at a time."""
    step = max(1, min(weight.rows, TILE_BYTES // 2 // weight.cols))
    tile = torch.empty((step, weight.cols), dtype=torch.bfloat16, device=x.device)
    for first in range(0, weight.rows, step):
        part = tile[: min(step, weight.rows - first)]
        widen(weight, part, first)
        out[:, first : first + len(part)] = functional.linear(x, part)


def widen(weight: Blocks, out: torch.Tensor, first: int = 0) -> None:
    """Rows from ``first`` on into contiguous out [n, cols] of any float type."""
    launch(weight, out, out, first, gather=False)


def embed(table: Blocks, ids: torch.Tensor) -> torch.Tensor:
    """Rows of ids int64 [t] -> float32 [t, cols]."""
    out = torch.empty((len(ids), table.cols), dtype=torch.float32, device=ids.device)
    launch(table, out, ids.contiguous(), 0, gather=True)
    return out


def launch(weight: Blocks, out: torch.Tensor, ids: torch.Tensor, first: int, gather: bool) -> None:
    """``widen_kernel`` over the rows of ``out``."""
    blocks = weight.width // BLOCK
    if not len(out):
        return
    widen_kernel[(triton.cdiv(len(out) * blocks, WIDENED),)](
        *(weight.codes, weight.scales, ids, out, weight.rows, first, len(out), blocks, weight.cols),
        bits=weight.bits,
        gather=gather,
        whole=weight.cols == weight.width,
        block_block=WIDENED,
    )
