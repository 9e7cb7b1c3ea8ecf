"""What a GPU run takes beside what it planned: every budget and precision in a process of its own.

    python -m benchmarks.gpu_budgets MODEL [--out results.jsonl]

MODEL is a checkpoint, packed before or now. While a run goes on the whole device is read every few milliseconds, from
outside: the most seen, less what was in use before, is held against the budget, the CUDA context included. Exits with 1
when a run passes its budget or is more than 5% from its plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from edge.budget.nvml import device_used
from edge.budget.units import parse_bytes
from loaders.errors import WontFit

GB = 1e9
CLOSE = 0.05
PREFILL, DECODE = 2048, 100
# (name, --budget, --ram-budget, --precision)
LEAST = "least that fits"
CASES: tuple[tuple[str, str, str | None, str], ...] = (
    *((f"budget {size}", size, None, "auto") for size in ("2GB", "3GB", "4GB", "6GB")),
    *((f"{precision}", "8GB", None, precision) for precision in ("int4", "int8", "bf16")),
    ("budget 4GB, RAM 3GB", "4GB", "3GB", "auto"),
)


class Sampler(threading.Thread):
    """The most that was in use on the device while it ran."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended = 0, threading.Event()

    def run(self) -> None:
        """Until ``ended`` is set."""
        while not self.ended.wait(0.004):
            self.peak = max(self.peak, device_used() or 0)


def one(model: Path, budget: str, ram: str | None, precision: str) -> dict[str, Any]:
    """A run in this process: a long prefill, decoding, then to the very end of the context."""
    import torch

    import edge

    try:
        session = edge.load(model, budget=budget, ram_budget=ram, precision=precision, device="cuda")
    except WontFit as error:
        return {"plan": None, "needed": error.needed, "text": str(error)}
    with session:
        outside = (session.runtime.device_delta() or 0) - torch.cuda.memory_reserved()
        loaded, context = torch.cuda.memory_allocated(), session.plan.context
        ids = np.random.default_rng(2).integers(4, session.model.vocab, context)
        part = ids[: min(PREFILL, context - DECODE - 20)]
        rates = []
        for _ in range(2):
            session.reset()
            start = time.perf_counter()
            out = session.step(part)
            rates.append(len(part) / (time.perf_counter() - start))
        for i in range(DECODE + 8):
            start = time.perf_counter() if i == 8 else start
            token = int(out.argmax())
            session.prefetch(token)
            out = session.step([token])
        decode = DECODE / (time.perf_counter() - start)
        session.reset()
        session.step(ids[:-4])
        for token in ids[-4:]:
            session.step([token])
        memory, plan = session.memory(), session.plan
        return {
            "plan": plan.as_dict(), "floor": session.floor.device, "floor_host": session.floor.host,
            "peak": memory["device_peak_bytes"], "peak_host": memory["peak_bytes"], "rss": memory["rss_bytes"],
            "drivers": (session.runtime.device_delta() or 0) - torch.cuda.memory_reserved() - outside,
            "activations": torch.cuda.max_memory_allocated() - loaded, "loaded": loaded,
            "reserved": torch.cuda.max_memory_reserved(),
            "load_s": session.load_s, "prefill_tokens": len(part), "prefill_cold_tps": rates[0],
            "prefill_tps": rates[1], "decode_tps": decode, "bytes_per_token": session.bytes_per_token,
        }  # fmt: skip


def apart(line: list[str]) -> tuple[dict[str, Any], int]:
    """A case in a process of its own: what it says, and the device-wide growth seen from here."""
    before, sampler = device_used() or 0, Sampler()
    sampler.start()
    done = subprocess.run([sys.executable, "-m", *line], capture_output=True, text=True, check=False)
    sampler.ended.set()
    sampler.join()
    if done.returncode:
        return {"error": (done.stderr.strip() or "no message")[-2500:]}, sampler.peak - before
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found, sampler.peak - before


def budgets(report: Any, model: Path, wall: float) -> None:
    """Every case, held against its budget and its plan; ``wall``: bytes per second that the device reads."""
    planned, _ = apart(["edge", "plan", str(model), "--device", "cuda", "--budget", "3GB", "--json"])
    cases = deque(CASES)
    while cases:
        name, budget, ram, precision = cases.popleft()
        arguments = [budget, ram or "-", precision]
        found, peak = apart(["benchmarks.gpu_budgets", str(model), "--case", *arguments])
        if found.get("plan") is None:
            facts = {k: found[k] for k in ("needed", "error", "text") if k in found}
            # Refused before anything was loaded: that, too, keeps the budget.
            ok = "needed" in found and found["needed"] > parse_bytes(budget) >= peak
            report(name, ok, budget=parse_bytes(budget), peak_device=peak / GB, **facts)
            if "needed" in found:
                cases.appendleft((LEAST, str(found["needed"]), ram, precision))
            continue
        plan, peak = found["plan"], max(peak, found["peak"])
        total, host = plan["total_bytes"], plan["host_total_bytes"]
        off = (peak - total) / total
        ok = peak <= parse_bytes(budget) and abs(off) <= CLOSE
        ok = ok and (ram is None or found["peak_host"] <= parse_bytes(ram))
        report(
            name, ok, budget=parse_bytes(budget), slice=plan["slice"], precision=plan["precision"], head=plan["head"],
            ple=plan["ple"], context=plan["context"], chunk=plan["chunk"],
            planned_device=total / GB, peak_device=peak / GB, off=off,
            planned_host=host / GB, peak_host=found["peak_host"] / GB, host_off=(found["peak_host"] - host) / host,
            decode_tps=found["decode_tps"], prefill_tokens=found["prefill_tokens"], prefill_tps=found["prefill_tps"],
            read_gbps=found["decode_tps"] * found["bytes_per_token"] / GB,
            of_bandwidth=found["decode_tps"] * found["bytes_per_token"] / wall, wall_gbps=wall / GB,
            load_s=found["load_s"], prefill_cold_tps=found["prefill_cold_tps"], bytes=plan["bytes"],
            host_bytes=plan["host_bytes"],
            **{k: found[k] for k in ("floor", "floor_host", "drivers", "activations", "loaded", "reserved", "rss")},
        )  # fmt: skip
        if name == "budget 3GB":
            same = (planned.get("plan") or {}).get("total_bytes") == total
            cases.append(("no more than planned", str(total), None, "auto"))
            report("edge plan says what runs", same, planned=(planned.get("plan") or planned).get("total_bytes"))


def main() -> int:
    """Everything, or one case in this process; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        budget, ram, precision = options.case
        print(json.dumps(one(options.model, budget, None if ram == "-" else ram, precision)))
        return 0
    from benchmarks.gpu import Report, copy_bandwidth, free

    report = Report(options.out)
    wall = copy_bandwidth()
    free()
    budgets(report, options.model, wall)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
