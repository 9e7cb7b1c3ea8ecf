"""edge beside transformers on one checkpoint and CPU, in one run: memory, prefill, decode, the machine's own limit.

    python -m benchmarks.run MODEL [--prompt 512] [--new 32] [--precision bf16] [--out results.jsonl] [--no-peer]

Every case runs in a process of its own, which reads its peak memory from inside. Ratios are against transformers in the
same run; absolute figures do not travel between machines.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

CASES: dict[str, dict[str, str]] = {
    "edge ram": {"ple": "ram"},
    "edge ssd": {"ple": "ssd"},
    "edge half, ssd": {"ple": "ssd", "slice": "half"},
    "edge": {},
}
PEER = "transformers"


def prompt_of(vocab: int, tokens: int) -> np.ndarray:
    """The same random ids for everybody."""
    return np.random.default_rng(0).integers(4, vocab, tokens)


def run_edge(options: argparse.Namespace, flags: dict[str, str]) -> dict[str, Any]:
    """One case in this process."""
    import edge

    context = options.prompt + options.new + 8
    with edge.load(options.model, precision=options.precision, context=context, **flags) as session:
        ids = prompt_of(session.model.vocab, options.prompt)
        start = time.perf_counter()
        out = session.step(ids)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(options.new):
            token = int(out.argmax())
            session.prefetch(token)
            out = session.step([token])
        decode = time.perf_counter() - start
        memory, ple = session.memory(), session.ple
        return {
            "load_s": session.load_s,
            "prefill_tps": options.prompt / prefill,
            "decode_tps": options.new / decode,
            "bytes_per_token": session.bytes_per_token,
            "peak_bytes": memory["peak_bytes"],
            "planned_bytes": memory["planned_bytes"],
            "ple_bytes_read": ple.bytes_read if ple else 0,
            "ple_wait_s": ple.wait_s if ple else 0.0,
        }


def run_peer(options: argparse.Namespace) -> dict[str, Any]:
    """transformers with its own cache, same ids, same precision."""
    import torch
    from transformers import AutoModelForCausalLM

    from edge.budget.memory import tree_peak

    dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[options.precision]
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    loaded = time.perf_counter() - start
    ids = torch.from_numpy(prompt_of(model.config.get_text_config().vocab_size, options.prompt))[None]
    with torch.inference_mode():
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(options.new):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        decode = time.perf_counter() - start
    return {
        "load_s": loaded,
        "prefill_tps": options.prompt / prefill,
        "decode_tps": options.new / decode,
        "peak_bytes": tree_peak(),
    }


def read_bandwidth() -> float:
    """Bytes per second a plain sum reads with every core: the wall for decoding."""
    import torch

    data = torch.ones(1 << 26)
    data.sum()
    start = time.perf_counter()
    for _ in range(5):
        data.sum()
    return 5 * data.nbytes / (time.perf_counter() - start)


def child(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """A case in a fresh process."""
    args = [sys.executable, "-m", "benchmarks.run", str(options.model), "--child", case]
    args += ["--prompt", str(options.prompt), "--new", str(options.new), "--precision", options.precision]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{case}: exit {done.returncode}: {done.stderr.strip()[-400:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cases_for(options: argparse.Namespace) -> list[str]:
    """Tiers and slices where the model has per-layer embeddings, else the model as it is."""
    from loaders.checkpoint import Checkpoint

    model = Checkpoint.open(options.model).model
    return ["edge"] if model.ple is None else [name for name in CASES if name != "edge"]


def main() -> None:
    """Runs every case, prints a table, appends JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--precision", choices=("bf16", "float32", "int8", "int4"), default="bf16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_peer(options) if options.child == PEER else run_edge(options, CASES[options.child])))
        return
    wall = read_bandwidth()
    cases = [] if options.no_peer else [PEER]
    results = {case: child(options, case) for case in cases + cases_for(options)}
    peer = results.get(PEER)
    what = f"{options.model.name}, {options.precision}, {options.prompt} + {options.new} tokens"
    print(f"{what}; memory reads {wall / 1e9:.1f} GB/s")
    heads = ("peak MB", "of plan", "pp tok/s", "x peer", "tg tok/s", "x peer", "of wall")
    print(f"{'case':<16}" + "".join(f"{head:>9}" for head in heads))
    for case, r in results.items():
        plan = f"{r['peak_bytes'] / r['planned_bytes']:.0%}" if "planned_bytes" in r else "-"
        ratios = [r[k] / peer[k] if peer else float("nan") for k in ("prefill_tps", "decode_tps")]
        used = f"{r['decode_tps'] * r['bytes_per_token'] / wall:.0%}" if "bytes_per_token" in r else "-"
        cells = (f"{r['peak_bytes'] / 1e6:.0f}", plan, f"{r['prefill_tps']:.1f}", f"{ratios[0]:.2f}")
        cells += (f"{r['decode_tps']:.2f}", f"{ratios[1]:.2f}", used)
        print(f"{case:<16}" + "".join(f"{cell:>9}" for cell in cells))
        if options.out is not None:
            facts = {
                "case": case,
                "model": options.model.name,
                "precision": options.precision,
                "prompt": options.prompt,
            }
            facts |= {
                "new": options.new,
                "read_gbps": wall / 1e9,
                "machine": platform.processor() or platform.machine(),
                **r,
            }
            with options.out.open("a") as file:
                file.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
