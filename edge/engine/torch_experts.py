"""Mixtures of experts in torch: who is chosen, and only the chosen computed, grouped by expert.

A stack is many matrices of one shape [n, out, in]: as values, or quantized as one matrix [n * out, in].
"""

from __future__ import annotations

from typing import Protocol

import torch

from edge.budget.price import TILE_BYTES
from edge.engine.torch_blocks import Blocks, widen
from loaders.network.spec import Activation, Experts, Router

Stack = torch.Tensor | Blocks
# What is added to a sum of sigmoids before dividing by it.
TINY = 1e-20
# Rows of x that several experts take in one call: what they write in between stays small beside an expert's weights.
TOGETHER = 64


class Products(Protocol):
    """What of the operators experts are made of."""

    def linear(self, x: torch.Tensor, weight: Stack) -> torch.Tensor: ...

    def activation(self, x: torch.Tensor, kind: Activation) -> torch.Tensor: ...


def route(logits: torch.Tensor, bias: torch.Tensor | None, active: int, router: Router) -> torch.Tensor:
    """Logits float32 [t, experts] -> weights [t, experts], 0 for those that are not chosen."""
    chosen, weights = choose(logits, bias, active, router)
    return torch.zeros_like(logits).scatter_(-1, chosen, weights)


def choose(
    logits: torch.Tensor, bias: torch.Tensor | None, active: int, router: Router
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 [t, experts] -> the experts of each token int64 [t, active] and what they count."""
    scores = logits.softmax(-1) if router.score == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if bias is None and router.score == "sigmoid":
        # Sigmoids of large logits are all 1: the logits still tell them apart.
        choice = logits
    if router.groups > 1:
        choice = choice.masked_fill(~best_groups(choice, router), float("-inf"))
    chosen = choice.topk(active, -1).indices
    weights = scores.gather(-1, chosen)
    if router.normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return chosen, weights if router.scale == 1.0 else weights * router.scale


def best_groups(choice: torch.Tensor, router: Router) -> torch.Tensor:
    """Which experts [t, experts] belong to the best groups: those whose two best experts sum highest."""
    tokens, experts = choice.shape
    size = experts // router.groups
    totals = choice.view(tokens, router.groups, size).topk(min(2, size), -1).values.sum(-1)
    kept = torch.zeros_like(totals, dtype=torch.bool).scatter_(-1, totals.topk(router.active_groups, -1).indices, True)
    return kept[..., None].expand(tokens, router.groups, size).reshape(tokens, experts)


def grouped(
    op: Products, x: torch.Tensor, weights: torch.Tensor, gate: Stack, up: Stack, down: Stack, spec: Experts
) -> torch.Tensor:
    """x [t, dim] -> [t, dim]: every expert that anyone chose runs once, over the tokens that chose it."""
    out = torch.zeros_like(x)
    experts_of, tokens_of = weights.t().nonzero(as_tuple=True)
    shares, at = weights[tokens_of, experts_of, None], 0
    found, counts = experts_of.unique_consecutive(return_counts=True)
    for expert, count in zip(found.tolist(), counts.tolist(), strict=True):
        tokens, share = tokens_of[at : at + count], shares[at : at + count]
        inner = x.index_select(0, tokens)
        if spec.router.on_input:
            inner = inner * share
        g, u, d = (one(stack, expert, spec.experts) for stack in (gate, up, down))
        result = op.linear(op.activation(op.linear(inner, g), spec.activation) * op.linear(inner, u), d)
        out.index_add_(0, tokens, result if spec.router.on_input else result * share)
        at += count
    return out


def one(stack: Stack, index: int, count: int) -> Stack:
    """One of ``count`` matrices, without a copy."""
    return stack.part(index, count) if isinstance(stack, Blocks) else stack[index]


def selected(
    op: Products,
    x: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    gate: Stack,
    up: Stack,
    down: Stack,
    spec: Experts,
) -> torch.Tensor:
    """x [t, dim] through experts ``chosen`` [t, active] -> [t, dim], nothing read back from the device.

    Weights of the chosen are copied: for a few tokens, where a recorded step or a wait must not depend on them.
    """
    tokens, active = chosen.shape
    at, share = chosen.reshape(-1), shares.reshape(-1, 1, 1)
    inner = x.repeat_interleave(active, 0)[:, :, None]
    if spec.router.on_input:
        inner = inner * share
    hidden = op.activation(torch.bmm(picked(gate, at, spec), inner), spec.activation)
    result = torch.bmm(picked(down, at, spec), hidden * torch.bmm(picked(up, at, spec), inner))
    if not spec.router.on_input:
        result = result * share
    return result.view(tokens, active, -1).sum(1)


def picked(stack: Stack, at: torch.Tensor, spec: Experts) -> torch.Tensor:
    """The matrices ``at`` [n] of a stack -> float32 [n, out, in]."""
    if not isinstance(stack, Blocks):
        return stack.index_select(0, at).float()
    codes, scales = (
        held.view(spec.experts, -1, held.shape[1]).index_select(0, at).flatten(0, 1)
        for held in (stack.codes, stack.scales)
    )
    out = torch.empty((len(codes), stack.width), device=stack.device)
    widen(codes, scales, stack.bits, out)
    return out[:, : stack.cols].view(len(at), -1, stack.cols)


def per_head(x: torch.Tensor, stack: Stack, fast: bool) -> torch.Tensor:
    """x [t, heads, in], each head times its own matrix of a stack -> float32 [t, heads, out]."""
    heads = x.shape[1]
    turned = x.transpose(0, 1)
    if isinstance(stack, torch.Tensor) and (fast or stack.dtype == torch.float32):
        return torch.bmm(turned.to(stack.dtype), stack.transpose(1, 2)).float().transpose(0, 1)
    rows, width = stack.shape[-2:] if isinstance(stack, torch.Tensor) else (stack.rows // heads, stack.cols)
    step = max(1, TILE_BYTES // 4 // (rows * width))
    found = []
    for first in range(0, heads, step):
        stop = min(first + step, heads)
        found.append(torch.bmm(turned[first:stop], some(stack, first, stop, heads).transpose(1, 2)))
    return torch.cat(found).transpose(0, 1)


def some(stack: Stack, first: int, stop: int, count: int) -> torch.Tensor:
    """Matrices [first, stop) of ``count`` -> float32 [stop - first, out, in]."""
    if isinstance(stack, torch.Tensor):
        return stack[first:stop].float()
    rows = stack.rows // count
    return stack.dequantize(first * rows, stop * rows).view(stop - first, rows, stack.cols)
