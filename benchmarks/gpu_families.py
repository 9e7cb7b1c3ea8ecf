"""Every family on a GPU beside the CPU: the tests' shrunk configurations with random weights, at every precision.

    python -m benchmarks.gpu_families [NAME...] [--out results.jsonl]

float32 agrees within the tests' tolerance, whole and token by token through the recorded step; quantized weights token
by token. A prefill on a GPU rounds what it multiplies to 16 bits: it may be as far off as a CPU is that does the same,
at the middle position, since a token that is sent to other experts is far off alone. Exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

import edge
from benchmarks.gpu import Report
from benchmarks.gpu_packs import dense, rounded
from loaders.checkpoint import Checkpoint
from loaders.formats.quant import BITS
from loaders.formats.synthetic import write_random
from loaders.network.tensors import tensors
from loaders.packing import write_pack
from tests.shrink import DISTINCT, real, shrink

# Ids that the smallest of these vocabularies has.
TOKENS, VOCAB = 53, 128
EXACT, STEPS, KEYS, ROUNDED = 1e-4, 2e-3, 3e-2, 3.0


def errors(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The largest difference at each position, as a share of the largest value of all."""
    return np.nan_to_num(np.abs(found - wanted).max(-1) / np.abs(wanted).max(), nan=np.inf)


def on_cpu(model: Path, precision: str, kv: str, ids: np.ndarray) -> tuple[np.ndarray, float, bool]:
    """Logits, how far off the middle position is when products are rounded as a GPU's prefill rounds them, and whether
    some matrix is narrower than a block and stays in 16 bits: at odd shapes its products are rounded everywhere.
    """
    with edge.load(model, precision=precision, kv=kv) as session:
        wanted = session.logits(ids)
        shapes = tensors(session.model)
        weights = session.engine.weights
        session.engine.weights = {name: dense(w).reshape(shapes[name]) for name, w in weights.items()}
        session.engine.ops.linear = rounded
        narrow = any(isinstance(w, torch.Tensor) and w.dtype == torch.bfloat16 for w in weights.values())
        return wanted, float(np.median(errors(session.logits(ids), wanted))), narrow


def compared(report: Report, label: str, model: Path, precision: str, kv: str) -> None:
    """One model at one precision on both devices."""
    ids = np.random.default_rng(0).integers(0, VOCAB, TOKENS)
    wanted, allowed, narrow = on_cpu(model, precision, kv, ids)
    with edge.load(model, precision=precision, kv=kv, device="cuda") as session:
        whole = session.logits(ids)
        session.reset()
        steps = np.stack([session.step(ids[i : i + 1]) for i in range(TOKENS)])
    prefill, stepped = errors(whole, wanted), errors(steps, wanted)
    if precision == "float32":
        ok = max(prefill.max(), stepped.max()) <= EXACT
    else:
        limit = STEPS if kv == "float32" else KEYS
        limit = max(limit, ROUNDED * allowed) if narrow else limit
        ok = np.median(stepped) <= limit and np.median(prefill) <= ROUNDED * allowed
    report(
        label, bool(ok), steps=float(stepped.max()), step=float(np.median(stepped)),
        prefill=float(np.median(prefill)), allowed=allowed,
    )  # fmt: skip


def family(report: Report, name: str, folder: Path) -> None:
    """A shrunk configuration: as a checkpoint in float32, and as a pack at both precisions, once with int8 keys."""
    config = folder / f"{name}.json"
    config.write_text(json.dumps(shrink(real(name))))
    source, pack = folder / name, folder / f"{name}.pack"
    write_random(config, source, dtype="F32")
    with closing(Checkpoint.open(source)) as checkpoint:
        write_pack(checkpoint, pack)
    compared(report, f"{name} float32", source, "float32", "float32")
    for precision in BITS:
        compared(report, f"{name} {precision}", pack, precision, "float32")
    compared(report, f"{name} int4, kv int8", pack, "int4", "int8")


def main() -> int:
    """Everything; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", default=DISTINCT)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here")
    report = Report(options.out)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDGE_CACHE"] = f"{folder}/cache"
        for name in options.name:
            family(report, name, Path(folder))
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
