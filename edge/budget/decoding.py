"""From what a decoded token reads to the seconds it takes: the arithmetic behind the planner's tokens a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edge.budget.disk import DiskSpeed

# What is taken for a format that was not measured: of those that were, the nearest in bytes.
NEAREST = {"float16": ("bf16", "float32"), "bf16": ("float16", "float32"), "int4": ("int8",), "int8": ("int4",)}


@dataclass(frozen=True)
class KVRate:
    """Seconds a byte of keys and values that is read, a product with it, and a step of a pass beyond bf16's."""

    byte_s: float = 0.0
    product_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True)
class Rates:
    """``shares``: format -> the part of the read bandwidth that streaming weights reaches, up to 1. ``step_s`` and
    ``token_s``: seconds beside that for each operation of a pass, and once. ``kv``: kind -> what attending over a cache
    takes. ``bandwidth``: bytes per second that memory, of a GPU its own, read beside the engine; 0: not measured.
    ``steady``: the part of it that memory mostly read; where that is little, others used the machine.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    step_s: float = 0.0
    token_s: float = 0.0
    kv: Mapping[str, KVRate] = field(default_factory=dict)
    bandwidth: float = 0.0
    steady: float = 1.0

    def seconds(
        self,
        by_format: Mapping[str, int],
        steps: int,
        kv_bytes: int,
        bandwidth: float,
        kv: str = "bf16",
        products: int = 0,
    ) -> float:
        """Of a decoded token that reads so many bytes of weights and of keys and values; never less than 0.

        ``bandwidth``: bytes per second, where none was measured beside the engine: shares are of that.
        """
        bandwidth = self.bandwidth or bandwidth
        streaming = sum(count / (self.share(name) * bandwidth) for name, count in by_format.items())
        rate = self.kv.get(kv) or self.kv.get("bf16") or KVRate(1 / (USUAL_KV.get(kv, USUAL_KV["bf16"]) * bandwidth))
        # However fast the caches of a processor were: no faster than memory.
        attending = max(kv_bytes * rate.byte_s + products * rate.product_s, kv_bytes / bandwidth)
        return streaming + attending + steps * (self.step_s + rate.step_s) + self.token_s

    def share(self, name: str) -> float:
        """Of a format, or of the nearest that was measured."""
        known = (self.shares[near] for near in (name, *NEAREST.get(name, ())) if near in self.shares)
        return next(known, USUAL_SHARE)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as :func:`parsed` reads it."""
        return asdict(self)


# What is likely where nothing was measured: an engine that streams nearly as fast as memory reads.
USUAL_SHARE, USUAL_KV = 0.9, {"bf16": 0.5, "int8": 0.2, "float32": 0.6}
USUAL = {
    "native": Rates({"int4": 0.8, "int8": 0.88, "bf16": 0.92, "float32": 0.92}, 1e-6, 3e-5),
    "torch": Rates({"int4": 0.02, "int8": 0.15, "bf16": 0.3, "float32": 0.8}, 3e-5, 3e-4),
    "ort": Rates({"int4": 0.6, "int8": 0.6, "float16": 0.5, "float32": 0.85}, 5e-6, 3e-4),
}


def usual(engine: str, device: str) -> Rates | None:
    """What to expect before anything was measured; None for a GPU, of which nothing is known then."""
    return USUAL.get(engine, USUAL["native"]) if device in ("cpu", "auto") else None


def row_seconds(row: int, disk: DiskSpeed | None) -> float:
    """Until a table's row of so many bytes has come from a disk. No engine hides that.

    The read starts when a token has been chosen, and all that is computed next begins with the row. Between two
    sizes that were measured time grows with bytes.
    """
    if disk is None or row <= 0:
        return 0.0
    (small, fast), (large, slow) = ((4096, disk.one_4k.p50_s), (18 << 10, disk.one_18k.p50_s))
    slope = max(0.0, slow - fast) / (large - small)
    return max(0.0, fast + max(0, row - small) * slope)
