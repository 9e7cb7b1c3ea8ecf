"""The small vocabulary the network is written in. A new op costs work in every backend: deliberate friction.

Values are [tokens, ...] and support ``+ - * /`` with each other (numpy broadcasting) and with Python floats. There is
no batch axis: one sequence runs at a time. Sizes in ``reshape`` may hold one ``-1``, which is always the token axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from loaders.network.spec import Activation, Experts, Rope, Router, Temperature

Value = Any
Weights = Callable[[str], Value]

# Which logits a pass is run for. "none" fills the cache and stops at the last layer that writes to it.
Want = Literal["all", "last", "none"]


class Ops(Protocol):
    """What a backend must be able to compute, or to record."""

    def embed(self, table: Value, ids: Value) -> Value:
        """Rows of table [n, d] at ids [t] -> [t, d]."""

    def linear(self, x: Value, weight: Value) -> Value:
        """x [..., in] times weight [out, in] transposed -> [..., out]."""

    def head_linear(self, x: Value, weight: Value) -> Value:
        """x [t, heads, in], each head times its own matrix of weight [heads, out, in] -> [t, heads, out]."""

    def matmul(self, a: Value, b: Value) -> Value:
        """[t, n, k] times [t, k, m] -> [t, n, m]."""

    def norm(self, x: Value, weight: Value | None, eps: float) -> Value:
        """Root-mean-square norm over the last axis, in float32; the weight multiplies as it is, not as 1 + w."""

    def layer_norm(self, x: Value, weight: Value, bias: Value, eps: float) -> Value:
        """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32."""

    def rms(self, x: Value, floor: float) -> Value:
        """sqrt(max(mean(x^2), floor)) over the last axis, in float32 -> [..., 1]."""

    def rope(self, x: Value, positions: Value, rope: Rope) -> Value:
        """Rotates the heads of x [t, heads, head_dim] to their positions [t]."""

    def temperature(self, x: Value, positions: Value, temperature: Temperature) -> Value:
        """Queries x [t, heads, head_dim] times what their positions [t] call for."""

    def attention(
        self, q: Value, kv: Value, positions: Value, scale: float, window: int | None, chunk: int | None = None
    ) -> Value:
        """q [t, heads, head_dim] over what the cache returned -> [t, heads * value dim]; softmax in float32."""

    def route(self, logits: Value, bias: Value | None, experts: int, active: int, router: Router) -> Value:
        """Router logits [t, experts] -> weights [t, experts]: of ``active`` experts what they count, 0 elsewhere."""

    def experts(self, x: Value, weights: Value, gate: Value, up: Value, down: Value, spec: Experts) -> Value:
        """x [t, dim] through the experts with a weight, summed -> [t, dim]; matrices are stacks [experts, out, in]."""

    def activation(self, x: Value, kind: Activation) -> Value:
        """Element-wise silu, or gelu by its tanh approximation."""

    def gaussian_topk(self, x: Value, cut: float) -> Value:
        """relu(x - (mean + cut * std)) over the last axis; the deviation is the population's (divides by n)."""

    def tanh(self, x: Value) -> Value:
        """Element-wise."""

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """Row-major."""

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        """x[start:stop] on one axis other than the token axis."""

    def concat(self, xs: Sequence[Value], axis: int) -> Value:
        """Along an axis other than the token axis."""

    def last(self, x: Value) -> Value:
        """The last token alone: [t, ...] -> [1, ...]."""


class Cache(Protocol):
    """Where keys and values of earlier tokens live. ``positions`` are read once, before anything is appended."""

    @property
    def positions(self) -> Value:
        """Absolute positions [t] of the tokens of this forward pass."""

    def append(self, layer: int, k: Value, v: Value, window: int | None, chunk: int | None = None) -> Value:
        """Adds k, v [t, kv_heads, head_dim] and returns a handle on all keys and values this pass may see.

        The handle stays valid for the whole pass, also for later layers that share it: on a sliding layer it holds
        the keys from before the window was trimmed.
        """

    def append_latent(self, layer: int, entry: Value, rank: int) -> Value:
        """Adds entry [t, rank + rotated]: one key head for all queries, whose first ``rank`` values are also values."""
