"""Experts and per-head matrices on CUDA, in Triton: a kernel reads on the device which matrices of a stack it wants.

Nothing waits for the host, so a recorded step of a mixture is two kernels after its router: gate and up with the
activation and the routing weight, then down with the sum over a token's experts. Only those are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from edge.engine.cuda_blocks import TILE_BYTES, dot4, dot8, floor_power, widen
from edge.engine.torch_blocks import BLOCK, Blocks
from edge.engine.torch_experts import TINY, Stack
from loaders.network.spec import Experts, Router

# Rows that a program takes at once: more where they are narrow, as measured on an H100; and columns of 16-bit values.
LEAST_ROWS, MOST_ROWS = 4, 32
MOST_COLUMNS = 1024


@triton.jit
def dense_dot(total, weight, row, x, columns, column_block: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total`` [rows, column_block] and the products of rows ``row`` with x."""
    for start in range(0, columns, column_block):
        column = start + tl.arange(0, column_block)
        used = column < columns
        value = tl.load(x + column, mask=used, other=0.0)
        tile = tl.load(weight + row[:, None] * columns + column[None, :], mask=used[None, :], other=0.0)
        total += tile.to(tl.float32) * value[None, :]
    return total


@triton.jit
def block_dot(tile, scale, x, column, used, columns, bits: tl.constexpr, whole: tl.constexpr):  # type: ignore[no-untyped-def]
    """8 bytes of codes [rows, n] times x at ``column`` [n] and further, times their scales."""
    low, high = tile.to(tl.int32), (tile >> 32).to(tl.int32)
    part = tl.zeros((tile.shape[0], tile.shape[1]), dtype=tl.float32)
    if bits == 4:
        part = dot4(part, low, x, column, used, columns, whole)
        part = dot4(part, high, x, column + 4, used, columns, whole)
    else:
        part = dot8(part, low, x, column, used, columns, whole)
        part = dot8(part, high, x, column + 4, used, columns, whole)
    return part * scale


