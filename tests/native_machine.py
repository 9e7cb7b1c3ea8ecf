"""A second machine for the native engine's programs: numpy, over one arena in which what is dead is not a number."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from edge.engine.native.compile import Compiled
from edge.engine.native.library import Activation, Arithmetic, Op, Space
from edge.engine.native.lower import quant_floats
from edge.engine.native.plan_memory import aligned, lifetimes
from edge.engine.torch_experts import route
from loaders.network.spec import Router

CONTEXT = 32


def capacity(layer: int) -> int:
    """Of any cache: attention's scratch is all that asks."""
    return CONTEXT


class Machine:
    """Runs a program as the compiled engine does, on the same instructions; values of quantized rows stay floats."""

    def __init__(
        self, program: Compiled, weights: dict[str, np.ndarray], chunk: int, stored: Callable[[str], str]
    ) -> None:
        self.program, self.chunk = program, chunk
        named = [weights.get(name) for name in program.weights]
        self.weights, self.kinds = [*named, *program.constants], [stored(name) for name in program.weights]
        self.arena = np.full(program.arena_floats(chunk, capacity), np.nan, np.float32)
        self.steps = instructions(program, chunk)
        self.dying: list[list[slice]] = [[] for _ in program.steps]
        for buffer in lifetimes(program.steps):
            start, size = buffer.place, aligned(buffer.floats)
            start, size = (program.row_floats * chunk + start, size) if buffer.one else (start * chunk, size * chunk)
            self.dying[buffer.last].append(slice(start, start + size))

    def run(self, ids: np.ndarray, start: int, ple: np.ndarray | None, caches: dict[int, Any]) -> np.ndarray:
        """One pass; returns the logits."""
        assert start + len(ids) <= CONTEXT
        self.ids, self.start, self.ple, self.caches = ids, start, ple, caches
        self.out = np.full((1 if self.program.out_one else len(ids), self.program.out_width), np.nan, np.float32)
        self.arena[:] = np.nan
        for step, dying in zip(self.steps, self.dying, strict=True):
            self.step = step
            getattr(self, step.op.name.lower())(*(self.view(v) for v in step.view))
            for gone in dying:
                self.arena[gone] = np.nan
        return self.out

    def view(self, v: Any) -> np.ndarray | None:
        """[rows, n, m] of the arena or the logits, inside which it lies."""
        if v.m == 0:
            return None
        memory = self.out.reshape(-1) if v.space == Space.OUTPUT else self.arena
        rows = 1 if v.one else len(self.ids)
        assert v.at + (rows - 1) * v.row + (v.n - 1) * v.step + (v.m - 1) * v.unit < len(memory)
        strides = (4 * v.row, 4 * v.step, 4 * v.unit)
        return np.lib.stride_tricks.as_strided(memory[v.at :], (rows, v.n, v.m), strides)

    def weight(self, i: int) -> np.ndarray:
        return self.weights[self.step.weight[i]]

    def positions(self, one: bool) -> np.ndarray:
        found = self.start + np.arange(len(self.ids))
        return found[-1:] if one else found

    def factor(self, x: np.ndarray, weight: int) -> np.ndarray:
        """x in the form that a weight wants, as values."""
        cols, quantized = self.weights[weight].shape[-1], self.kinds[weight] in ("int8", "int4")
        assert x.shape[-1] == (quant_floats(cols) if quantized else cols)
        return x[..., :cols]

    def embed(self, out: Any, *_: Any) -> None:
        out[:, 0] = self.weight(0)[self.positions(False) if self.step.number[0] else self.ids]

    def ple_rows(self, out: Any, *_: Any) -> None:
        assert self.ple is not None
        out[:] = self.ple

    def quantize(self, x: Any, out: Any, *_: Any) -> None:
        assert out.shape[-1] == quant_floats(x.shape[-1])
        out[:] = 1e30
        out[..., : x.shape[-1]] = x

    def linear(self, x: Any, *outs: Any) -> None:
        count = self.step.number[0]
        assert len({self.kinds[w] for w in self.step.weight[:count]}) == 1
        for k in range(count):
            outs[k][:, 0] = self.factor(x[:, 0], self.step.weight[k]) @ self.weight(k).T

    def head_linear(self, x: Any, out: Any, *_: Any) -> None:
        out[:] = np.einsum("thi,hoi->tho", self.factor(x, self.step.weight[0]), self.weight(0))

    def matmul(self, a: Any, b: Any, out: Any, *_: Any) -> None:
        out[:] = a @ b

    def norm(self, x: Any, out: Any, *_: Any) -> None:
        scaled = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(self.step.real[0]))
        out[:] = scaled if self.step.weight[0] < 0 else scaled * self.weight(0)

    def layer_norm(self, x: Any, out: Any, *_: Any) -> None:
        apart = x - x.mean(-1, keepdims=True)
        scaled = apart / np.sqrt(np.square(apart).mean(-1, keepdims=True) + np.float32(self.step.real[0]))
        out[:] = scaled * self.weight(0) + self.weight(1)

    def rms(self, x: Any, out: Any, *_: Any) -> None:
        out[:] = np.sqrt(np.maximum(np.square(x).mean(-1, keepdims=True), self.step.real[0]))

    def rotation(self, out: Any, *_: Any) -> None:
        angles = self.positions(len(out) == 1)[:, None].astype(np.float32) * self.weight(0)
        out[:, 0] = np.concatenate((np.cos(angles), np.sin(angles)), 1) * self.step.real[0]

    def rope(self, x: Any, out: Any, turned: Any, *_: Any) -> None:
        dim, interleaved = self.step.number[:2]
        cos, sin = turned[..., : dim // 2], turned[..., dim // 2 :]
        first, second = (
            (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(0, dim // 2), slice(dim // 2, dim))
        )
        made = x.copy()
        made[..., first] = x[..., first] * cos - x[..., second] * sin
        made[..., second] = x[..., second] * cos + x[..., first] * sin
        out[:] = made

    def temperature(self, x: Any, out: Any, *_: Any) -> None:
        steps = np.floor((self.positions(len(x) == 1) + 1.0) / self.step.number[0])
        out[:] = x * (1 + self.step.real[0] * np.log1p(steps))[:, None, None].astype(np.float32)

    def append(self, k: Any, v: Any, *_: Any) -> None:
        old = self.caches.get(self.step.number[0])
        new = (k.copy(), None if v is None else v.copy())
        if old is not None:
            new = tuple(b if a is None else np.concatenate((a, b)) for a, b in zip(old, new, strict=True))
        self.caches[self.step.number[0]] = new

    def attention(self, q: Any, out: Any, scratch: Any, *_: Any) -> None:
        number, window, chunk = self.step.number[:3]
        k, v = self.caches[number]
        v = k[..., : out.shape[-1]] if v is None else v
        group = q.shape[1] // k.shape[1]
        k, v = (np.repeat(x, group, 1) for x in (k, v))
        assert scratch.shape[:2] == (1, 1)
        scratch[:] = 1e30
        query, key = self.positions(len(q) == 1)[:, None], np.arange(len(k))[None]
        seen = (key <= query) & (key > query - (window or CONTEXT)) & (key >= (query // chunk * chunk if chunk else 0))
        scores = np.where(seen[:, None], np.einsum("qhd,khd->qhk", q, k) * self.step.real[0], -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        out[:] = np.einsum("qhk,khd->qhd", shares / shares.sum(-1, keepdims=True), v)

    def route(self, logits: Any, out: Any, *_: Any) -> None:
        active, sigmoid, normalized, groups, kept = self.step.number[:5]
        router = Router("sigmoid" if sigmoid else "softmax", bool(normalized), self.step.real[0], True, groups, kept)
        bias = None if self.step.weight[0] < 0 else torch.from_numpy(self.weight(0))
        out[:, 0] = route(torch.from_numpy(logits[:, 0].copy()), bias, active, router).numpy()

    def experts(self, x: Any, weights: Any, out: Any, scratch: Any, *_: Any) -> None:
        gate, up, down = (self.weight(k) for k in range(3))
        active, act, on_input = self.step.number[:3]
        inner = [quant_floats(w.shape[2]) if self.kinds[self.step.weight[k]] in ("int8", "int4") else w.shape[2]
                 for k, w in ((0, gate), (2, down))]  # fmt: skip
        assert scratch.shape[2] >= active * (sum(inner) + 2 * gate.shape[1] + gate.shape[2]) + 4 * len(gate) + 64
        scratch[:] = 1e30
        total = np.zeros_like(out[:, 0])
        for e in range(len(gate)):
            share = weights[:, 0, e : e + 1]
            read = x[:, 0] * share if on_input else x[:, 0]
            written = (activated(read @ gate[e].T, act) * (read @ up[e].T)) @ down[e].T
            total += np.where(share != 0, written if on_input else written * share, 0)
        out[:, 0] = total

    def activation(self, x: Any, out: Any, *_: Any) -> None:
        out[:] = activated(x, self.step.number[0])

    def gaussian_topk(self, x: Any, out: Any, *_: Any) -> None:
        out[:] = np.maximum(
            x - (x.mean(-1, keepdims=True) + np.float32(self.step.real[0]) * x.std(-1, keepdims=True)), 0
        )

    def binary(self, a: Any, b: Any, out: Any, *_: Any) -> None:
        kind, other, act = self.step.number[:3]
        if other:
            assert b is None
            b = np.float32(self.step.real[0]) if other == 1 else self.weight(0)
            assert other == 1 or b.shape == a.shape[-1:]
        operation = (np.add, np.subtract, np.multiply, np.divide)[Arithmetic(kind)]
        out[:] = operation(activated(a, act), b)

    def copy(self, x: Any, out: Any, *_: Any) -> None:
        out[:] = x[-len(out) :]


def activated(x: np.ndarray, kind: int) -> np.ndarray:
    """Element-wise."""
    if kind == Activation.SILU:
        return x / (1 + np.exp(-x))
    if kind == Activation.GELU_TANH:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi, dtype=np.float32) * (x + 0.044715 * x**3)))
    return np.tanh(x) if kind == Activation.TANH else x


def instructions(program: Compiled, chunk: int) -> list[SimpleNamespace]:
    """What the compiled engine is handed, read back."""
    return [
        SimpleNamespace(
            op=Op(one.op), view=list(one.view), weight=list(one.weight), number=list(one.number), real=list(one.real)
        )
        for one in program.instructions(chunk, capacity)
    ]
