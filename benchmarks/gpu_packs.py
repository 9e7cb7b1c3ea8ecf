"""Quantized weights on a GPU against the same pack on the CPU, and against its dequantized matrices in float32.

    python -m benchmarks.gpu_packs [--out results.jsonl]

Small models with every mechanism of their originals and random weights, written to a temporary folder. Products of up
to eight tokens are float32 on both sides and must agree as float32 does; longer prefills multiply in bfloat16. Exits
with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

import edge
from benchmarks.gpu import TIERS, TOLERANCE, Report
from edge.engine.torch_blocks import Blocks
from edge.engine.torch_ple import from_records
from edge.session import Session
from loaders.formats.quant import BITS, quantize_rows
from loaders.formats.synthetic import write_random
from tests.shrink import real, shrink

SMALL = ("gemma-3n-E2B", "llama-3.2-1B", "qwen3-0.6B")
# As in the real model no matrix is narrower than a block; unlike there, some end inside one.
WIDER = {"hidden_size_per_layer_input": 36, "laurel_rank": 40}
# Prefills multiply in bfloat16. Random models amplify that (small Gemma 3n to a third of the largest logit), so the
# measure is the same rounding done on the CPU.
ROUNDED = 1.5
TOKENS, CHUNK, GREEDY = 300, 8, 60


def write_small(folder: Path) -> list[Path]:
    """Small checkpoints with random weights, one of each published shape."""
    made = []
    for name in SMALL:
        config, raw = folder / f"{name}.json", shrink(real(name))
        text = raw.get("text_config", raw)
        text.update({key: value for key, value in WIDER.items() if key in text})
        config.write_text(json.dumps(raw))
        write_random(config, folder / name, seed=3)
        made.append(folder / name)
    return made


def dense(weight: torch.Tensor | Blocks) -> torch.Tensor:
    """A weight as the float32 matrix it stands for."""
    return weight.dequantize() if isinstance(weight, Blocks) else weight.float()


def rounded(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A product as prefills on a GPU do it: vectors, matrix and result in bfloat16, sums in float32."""
    return functional.linear(x.bfloat16().float(), weight.bfloat16().float()).bfloat16().float()


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, as a share of the largest value; infinite where something is not finite."""
    value = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    return value if np.isfinite(value) else float("inf")


def in_chunks(session: Session, ids: np.ndarray, size: int) -> np.ndarray:
    """Logits after every ``size`` tokens, fed chunk by chunk."""
    session.reset()
    return np.stack([session.step(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)])


def greedy(session: Session, ids: np.ndarray) -> list[int]:
    """Tokens that follow eight."""
    return [event.token for event in session.generate(ids[:CHUNK].tolist(), max_tokens=GREEDY)]


def parity(report: Report, model: Path, precision: str) -> None:
    """One model at one precision: prefill, chunks, the recorded step, every tier; greedy tokens alike in all tiers."""
    with edge.load(model, precision=precision, kv="float32") as session:
        ids = np.random.default_rng(0).integers(4, session.model.vocab, TOKENS)
        on_cpu, story = session.logits(ids), greedy(session, ids)
        session.engine.weights = {name: dense(w) for name, w in session.engine.weights.items()}
        wanted = session.logits(ids)
        session.engine.ops.linear = rounded
        allowed = ROUNDED * error(session.logits(ids), wanted)
        tiers = TIERS if session.model.ple else ("auto",)
    stories, outputs = [], []
    for tier in tiers:
        with edge.load(model, precision=precision, kv="float32", device="cuda", ple=tier) as session:
            chunked = error(in_chunks(session, ids, CHUNK), wanted[CHUNK - 1 :: CHUNK][: TOKENS // CHUNK])
            steps = in_chunks(session, ids, 1)
            recorded, beside_cpu = error(steps, wanted), error(steps, on_cpu)
            whole = session.logits(ids)
            prefill = error(whole, wanted)
            stories.append(greedy(session, ids))
            outputs.append((steps, whole))
        ok = max(chunked, recorded, beside_cpu) <= TOLERANCE and prefill <= allowed
        report(
            f"pack {model.name} {precision} {tier}", ok, prefill=prefill, allowed=allowed, chunked=chunked,
            recorded=recorded, beside_cpu=beside_cpu, greedy_as_cpu=stories[-1] == story,
        )  # fmt: skip
    if len(tiers) > 1:
        alike = all(np.array_equal(a, b) for pair in outputs for a, b in zip(pair, outputs[0], strict=True))
        report(f"tiers alike {model.name} {precision}", alike and stories.count(stories[0]) == len(stories))


def records(report: Report) -> None:
    """Records decoded on the GPU are the CPU's, bit for bit."""
    x = np.random.default_rng(5).standard_normal((40, 30, 256)).astype(np.float32)
    for kind in BITS:
        stored = torch.from_numpy(quantize_rows(x, kind))
        report(
            f"records {kind}",
            torch.equal(from_records(stored.cuda(), 30, 256, kind).cpu(), from_records(stored, 30, 256, kind)),
        )


def parities(report: Report, models: list[Path]) -> None:
    """Every model at every quantized precision."""
    records(report)
    for model in models:
        for precision in BITS:
            parity(report, model, precision)


def main() -> int:
    """Everything; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    report = Report(parser.parse_args().out)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDGE_CACHE"] = f"{folder}/cache"
        parities(report, write_small(Path(folder)))
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
