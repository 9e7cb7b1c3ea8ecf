"""What only a GPU can show: parity with the CPU, tiers against each other, device memory, time per gather, speed.

    python -m benchmarks.gpu [MODEL...] [--big FOLDER] [--out results.jsonl]

Each MODEL is a small checkpoint for parity, written here when none is given; ``--big`` one whose table is worth
streaming (`edge synth` writes one, `edge pack` packs it), run at several budgets and precisions. Prints a line per
measurement, and appends JSON lines. Exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edge
from edge.engine import device_before
from edge.engine.torch_ple import open_rows
from loaders.checkpoint import Checkpoint
from loaders.network.matformer import full, parts
from loaders.network.tensors import PLE_TABLE

TIERS = ("device", "ram", "ssd")
TOLERANCE = 1e-4
GB = 1e9


class Report:
    """Lines for people, JSON lines for later, and whether every check held."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.failed = out, False
        self.common = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def __call__(self, case: str, ok: bool | None = None, **facts: Any) -> None:
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
        print(f"{case:<28} {'' if ok is None else 'ok  ' if ok else 'FAIL'} {shown}", flush=True)
        self.failed |= ok is False
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(json.dumps({"case": case, "ok": ok, **facts, **self.common}) + "\n")


def parity(report: Report, model: Path) -> None:
    """CPU against CUDA in float32: prefill, token by token past the window, greedy continuation, every tier."""
    with edge.load(model, precision="float32") as session:
        ids = np.random.default_rng(0).integers(4, session.model.vocab, 400)
        reference = session.logits(ids)
        story = [event.token for event in session.generate(ids[:9], max_tokens=60)]
        tiers = TIERS if session.model.ple else ("auto",)
    largest = float(np.abs(reference).max())
    outputs = {}
    for tier in tiers:
        with edge.load(model, precision="float32", device="cuda", ple=tier) as session:
            outputs[tier] = session.logits(ids)
            error = float(np.abs(outputs[tier] - reference).max()) / largest
            session.step(ids[:200])
            steps = max(float(np.abs(session.step(ids[i : i + 1]) - reference[i]).max()) for i in range(200, 400))
            same = story == [event.token for event in session.generate(ids[:9], max_tokens=60)]
        report(
            f"parity {model.name} {tier}",
            error <= TOLERANCE and steps / largest <= TOLERANCE and same,
            prefill=error,
            stepwise=steps / largest,
            greedy_equal=same,
        )
    if len(tiers) > 1:
        report("tiers give equal logits", all(np.array_equal(outputs["ram"], outputs[t]) for t in tiers))


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """(median, worst) microseconds of a call, device time included."""
    for _ in range(10):
        run()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e6)
    return statistics.median(found), max(found)


def kernel_time(run: Callable[[], Any], repeats: int) -> float:
    """Microseconds per call of device work alone, back to back."""
    for _ in range(10):
        run()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            run()
    graph.replay()
    start.record()
    for _ in range(repeats):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3 / repeats / 20


def gathers(report: Report, folder: Path) -> None:
    """One row, and a batch, from each tier; rows of all tiers bit for bit."""
    device = torch.device("cuda")
    with_rows: dict[str, torch.Tensor] = {}
    rng = np.random.default_rng(1)
    for tier in TIERS:
        checkpoint = Checkpoint.open(folder)
        part = parts(checkpoint.model, full(checkpoint.model))[PLE_TABLE]
        rows = open_rows(checkpoint, part, len(checkpoint.model.layers), tier, 64 << 20, device)
        count = checkpoint.where[PLE_TABLE].shape[0]
        batch = np.concatenate([rng.integers(0, count, 254), [0, count - 1]]) if not with_rows else batch  # noqa: F821
        with_rows[tier] = rows.gather(batch)
        fresh = iter(rng.integers(0, count, 100_000))
        one, worst = timed(lambda fresh=fresh, rows=rows: rows.gather(np.array([next(fresh)])), 300)
        many, _ = timed(lambda fresh=fresh, rows=rows: rows.gather(np.array([next(fresh) for _ in range(256)])), 50)
        facts: dict[str, Any] = {
            "row_bytes": part.window.shape[1] * 2,
            "one_us": one,
            "one_worst_us": worst,
            "batch256_us": many,
        }
        if tier != "ssd":
            ids = torch.randint(0, count, (1,), device=device)
            lookup = rows.kernel if tier == "ram" else lambda i, t=rows.table: t.index_select(0, i)
            facts["kernel_us"] = kernel_time(lambda lookup=lookup, ids=ids: lookup(ids), 50)
        report(f"gather {tier}", bool(torch.equal(with_rows[tier], with_rows["device"])), **facts)
        rows.close()
        checkpoint.close()
        del rows
        free()


