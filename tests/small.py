"""Tiny checkpoints with every mechanism switched on, written by edge's own writer: no torch, no transformers.

``gemma3n`` shares keys, slides a window of 8, streams per-layer embeddings from a table shorter than its vocabulary
and can be sliced; ``llama`` does none of that. Both are built once per test process; copy them before changing them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loaders.families import family_of
from loaders.formats.buffers import from_float32
from loaders.formats.config import Config
from loaders.formats.safetensors_writer import Writer
from loaders.layout import file_name
from loaders.network.tensors import tensors

SPECIALS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
EOS, BOS = 1, 2
TEXTS = (
    "once upon a time there was a small model that lived in a small machine",
    "the model told a story about the machine, and the machine was glad",
    "ça coûte 3 €, 日本語 🎉 user model turn\n\n",
)
TOKENS, VOCAB, ROWS = 320, 328, 316
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

GEMMA3N: dict[str, Any] = {
    "architectures": ["Gemma3nForCausalLM"],
    "model_type": "gemma3n_text",
    "hidden_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": [128] * 12,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 4,
    "activation_sparsity_pattern": [0.5] * 3 + [0.0] * 9,
    "num_kv_shared_layers": 6,
    "sliding_window": 8,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": ROWS,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "max_position_embeddings": 2048,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "hidden_act": "silu",
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}


@cache
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer, trained on three sentences, that puts <bos> in front."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[AddedToken(text, special=True) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 4, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return inner.to_str()


def write(folder: Path, config: dict[str, Any], dtype: str = "F32", template: str | None = None, seed: int = 0) -> Path:
    """A whole checkpoint with random weights. The rows of special tokens in the head are zero: greedy never stops."""
    folder.mkdir(parents=True)
    family = family_of(config["model_type"], "config.json")
    model = family.parse(Config(config, "config.json"))
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in tensors(model).items():
        scale = 1.0 if len(shape) == 1 or name in ("embed", "ple.table") else shape[-1] ** -0.5
        values[name] = (rng.standard_normal(shape) * scale * (0.1 if len(shape) == 1 else 1.0)).astype(np.float32)
        if len(shape) == 1:
            values[name] += 1.0
        if name in ("embed", "head"):
            values[name][: len(SPECIALS)] = 0.0
    names = {name: "model." + file_name(family.names, name) for name in values}
    if "head" in names:
        names["head"] = "lm_head.weight"
    with Writer(folder / "model.safetensors", {names[n]: (dtype, v.shape) for n, v in values.items()}) as writer:
        for name, value in values.items():
            writer.write(names[name], [from_float32(value, dtype)])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 4], "bos_token_id": BOS}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    return folder


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="edge-small-")


@cache
def built(name: str) -> Path:
    """One of the checkpoints below, made when it is first asked for and removed when the tests end."""
    recipes: dict[str, tuple[dict[str, Any], str, str | None]] = {
        "gemma3n": (GEMMA3N, "F32", None),
        "gemma3n-bf16": (GEMMA3N, "BF16", None),
        "gemma3n-chat": (GEMMA3N, "F32", TEMPLATE),
        "llama": (LLAMA, "F32", None),
    }
    config, dtype, template = recipes[name]
    return write(Path(_home().name, name), config, dtype, template)


@pytest.fixture(scope="session", name="gemma3n")
def gemma3n_fixture() -> Path:
    """A Gemma 3n checkpoint in float32; shared, so read-only."""
    return built("gemma3n")


@pytest.fixture(scope="session", name="llama")
def llama_fixture() -> Path:
    """A Llama checkpoint in float32; shared, so read-only."""
    return built("llama")


@pytest.fixture(scope="session", name="chatty")
def chatty_fixture() -> Path:
    """The Gemma 3n checkpoint with a chat template; shared, so read-only."""
    return built("gemma3n-chat")


Clone = Callable[..., Path]


@pytest.fixture(name="clone")
def clone_fixture(tmp_path: Path) -> Clone:
    """Copies a checkpoint to change it; keywords replace keys of its config.json, None removes them."""

    def clone(source: Path, name: str = "model", **config: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        if config:
            path = folder / "config.json"
            data = {**json.loads(path.read_text()), **config}
            path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
        return folder

    return clone
