"""One checkpoint or pack under a sweep of budgets: the plan, the peak against it, tokens per second, bytes per second.

    python -m benchmarks.budgets MODEL [--budgets 1.5GB,2GB,3GB] [--prompt 256] [--new 16] [--boxed] [--out FILE]

Every budget is a process of its own, which reads its peak inside. With --boxed the run is repeated in a memory control
group whose hard limit is the budget, without swap, the pack not in the page cache: the same tokens must come out.
Exits with 1 when a peak is above its budget, or the box changes anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge.budget.machine import measured_bandwidth
from edge.budget.units import format_bytes, parse_bytes
from edge.profile import box as boxed
from loaders.errors import WontFit

REFUSED = 80


def run_here(options: argparse.Namespace) -> dict[str, Any]:
    """One budget in this process: packs if need be, prefills, decodes."""
    import edge

    start = time.perf_counter()
    with edge.load(options.model, budget=options.child, device="cpu") as session:
        loaded = time.perf_counter() - start
        ids = np.random.default_rng(0).integers(4, session.model.vocab, options.prompt)
        start = time.perf_counter()
        out, tokens = session.step(ids), []
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(options.new):
            tokens.append(int(out.argmax()))
            session.prefetch(tokens[-1])
            out = session.step(tokens[-1:])
        decode_tps = options.new / (time.perf_counter() - start)
        memory, ple, plan = session.memory(), session.ple, session.plan
        return {
            "label": plan.label(), "slice": plan.slice, "precision": plan.precision, "head": plan.recipe.head,
            "ple": plan.ple, "context": plan.context, "quality": plan.quality.score, "origin": plan.quality.origin,
            "planned": plan.bytes, "components": memory["components"], "anonymous_bytes": memory["anonymous_bytes"],
            "planned_bytes": memory["planned_bytes"], "peak_bytes": memory["peak_bytes"], "load_s": loaded,
            "prefill_tps": options.prompt / prefill, "decode_tps": decode_tps,
            "bytes_per_token": session.bytes_per_token, "read_gbps": decode_tps * session.bytes_per_token / 1e9,
            "ple_bytes_read": ple.bytes_read if ple else 0, "ple_wait_s": ple.wait_s if ple else 0.0,
            "tokens": tokens,
        }  # fmt: skip


def child(options: argparse.Namespace, budget: int) -> list[str]:
    """The command of one run."""
    line = [sys.executable, "-m", "benchmarks.budgets", str(options.model), "--child", str(budget)]
    return [*line, "--prompt", str(options.prompt), "--new", str(options.new)]


def case(options: argparse.Namespace, text: str) -> dict[str, Any]:
    """One budget: what it came to, and in a box too if asked."""
    budget = parse_bytes(text)
    done = subprocess.run(child(options, budget), capture_output=True, text=True, check=False)
    if done.returncode == REFUSED:
        return {"budget_bytes": budget, **json.loads(done.stdout.splitlines()[-1])}
    if done.returncode:
        raise SystemExit(f"{text}: exit {done.returncode}: {done.stderr.strip()[-600:]}")
    found: dict[str, Any] = {"budget_bytes": budget, **json.loads(done.stdout.splitlines()[-1])}
    found["kept"] = found["peak_bytes"] <= budget
    if options.boxed:
        found["boxed"] = in_a_box(options, budget, found["tokens"])
    return found


def in_a_box(options: argparse.Namespace, budget: int, tokens: list[int]) -> dict[str, Any]:
    """The same run with a hard limit of the budget and a cold cache."""
    for folder in (options.model, Path(os.environ.get("EDGE_CACHE", "")) / "packs"):
        if folder.is_dir():
            for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
                boxed.drop_from_page_cache(path)
    done = boxed.run(child(options, budget), budget, timeout=1800)
    found = json.loads(done.stdout.splitlines()[-1]) if done.rc == 0 else {}
    same = found.get("tokens") == tokens
    facts = {"rc": done.rc, "oom_kills": done.oom_kills, "refaults": done.refaults, "same_tokens": same}
    return facts | {key: found.get(key) for key in ("prefill_tps", "decode_tps", "load_s")}


def line(text: str, r: dict[str, Any]) -> str:
    """One row for people."""
    if "needed_bytes" in r:
        return f"{text:>7}  refused: {r['refusal']}"
    box = ""
    if "boxed" in r:
        b = r["boxed"]
        box = f", in a box of that size {'the same tokens' if b['same_tokens'] else 'FAILED'}"
        box += f" at {b['decode_tps']:.2f} tokens/s" if b["decode_tps"] else f" (exit {b['rc']})"
    return (
        f"{text:>7}  {r['label']}: peak {format_bytes(r['peak_bytes'])}, {r['peak_bytes'] / r['planned_bytes']:.1%} of "
        f"the plan; load {r['load_s']:.1f} s, prefill {r['prefill_tps']:.1f}, decode {r['decode_tps']:.2f} tokens/s "
        f"reading {r['read_gbps']:.1f} GB/s{box}"
    )


def main() -> int:
    """Runs every budget, prints a row each, appends JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--budgets", default="1.5GB,2GB,3GB")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--boxed", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        try:
            print(json.dumps(run_here(options)))
        except WontFit as error:
            print(json.dumps({"needed_bytes": error.needed, "refusal": str(error)}))
            return REFUSED
        return 0
    failed = False
    for text in options.budgets.split(","):
        wall = measured_bandwidth() / 1e9
        r = case(options, text)
        print(line(text, r) + f"; memory reads {wall:.1f} GB/s", flush=True)
        failed |= not r.get("kept", True) or not r.get("boxed", {"same_tokens": True})["same_tokens"]
        if options.out is not None:
            facts = {"model": options.model.name, "budget": text, "prompt": options.prompt, "new": options.new}
            r.pop("tokens", None)
            with options.out.open("a") as file:
                machine = platform.processor() or platform.machine()
                file.write(json.dumps({**facts, "memory_gbps": wall, "machine": machine, **r}) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