def free() -> None:
    """Gives back to the device what torch keeps for later."""
    gc.collect()
    torch.cuda.empty_cache()


def copy_bandwidth() -> float:
    """Bytes per second the device reads in a plain reduction: the wall for decoding."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    for _ in range(3):
        data.sum()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        data.sum()
    torch.cuda.synchronize()
    return 10 * data.nbytes / (time.perf_counter() - start)


def speed(report: Report, folder: Path) -> float:
    """Device memory with and without the table, and tokens per second, recorded and launched one by one.

    Returns the bytes per second that the device reads.
    """
    wall = copy_bandwidth()
    free()
    report("device read bandwidth", None, gbps=wall / GB)
    ids = np.random.default_rng(2).integers(4, 200_000, 2048)
    for tier in TIERS:
        with edge.load(folder, device="cuda", precision="bf16", ple=tier, context=4096) as session:
            start = time.perf_counter()
            session.step(ids)
            torch.cuda.synchronize()
            cold = time.perf_counter() - start
            session.reset()
            start = time.perf_counter()
            out = session.step(ids)
            prefill = time.perf_counter() - start
            rates = {}
            for name, graphs in (("graph", True), ("eager", False)):
                session.engine.graphs = graphs
                for _ in range(8):
                    out = session.step([int(out.argmax())])
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(100):
                    token = int(out.argmax())
                    session.prefetch(token)
                    out = session.step([token])
                rates[name] = 100 / (time.perf_counter() - start)
            memory, plan = session.memory(), session.plan
            peak = memory["device_peak_bytes"]
            report(
                f"run {tier}",
                None,
                planned_device=plan.total_bytes / GB, peak_device=peak / GB,
                off=(peak - plan.total_bytes) / plan.total_bytes,
                context_bytes=plan.bytes["runtime"] / GB, weights=plan.bytes["weights"] / GB,
                load_s=session.load_s, prefill2048_tps=2048 / prefill, prefill_cold_tps=2048 / cold,
                decode_graph_tps=rates["graph"], decode_eager_tps=rates["eager"],
                of_bandwidth=rates["graph"] * session.bytes_per_token / wall,
                ple_wait_ms=session.ple.wait_s * 1e3 if session.ple else 0.0,
            )  # fmt: skip
        free()
    return wall


def kernels(report: Report, folder: Path) -> None:
    """Which kernels a decoded token launches: how many, and what they take."""
    from torch.profiler import ProfilerActivity, profile

    with edge.load(folder, device="cuda", precision="bf16", context=1024) as session:
        session.step(list(range(4, 304)))
        session.engine.graphs = False
        session.step([5])
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
            session.step([6])
        # Operators are listed beside the kernels they launch, with the same time: count the kernels alone.
        rows = [e for e in trace.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        rows.sort(key=lambda e: -e.self_device_time_total)
        launches = sum(e.count for e in rows)
        total = sum(e.self_device_time_total for e in rows)
        report("kernels of one token", None, launches=launches, busy_us=float(total))
        for e in rows[:14]:
            print(f"    {e.count:5d} x {e.self_device_time_total / e.count:8.2f} us  {e.key[:90]}")


def main() -> int:
    """Everything; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="*")
    parser.add_argument("--big", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here")
    from benchmarks.gpu_budgets import budgets
    from benchmarks.gpu_packs import parities, write_small

    # Before anything here has a context on the device: it counts as edge's own.
    device_before()
    report = Report(options.out)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("EDGE_CACHE", f"{folder}/cache")
        models = options.model or write_small(Path(folder))
        for model in models:
            parity(report, model)
        parities(report, models)
        if options.big is not None:
            gathers(report, options.big)
            wall = speed(report, options.big)
            kernels(report, options.big)
            budgets(report, options.big, wall)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
