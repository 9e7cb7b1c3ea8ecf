"""The promise for each mechanism beside Gemma 3n's: experts, latent attention, chunks, rings, head sizes by layer, fp8.

Models are cut so that the mechanism's own memory shows beside the libraries'. Each is a first run: it packs, where its
precision needs a pack, within a budget that leaves no byte, and fills its context, past a window or chunk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.formats.placed import FP8, FP8_BLOCK
from loaders.formats.safetensors import Shards
from loaders.formats.safetensors_writer import Writer
from loaders.formats.synthetic import write_random
from tests.shrink import lower_ids, real
from tests.test_claims import FILLED, assert_kept, candidates, environment, line, run

VOCAB = 4096
# name -> (published config, what of it is cut, precision, --kv). Not cut: head sizes, ranks, periods, routing.
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "experts": (
        "qwen3-30B-A3B",
        {"num_hidden_layers": 3, "max_window_layers": 3, "hidden_size": 1024, "num_experts": 32},
        "int4",
        "auto",
    ),
    "latent": (
        "moonlight-16B-A3B",
        {"num_hidden_layers": 2, "n_routed_experts": 8, "moe_intermediate_size": 512, "intermediate_size": 4096},
        "int8",
        "auto",
    ),
    "latent in fp8": (
        "deepseek-v3",
        {
            "num_hidden_layers": 2, "first_k_dense_replace": 1, "hidden_size": 1024, "num_attention_heads": 32,
            "num_key_value_heads": 32, "q_lora_rank": 512, "n_routed_experts": 16, "moe_intermediate_size": 384,
            "intermediate_size": 2048,
        },
        "bf16",
        "auto",
    ),
    "chunks": (
        "llama-4-scout-17B-16E",
        {
            "num_hidden_layers": 4, "hidden_size": 1280, "num_attention_heads": 20, "num_key_value_heads": 4,
            "num_local_experts": 2, "intermediate_size": 1024, "attention_chunk_size": 128,
        },
        "bf16",
        "auto",
    ),
    "ring": (
        "gemma-3-4B",
        {"num_hidden_layers": 6, "hidden_size": 1280, "intermediate_size": 5120, "sliding_window": 128},
        "int8",
        "auto",
    ),
    "head sizes by layer": (
        "gemma-4-E2B",
        {
            "num_hidden_layers": 10, "num_kv_shared_layers": 5, "hidden_size": 768, "intermediate_size": 2048,
            "sliding_window": 128, "vocab_size_per_layer_input": VOCAB,
            "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        },
        "int8",
        "auto",
    ),
    "layer norm": ("gpt2", {}, "int8", "auto"),
}  # fmt: skip


def cut(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A published config.json with a few of its numbers smaller."""
    raw = real(name)
    text = raw.get("text_config", raw)
    text.update({"vocab_size": VOCAB, **changes})
    for level in (raw, text):
        lower_ids(level, VOCAB)
    return raw


def written(raw: dict[str, Any], folder: Path) -> Path:
    """A random checkpoint; in fp8 where the config says so."""
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(raw))
    write_random(config, folder)
    if "quantization_config" in raw:
        in_fp8(folder)
    return folder


def in_fp8(folder: Path) -> None:
    """Projections of a checkpoint become random e4m3 with the inverse scales of their blocks."""
    rng = np.random.default_rng(0)
    with Shards.open(folder) as shards:
        stored = dict(shards.tensors)
        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, tensor in stored.items():
            specs[name] = (tensor.dtype, tensor.shape)
            if name.endswith(("_proj.weight", "_with_mqa.weight")):
                scales = (-(-tensor.shape[0] // FP8_BLOCK), -(-tensor.shape[1] // FP8_BLOCK))
                specs |= {name: (FP8, tensor.shape), name + "_scale_inv": ("F32", scales)}
        with Writer(folder / "fp8.safetensors", specs) as writer:
            for name, (dtype, shape) in specs.items():
                if dtype == FP8:
                    # Up to 1.875 in size: one less than the code of 2.
                    signs = rng.integers(0, 2, shape, np.uint8) << 7
                    writer.write(name, [rng.integers(0, 64, shape, np.uint8) | signs])
                elif name not in stored:
                    writer.write(name, [np.full(shape, 0.03, np.float32)])
                else:
                    raw = bytearray(stored[name].nbytes)
                    shards.read_into(stored[name], raw)
                    writer.write(name, [raw])
    (folder / "fp8.safetensors").replace(folder / "model.safetensors")


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of these tests alone, so that every first quantized run packs."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("case", CASES)
def test_claim_a_for_a_mechanism(case: str, cache_folder: Path, tmp_path: Path) -> None:
    name, changes, precision, kv = CASES[case]
    folder = written(cut(name, changes), tmp_path / case.replace(" ", "-"))
    budget = max(p["total_bytes"] for p in candidates(folder, cache_folder) if p["precision"] == precision)
    found = run(line(folder, budget, precision=precision, kv=kv), environment(cache_folder))
    assert len(found["tokens"]) == FILLED
    assert found["plan"]["precision"] == precision
    assert_kept(found, found["budget_bytes"])