@triton.jit
def row_dot(  # type: ignore[no-untyped-def]
    weight, scales, row, x, units, blocks, columns, bits: tl.constexpr, whole: tl.constexpr, lanes: tl.constexpr
):
    """Rows ``row`` (int64 [rows]) of a matrix of values or of blocks times x -> [rows]."""
    total = tl.zeros((row.shape[0], lanes), dtype=tl.float32)
    if bits > 8:
        total = dense_dot(total, weight, row, x, columns, lanes)
    else:
        per_block: tl.constexpr = bits // 2
        lane = tl.arange(0, lanes)
        codes = weight.to(tl.pointer_type(tl.int64)) + row[:, None] * units
        places = scales + row[:, None] * blocks
        for start in range(0, units, lanes):
            base = tl.minimum(start, units - lanes)
            tile = tl.load(codes + base + lane[None, :], eviction_policy="evict_first")
            # As in cuda_blocks: not true, but neighbouring threads then load neighbours.
            near = tl.max_contiguous(lane // per_block, lanes)
            scale = tl.load(places + base // per_block + near[None, :]).to(tl.float32)
            column = (base // per_block + lane // per_block) * 32 + lane % per_block * 8
            total += block_dot(tile, scale, x, column, base + lane >= start, columns, bits, whole)
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=["each", "units", "blocks", "active"])
def gate_up_kernel(  # type: ignore[no-untyped-def]
    gate,
    gate_scales,
    up,
    up_scales,
    x,
    ids,
    shares,
    out,
    each,
    units,
    blocks,
    columns,
    active,
    bits: tl.constexpr,
    whole: tl.constexpr,
    silu: tl.constexpr,
    on_input: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
):
    """act(gate x) * (up x) of one (token, expert), some rows of it, times the routing weight: out [t * active, each].

    The last block of rows begins earlier instead of being cut off, here and below.
    """
    pair = tl.program_id(1)
    share = tl.load(shares + pair)
    row = tl.minimum(tl.program_id(0) * rows, each - rows) + tl.arange(0, rows)
    at = tl.load(ids + pair).to(tl.int64) * each + row
    x += (pair // active).to(tl.int64) * columns
    a = row_dot(gate, gate_scales, at, x, units, blocks, columns, bits, whole, lanes)
    b = row_dot(up, up_scales, at, x, units, blocks, columns, bits, whole, lanes)
    if on_input:
        a *= share
        b *= share
    # The tanh form of gelu is a sigmoid of a cubic.
    bend = a if silu else 1.5957691216057308 * (a + 0.044715 * a * a * a)
    hidden = a / (1.0 + tl.exp(-bend)) * b
    tl.store(out + pair.to(tl.int64) * each + row, hidden if on_input else hidden * share)


@triton.jit(do_not_specialize=["each", "units", "blocks", "active"])
def down_kernel(  # type: ignore[no-untyped-def]
    down,
    scales,
    x,
    ids,
    out,
    each,
    units,
    blocks,
    columns,
    active,
    bits: tl.constexpr,
    whole: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
):
    """Some rows of the sum of a token's experts, x [t * active, columns] -> out [t, each].

    Codes of all its experts are read as if they lay one after another: a matrix alone may be too narrow for a block.
    """
    token = tl.program_id(1).to(tl.int64)
    row = tl.minimum(tl.program_id(0) * rows, each - rows) + tl.arange(0, rows)
    ids += token * active
    x += token * active * columns
    total = tl.zeros((rows, lanes), dtype=tl.float32)
    if bits > 8:
        for k in range(active):
            at = tl.load(ids + k).to(tl.int64) * each + row
            total = dense_dot(total, down, at, x + k * columns, columns, lanes)
    else:
        per_block: tl.constexpr = bits // 2
        lane = tl.arange(0, lanes)
        codes = down.to(tl.pointer_type(tl.int64))
        for start in range(0, units * active, lanes):
            place = tl.minimum(start, units * active - lanes) + lane
            k, unit = place // units, place % units
            at = tl.load(ids + k).to(tl.int64)[None, :] * each + row[:, None]
            tile = tl.load(codes + at * units + unit[None, :], eviction_policy="evict_first")
            scale = tl.load(scales + at * blocks + (unit // per_block)[None, :]).to(tl.float32)
            column = unit // per_block * 32 + unit % per_block * 8
            # Beyond an expert's columns lies the next one's x; codes there are zeros.
            total += block_dot(tile, scale, x, k * columns + column, place >= start, active * columns, bits, whole)
    tl.store(out + token * each + row, tl.sum(total, axis=1))


@triton.jit(do_not_specialize=["each", "units", "blocks", "heads"])
def heads_kernel(  # type: ignore[no-untyped-def]
    weight,
    scales,
    x,
    out,
    each,
    units,
    blocks,
    columns,
    heads,
    bits: tl.constexpr,
    whole: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
):
    """Some rows of one head's matrix times that head of one token: x [t, heads, columns] -> out [t, heads, each]."""
    pair = tl.program_id(1).to(tl.int64)
    row = tl.minimum(tl.program_id(0) * rows, each - rows) + tl.arange(0, rows)
    at = (pair % heads) * each + row
    found = row_dot(weight, scales, at, x + pair * columns, units, blocks, columns, bits, whole, lanes)
    tl.store(out + pair * each + row, found)


@triton.jit
def route_kernel(  # type: ignore[no-untyped-def]
    logits,
    bias,
    ids,
    shares,
    dense,
    experts,
    scale,
    tiny,
    active: tl.constexpr,
    groups: tl.constexpr,
    active_groups: tl.constexpr,
    softmax: tl.constexpr,
    biased: tl.constexpr,
    normalized: tl.constexpr,
    block: tl.constexpr,
    slots: tl.constexpr,
):
    """``torch_experts.choose`` for one token, and the same spread over all experts."""
    token = tl.program_id(0).to(tl.int64)
    lane, slot = tl.arange(0, block), tl.arange(0, slots)
    used = lane < experts
    value = tl.load(logits + token * experts + lane, mask=used, other=float("-inf"))
    if softmax:
        score = tl.exp(value - tl.max(value, 0))
        score = score / tl.sum(score, 0)
        choice = score
    else:
        score = 1.0 / (1.0 + tl.exp(-value))
        choice = score if biased else value
    if biased:
        choice = choice + tl.load(bias + lane, mask=used, other=0.0)
    choice = tl.where(used, choice, float("-inf"))
    if groups > 1:
        size: tl.constexpr = block // groups
        grid = tl.reshape(choice, (groups, size))
        best = tl.max(grid, 1)
        if size > 1:
            rest = tl.where(tl.arange(0, size)[None, :] == tl.argmax(grid, 1)[:, None], float("-inf"), grid)
            best += tl.max(rest, 1)
        group = tl.arange(0, groups)
        kept = group < 0
        for _ in tl.static_range(active_groups):
            found = tl.argmax(best, 0)
            kept = kept | (group == found)
            best = tl.where(group == found, float("-inf"), best)
        choice = tl.reshape(tl.where(kept[:, None], grid, float("-inf")), (block,))
    chosen = lane < 0
    places = tl.zeros((slots,), dtype=tl.int32)
    counts = tl.zeros((slots,), dtype=tl.float32)
    for k in tl.static_range(active):
        # What is not a number must not choose an expert that is not there.
        found = tl.minimum(tl.argmax(choice, 0), experts - 1)
        here = lane == found
        places = tl.where(slot == k, found, places)
        counts = tl.where(slot == k, tl.sum(tl.where(here, score, 0.0), 0), counts)
        chosen = chosen | here
        choice = tl.where(here, float("-inf"), choice)
    factor = scale
    if normalized:
        factor = scale / (tl.sum(counts, 0) + tiny)
    tl.store(ids + token * active + slot, places, mask=slot < active)
    tl.store(shares + token * active + slot, counts * factor, mask=slot < active)
    tl.store(dense + token * experts + lane, tl.where(chosen, score * factor, 0.0), mask=used)


def routable(experts: int, router: Router) -> bool:
    """Whether the kernel knows such a router: groups must divide a power of two."""
    return router.groups == 1 or (floor_power(experts) == experts and floor_power(router.groups) == router.groups)


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, active: int, router: Router
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits float32 [t, experts] -> weights [t, experts]; the experts chosen, int32 [t, active], and their weights."""
    tokens, experts = logits.shape
    logits, dense = logits.contiguous(), torch.empty_like(logits, memory_format=torch.contiguous_format)
    chosen = torch.empty((tokens, active), dtype=torch.int32, device=logits.device)
    shares = torch.empty((tokens, active), dtype=torch.float32, device=logits.device)
    route_kernel[(tokens,)](
        *(logits, logits if bias is None else bias.float(), chosen, shares, dense, experts, router.scale, TINY),
        active=active,
        groups=router.groups,
        active_groups=router.active_groups,
        softmax=router.score == "softmax",
        biased=bias is not None,
        normalized=router.normalized,
        block=triton.next_power_of_2(experts),
        slots=triton.next_power_of_2(active),
        num_warps=1 if experts <= 128 else 4,
    )
    return dense, chosen, shares


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    gate: Stack,
    up: Stack,
    down: Stack,
    spec: Experts,
) -> torch.Tensor:
    """x float32 [t, dim] through experts ``chosen`` int [t, active], weighed by ``shares`` -> float32 [t, dim]."""
    tokens, active = chosen.shape
    hidden = torch.empty((tokens * active, spec.width), dtype=torch.float32, device=x.device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    held, sizes, options = arguments(gate, spec.experts)
    gate_up_kernel[(triton.cdiv(spec.width, options["rows"]), tokens * active)](
        *(*held, *arguments(up, spec.experts)[0], x.contiguous(), chosen, shares, hidden, *sizes, active),
        silu=spec.activation == "silu",
        on_input=spec.router.on_input,
        **options,
    )
    held, sizes, options = arguments(down, spec.experts, active)
    down_kernel[(triton.cdiv(out.shape[1], options["rows"]), tokens)](
        *(*held, hidden, chosen, out, *sizes, active), **options
    )
    return out


def per_head(x: torch.Tensor, stack: Stack) -> torch.Tensor:
    """x float32 [t, heads, in], each head times its own matrix of a stack -> float32 [t, heads, out]; t is small."""
    tokens, heads, _ = x.shape
    held, sizes, options = arguments(stack, heads)
    out = torch.empty((tokens, heads, sizes[0]), dtype=torch.float32, device=x.device)
    heads_kernel[(triton.cdiv(sizes[0], options["rows"]), tokens * heads)](
        *(*held, x.contiguous(), out, *sizes, heads), **options
    )
    return out


def per_head_many(x: torch.Tensor, stack: Blocks) -> torch.Tensor:
    """The same for many tokens, in bfloat16: matrices are widened some heads at a time."""
    tokens, heads, _ = x.shape
    each = stack.rows // heads
    step = max(1, min(heads, TILE_BYTES // 2 // (each * stack.cols)))
    turned = x.transpose(0, 1).bfloat16()
    tile = torch.empty((step * each, stack.cols), dtype=torch.bfloat16, device=x.device)
    out = torch.empty((heads, tokens, each), dtype=torch.float32, device=x.device)
    for first in range(0, heads, step):
        count = min(step, heads - first)
        part = tile[: count * each]
        widen(stack, part, first * each)
        out[first : first + count] = torch.bmm(turned[first : first + count], part.view(count, each, -1).mT)
    return out.transpose(0, 1)


def arguments(
    stack: Stack, count: int, active: int = 1
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int, int, int], dict[str, int]]:
    """Of ``count`` matrices: memory; rows of each, units, blocks and columns of a row; how a program takes them.

    ``active`` matrices are read as one row.
    """
    if not isinstance(stack, Blocks):
        _, each, columns = stack.shape
        # A wide program for 32-bit values would keep more of them than registers hold.
        most = MOST_COLUMNS // 2 if stack.dtype == torch.float32 else MOST_COLUMNS
        lanes = min(most, triton.next_power_of_2(columns))
        rows = min(floor_power(each), max(LEAST_ROWS, 2048 // lanes), MOST_ROWS)
        options = {"bits": 8 * stack.dtype.itemsize, "whole": 1, "rows": rows, "lanes": lanes, "num_warps": 4}
        return (stack, stack), (each, 0, 0, columns), options
    each, blocks = stack.rows // count, stack.width // BLOCK
    units = blocks * stack.bits // 2
    # One warp adds up without waiting for others; where only one sum is made of all experts, warps must fill the GPU.
    lanes = min(128 if active > 1 else 64, floor_power(units * active))
    warps = max(1, lanes // 32) if active > 1 else 1
    rows = min(floor_power(each), max(LEAST_ROWS, 256 // lanes), MOST_ROWS)
    found = {"bits": stack.bits, "whole": int(stack.cols == stack.width), "rows": rows}
    return (stack.codes, stack.scales), (each, units, blocks, stack.cols), {**found, "lanes": lanes, "num_warps": warps}
