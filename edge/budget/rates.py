"""How fast an engine decodes on this machine, measured once through the engine itself: the planner's tokens a second.

A decoded token reads every weight once, and all keys and values. How near an engine comes to what a plain read of
memory reaches depends on the format, the engine and the processor; what it does beside reading, on the layers.
``python -m edge.budget.rates ENGINE DEVICE [THREADS]`` measures that and prints it as one line of JSON.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from edge.budget import machine
from edge.budget.decoding import KVRate, Rates, usual
from edge.engine.threads import thread_count
from edge.store.cache import recall, remember
from loaders.errors import EdgeError, Unsupported

# No measurement takes as long; and no engine as long for a step, a byte or a product, in seconds.
PATIENCE, SLOWEST = 180.0, 10.0
# Rates of a machine that others used so much are not remembered beyond this process.
STEADY = 0.6
_unsteady: dict[str, Rates] = {}


@dataclass(frozen=True)
class Timed:
    """What a decoded token took: ``seconds``, for what it read of each format, its steps and attention.

    ``tokens`` is 1, or 0 for the difference of two tokens; ``more``: steps that the kind of cache makes slower.
    """

    seconds: float
    weights: Mapping[str, int] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 1
    kv: str = ""
    kv_bytes: int = 0
    products: int = 0
    more: int = 0

    @property
    def amounts(self) -> dict[tuple[str, str], float]:
        """What the time is made of, by what each part is proportional to."""
        found = {("weights", name): float(count) for name, count in self.weights.items()}
        found |= {("step", ""): float(self.steps), ("token", ""): float(self.tokens)}
        found |= {("byte", self.kv): float(self.kv_bytes), ("product", self.kv): float(self.products)}
        return found | {("more", self.kv): float(self.more)}


def fit(timed: Sequence[Timed], bandwidth: float) -> Rates:
    """The rates that explain the timings best, each timing as important as the others. None is below zero."""
    columns = sorted({key for one in timed for key, amount in one.amounts.items() if amount})
    rows = np.array([[one.amounts.get(key, 0.0) / one.seconds for key in columns] for one in timed])
    found = dict(zip(columns, nonnegative(rows, np.ones(len(timed))), strict=True))
    # What has read faster than memory seemed to read has shown how fast memory is.
    bandwidth = max([bandwidth, *(sum(one.weights.values()) / one.seconds for one in timed)])
    shares = {name: min(1.0, 1 / (x * bandwidth)) for (what, name), x in found.items() if what == "weights" and x > 0}
    kinds = sorted({name for what, name in columns if what in ("byte", "product", "more")})
    kv = {name: KVRate(*(found.get((what, name), 0.0) for what in ("byte", "product", "more"))) for name in kinds}
    return Rates(shares, found.get(("step", ""), 0.0), found.get(("token", ""), 0.0), kv, bandwidth)


def nonnegative(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares of ``rows @ x = wanted`` without an x below zero: whatever would be is left out, one by one."""
    scale = np.abs(rows).max(0)
    scale[scale == 0] = 1.0
    kept, x = list(range(rows.shape[1])), np.zeros(rows.shape[1])
    while kept:
        found = np.linalg.lstsq(rows[:, kept] / scale[kept], wanted, rcond=None)[0]
        if found.min() >= 0:
            x[kept] = found / scale[kept]
            break
        kept.pop(int(found.argmin()))
    return x


def key(engine: str, device: str, threads: int | None) -> str:
    """What rates depend on besides the machine."""
    return f"rates of {machine.key(engine, device)}, {threads or thread_count()} threads"


def known(engine: str, device: str, threads: int | None = None) -> Rates | None:
    """What was measured before, if it was; takes no time."""
    name = key(engine, device, threads)
    return parsed(recall(machine.FILE).get(name)) or _unsteady.get(name)


def expected(engine: str, device: str, threads: int | None = None) -> Rates | None:
    """What was measured before, else what is usual; None for a GPU that was never measured."""
    return known(engine, device, threads) or usual(engine, device)


def measured(engine: str, device: str, threads: int | None = None) -> Rates:
    """What was measured before, or is now, in a few seconds and a process of its own.

    Raises Unsupported for an engine that cannot be measured, and what starting it raises.
    """
    found = known(engine, device, threads)
    if found is not None:
        return found
    asked = (engine, device, *([str(threads)] if threads else []))
    try:
        answer, words = machine.answered("edge.budget.rates", *asked, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise Unsupported(f"the {engine} engine took more than {PATIENCE:.0f} s to measure", field="--engine") from None
    found = parsed(answer)
    if found is None:
        raise Unsupported(f"how fast the {engine} engine is cannot be measured", field="--engine", hint=words)
    if found.steady >= STEADY:
        remember(machine.FILE, key(engine, device, threads), found.as_dict())
    else:
        _unsteady[key(engine, device, threads)] = found
    if device == "cpu":
        machine.raise_bandwidth(threads or thread_count(), found.bandwidth)
    return found


def parsed(value: Any) -> Rates | None:
    """Remembered rates, unless somebody wrote nonsense there."""
    if not isinstance(value, dict):
        return None
    shares, kinds = value.get("shares"), value.get("kv")
    if not isinstance(shares, dict) or not isinstance(kinds, dict) or not shares:
        return None
    parts = [field.name for field in fields(KVRate)]
    if not all(isinstance(rate, dict) and sorted(rate) == sorted(parts) for rate in kinds.values()):
        return None
    kv = {name: [within(rate[part], SLOWEST) for part in parts] for name, rate in kinds.items()}
    found = {name: within(share, 1.0) for name, share in shares.items()}
    once = [within(value.get(name), SLOWEST) for name in ("step_s", "token_s")]
    bandwidth = within(value.get("bandwidth"), machine.MOST_BANDWIDTH)
    steady = within(value.get("steady"), 1.0)
    numbers = [bandwidth, steady, *once, *found.values(), *(x for each in kv.values() for x in each)]
    if any(number is None for number in numbers) or not bandwidth or not all(found.values()):
        return None
    good: Any = (found, *once, {name: KVRate(*map(float, each)) for name, each in kv.items()}, bandwidth, steady)  # type: ignore[arg-type]
    return Rates(*good)


def within(value: Any, most: float) -> float | None:
    """A number from 0 to ``most``, or None."""
    good = type(value) in (int, float) and math.isfinite(value) and 0 <= value <= most
    return float(value) if good else None


def main() -> None:
    """Measures, and prints."""
    from edge.budget.rates_timed import measure

    engine, device, *count = sys.argv[1:]
    try:
        print(json.dumps(measure(engine, device, int(count[0]) if count else None).as_dict()))
    except EdgeError as error:
        print(json.dumps(machine.reported(error)))


if __name__ == "__main__":
    main()
