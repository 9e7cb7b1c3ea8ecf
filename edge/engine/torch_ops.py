"""The network's operators in torch, on CPU and CUDA. Activations are float32; weights are what the store holds."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch.nn import functional

from edge.budget.price import MASK_BYTES, TILE_BYTES
from edge.engine import kv_int8
from edge.engine.attend import attend
from edge.engine.kv import Keys, Stored
from edge.engine.torch_blocks import Blocks
from edge.engine.torch_experts import TOGETHER, Stack, grouped, per_head, route, selected
from loaders.network.rotary import amplitude, scaled
from loaders.network.spec import Activation, Experts, Rope, Router, Temperature


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run at the hardware's speed: on CPUs only with AVX512-BF16, AMX or the like."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class TorchOps:
    """Stateless but for a scratch tile and the rotations of the pass at hand (:meth:`begin`)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.fast = device, has_fast_bfloat16(device)
        self.tile = torch.empty(0)
        self.constants: dict[float, torch.Tensor] = {}
        self.frequencies: dict[Rope, torch.Tensor] = {}
        self.rotations: dict[tuple[Rope, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self) -> None:
        """A new pass: positions have moved."""
        self.rotations.clear()

    def embed(self, table: torch.Tensor | Blocks, ids: torch.Tensor) -> torch.Tensor:
        if isinstance(table, Blocks):
            return table.rows_at(ids)
        return table.index_select(0, ids).float()

    def linear(self, x: torch.Tensor, weight: torch.Tensor | Blocks) -> torch.Tensor:
        if isinstance(weight, Blocks):
            out = weight.product(x.reshape(-1, weight.cols), self.scratch(weight.step * weight.width))
            return out.view(*x.shape[:-1], weight.rows)
        if weight.dtype == torch.float32:
            return functional.linear(x, weight)
        if self.fast:
            return functional.linear(x.to(weight.dtype), weight).float()
        return self.tiled(x, weight)

    def tiled(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [..., in] times a 16-bit weight, widened a tile of rows at a time: few CPUs have bfloat16 arithmetic."""
        rows, width = weight.shape
        step = max(1, min(rows, TILE_BYTES // 4 // width))
        scratch = self.scratch(step * width)
        flat, out = x.reshape(-1, width), torch.empty(*x.shape[:-1], rows)
        target = out.view(-1, rows)
        for start in range(0, rows, step):
            part = weight[start : start + step]
            tile = scratch[: part.numel()].view(part.shape)
            tile.copy_(part)
            torch.mm(flat, tile.t(), out=target[:, start : start + step])
        return out

    def scratch(self, numel: int) -> torch.Tensor:
        """Room for the widened rows of any matrix, at least ``numel`` floats."""
        if self.tile.numel() < numel:
            self.tile = torch.empty(max(numel, TILE_BYTES // 4), device=self.device)
        return self.tile

    def head_linear(self, x: torch.Tensor, weight: Stack) -> torch.Tensor:
        return per_head(x, weight, self.fast)

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.matmul(a, b)

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        if self.device.type != "cpu":
            return functional.rms_norm(x, x.shape[-1:], weight, eps)
        # torch has no fused form of this on CPUs: through the 2-norm it takes half the kernels.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.constant(eps), length, length, value=1.0 / x.shape[-1]).rsqrt_()
        return x * scale if weight is None else x * scale * weight

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def constant(self, value: float) -> torch.Tensor:
        """A scalar as a tensor, made once."""
        if value not in self.constants:
            self.constants[value] = torch.tensor(value, device=self.device)
        return self.constants[value]

    def rms(self, x: torch.Tensor, floor: float) -> torch.Tensor:
        return x.square().mean(-1, keepdim=True).clamp_min(floor).sqrt()

    def rope(self, x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
        cos, sin = self.rotation(positions, rope)
        half = rope.dim // 2
        if rope.interleaved:
            a, b = x[..., 0 : rope.dim : 2], x[..., 1 : rope.dim : 2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
            return turned if rope.dim == x.shape[-1] else torch.cat((turned, x[..., rope.dim :]), -1)
        a, b = x[..., :half], x[..., half : rope.dim]
        parts = (a * cos - b * sin, b * cos + a * sin)
        return torch.cat(parts if rope.dim == x.shape[-1] else (*parts, x[..., rope.dim :]), -1)

    def rotation(self, positions: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [t, 1, dim / 2] for a pass; computed once for all layers that rotate alike."""
        key = (rope, positions.shape[0])
        if key not in self.rotations:
            if rope not in self.frequencies:
                self.frequencies[rope] = frequencies(rope).to(self.device)
            angles = positions.float()[:, None] * self.frequencies[rope]
            cos, sin, size = angles.cos()[:, None], angles.sin()[:, None], amplitude(rope)
            self.rotations[key] = (cos, sin) if size == 1.0 else (cos * size, sin * size)
        return self.rotations[key]

    def temperature(self, x: torch.Tensor, positions: torch.Tensor, temperature: Temperature) -> torch.Tensor:
        steps = torch.floor((positions.float() + 1.0) / temperature.floor)
        return x * (torch.log1p(steps) * temperature.scale + 1.0)[:, None, None]

    def attention(
        self,
        q: torch.Tensor,
        kv: Keys,
        positions: torch.Tensor,
        scale: float,
        window: int | None,
        chunk: int | None = None,
    ) -> torch.Tensor:
        tokens, heads, dim = q.shape
        grouped = q.view(tokens, kv.k.shape[0], heads // kv.k.shape[0], dim).to(kv.k.dtype)
        if kv.first is None:
            return attended(grouped, kv.k, kv.v, kv.mask, scale)
        origin, out = kv.end - tokens, []
        step = max(1, MASK_BYTES // (4 * kv.k.shape[1] * grouped.shape[2]))
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            seen = max(0, earliest(origin + start, window, chunk) - kv.first)
            last = origin + stop - kv.first
            mask = None
            if stop - start > 1:
                mask = visible(origin + start, stop - start, kv.first + seen, last - seen, window, chunk, q.device)
            out.append(attended(grouped[start:stop], kv.k[:, seen:last], kv.v[:, seen:last], mask, scale))
        return out[0] if len(out) == 1 else torch.cat(out)

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, experts: int, active: int, router: Router
    ) -> torch.Tensor:
        return route(logits, bias, active, router)

    def experts(
        self, x: torch.Tensor, weights: torch.Tensor, gate: Stack, up: Stack, down: Stack, spec: Experts
    ) -> torch.Tensor:
        if self.device.type == "cuda" and x.shape[0] * spec.active <= TOGETHER:
            shares, chosen = weights.topk(spec.active, -1)
            return selected(self, x, chosen, shares, gate, up, down, spec)
        return grouped(self, x, weights, gate, up, down, spec)

    def activation(self, x: torch.Tensor, kind: Activation) -> torch.Tensor:
        return functional.silu(x) if kind == "silu" else functional.gelu(x, approximate="tanh")

    def gaussian_topk(self, x: torch.Tensor, cut: float) -> torch.Tensor:
        variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return functional.relu(x - (mean + cut * variance.sqrt()))

    def tanh(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()

    def reshape(self, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return x.reshape(tuple(shape))

    def slice(self, x: torch.Tensor, axis: int, start: int, stop: int) -> torch.Tensor:
        return x.narrow(axis, start, stop - start)

    def concat(self, xs: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.cat(tuple(xs), axis)

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return x[-1:]


def ops_for(device: torch.device) -> TorchOps:
    """The operators for a device: with fused kernels on CUDA, where Triton is installed."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from edge.engine.cuda_ops import CudaOps

        return CudaOps(device)
    return TorchOps(device)


def earliest(query: int, window: int | None, chunk: int | None) -> int:
    """The first position that a query at ``query`` sees."""
    if window is not None:
        return max(0, query - window + 1)
    return 0 if chunk is None else query // chunk * chunk


def visible(
    first_query: int,
    queries: int,
    first_key: int,
    keys: int,
    window: int | None,
    chunk: int | None,
    device: torch.device,
) -> torch.Tensor:
    """Which keys [queries, keys] a query sees: none after it; with a window only the nearest, itself included; with
    chunks those of its own chunk.
    """
    q = torch.arange(first_query, first_query + queries, device=device)[:, None]
    k = torch.arange(first_key, first_key + keys, device=device)[None, :]
    if window is not None:
        return (k <= q) & (k > q - window)
    return k <= q if chunk is None else (k <= q) & (k >= q // chunk * chunk)


def attended(q: torch.Tensor, k: Stored, v: Stored, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """q [t, kv_heads, group, dim] over k [kv_heads, n, dim] and v -> float32 [t, kv_heads * group * value dim].

    The heads of a group become further queries of their one key head, so keys are never repeated in memory.
    """
    tokens, kv_heads, group, dim = q.shape
    rows = q.permute(1, 2, 0, 3).reshape(kv_heads, group * tokens, dim)
    if mask is not None:
        mask = mask.expand(group, *mask.shape).reshape(group * tokens, -1)
    if isinstance(k, kv_int8.Int8):
        assert isinstance(v, kv_int8.Int8)
        out = kv_int8.attend(rows, k, v, mask, scale, tokens == 1)
    else:
        assert isinstance(v, torch.Tensor)
        out = attend(rows, k, v, mask, scale, tokens == 1)
    return out.view(kv_heads, group, tokens, -1).permute(2, 0, 1, 3).reshape(tokens, -1).float()


def frequencies(rope: Rope) -> torch.Tensor:
    """Angles per position, float32 [dim / 2], from torch's own powers: far into a text their last bit can be seen."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    return torch.from_numpy(scaled((rope.theta**exponents).numpy(), rope))
