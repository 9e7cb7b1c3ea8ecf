"""Keys that turn up in published copies of configurations, beside those of the files in loaders/configs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from loaders.checkpoint import Checkpoint
from loaders.errors import Unsupported
from loaders.network.tensors import tensors
from loaders.sketch import sketch
from tests.conftest import Folder
from tests.shrink import CONFIGS, parse, real

SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-medium": ("gpt2", {"n_special": 0, "predict_special_tokens": True}),
    "distilgpt2": ("gpt2", {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}),
    "qwen3-coder": (
        "qwen3-30B-A3B",
        {"shared_expert_intermediate_size": 0, "use_qk_norm": True, "qkv_bias": False},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_keys_that_change_nothing(case: str) -> None:
    name, keys = SAME[case]
    assert parse({**real(name), **keys}) == parse(real(name))


@pytest.mark.parametrize("keys", [{"shared_expert_intermediate_size": 512}, {"use_qk_norm": False}, {"qkv_bias": True}])
def test_their_other_values_would(keys: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=next(iter(keys))):
        parse({**real("qwen3-30B-A3B"), **keys})


def test_fp8_with_scales_of_powers_of_two() -> None:
    """DeepSeek V3.1 names the format its scales were rounded to; they are stored as before."""
    raw = real("deepseek-v3")
    raw["quantization_config"] = {**raw["quantization_config"], "scale_fmt": "ue8m0"}
    assert parse(raw) == parse(real("deepseek-v3"))
    raw["quantization_config"]["scale_fmt"] = "other"
    with pytest.raises(Unsupported, match="scale_fmt"):
        parse(raw)


def test_more_matrices_than_any_model_has_are_refused_before_they_are_listed(folders: Folder, tmp_path: Path) -> None:
    """A matrix of a hostile stack is two bytes in the file, and a thousand here."""
    raw = json.loads((folders("llama-4-scout-17B-16E") / "config.json").read_text())
    raw.get("text_config", raw).update(num_local_experts=65_536)
    assert len(tensors(parse(raw))) < 200
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").symlink_to(folders("llama-4-scout-17B-16E") / "model.safetensors")
    start = time.process_time()
    with pytest.raises(Unsupported, match="matrices"):
        Checkpoint.open(folder)
    assert time.process_time() - start < 2.0


def test_a_weight_that_is_computed_has_no_stored_bits(folders: Folder) -> None:
    checkpoint = Checkpoint.open(folders("gemma-3-1B"))
    assert checkpoint.read_raw("embed").any()
    with pytest.raises(AssertionError):
        checkpoint.read_raw("norm")
    checkpoint.close()


def test_a_sketch_has_the_shapes_of_the_config() -> None:
    found = sketch(CONFIGS / "llama-4-scout-17B-16E.json")
    assert {name: placed.shape for name, placed in found.where.items()} == tensors(found.model)
