"""Real configurations made small enough to run in a test, with no mechanism switched off.

Widths, heads, vocabularies and windows are divided; per-layer lists keep their pattern. :func:`shrink` then proves
that the small model uses what the real one uses: a two-layer toy with sharing off would prove nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loaders.families import family_of
from loaders.formats.config import Config
from loaders.network.rotary import frequencies
from loaders.network.spec import AnyAttention, Experts, FeedForward, Linear, Model, Proportional, Yarn, mechanisms

CONFIGS = Path(__file__).parent / "configs"
GEMMA = ("gemma-3n-E4B", "gemma-3n-E2B")
NAMES = (*GEMMA, "llama-3.2-1B", "llama-3.2-3B", "llama-3.1-8B", "qwen3-0.6B", "qwen3-8B")

# What each number is divided by. Sizes that could be mistaken for one another stay different.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
LLAMA = {**HEADS, "hidden_size": 16, "head_dim": 4, "intermediate_size": 32, "num_hidden_layers": 4}
DIVISORS: dict[str, dict[str, int]] = {
    "llama": {**LLAMA, "vocab_size": 256, "max_position_embeddings": 64, "original_max_position_embeddings": 64},
    "qwen3": {**LLAMA, "vocab_size": 256, "max_position_embeddings": 64, "max_window_layers": 4},
    "gemma3n_text": {
        "hidden_size": 32,
        "head_dim": 16,
        "intermediate_size": 32,
        "hidden_size_per_layer_input": 21,
        "laurel_rank": 9,
        "vocab_size": 700,
        "vocab_size_per_layer_input": 800,
        "sliding_window": 32,
        "max_position_embeddings": 64,
    },
}
PERIOD = 5
# How lists with a value per layer are cut, where fewer layers is more than a smaller number: (text config) in place.
LAYERS: dict[str, Callable[[dict[str, Any]], None]] = {}
# No window and no chunk is longer, so that a test of 53 tokens passes it three times.
SPAN = 17


def real(name: str) -> dict[str, Any]:
    """A published config.json."""
    raw: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return raw


def parse(raw: dict[str, Any], file: str = "config.json") -> Model:
    """The model of a config, every key of it read."""
    config = Config(copy.deepcopy(raw), file)
    model = family_of(config.raw("model_type"), file).parse(config)
    config.finish()
    return model


def shrink(raw: dict[str, Any]) -> dict[str, Any]:
    """The same config, small. Raises AssertionError if a mechanism was lost on the way."""
    small = copy.deepcopy(raw)
    text = small.get("text_config", small)
    LAYERS.get(text["model_type"], lambda _: None)(text)
    divide(text, DIVISORS[text["model_type"]])
    for level in (small, text):
        lower_ids(level, text["vocab_size"])
    before, after = parse(raw), parse(small)
    assert mechanisms(after) == mechanisms(before), mechanisms(after) ^ mechanisms(before)
    assert kinds(after) == kinds(before), kinds(after) ^ kinds(before)
    if after.family == "gemma3n":
        check_gemma(after)
    for was, layer in zip(before.layers, after.layers, strict=False):
        check_attention(layer.attention)
        check_experts(was.ffn, layer.ffn)
    return small


def divide(data: dict[str, Any], divisors: dict[str, int]) -> None:
    """In place, in nested objects too; a list of sizes element by element."""
    for key, value in data.items():
        if isinstance(value, dict):
            divide(value, divisors)
        elif key in divisors and value is not None:
            by = divisors[key]
            data[key] = [v // by for v in value] if isinstance(value, list) else value // by


def lower_ids(data: dict[str, Any], vocab: int) -> None:
    """In place: the ids of special tokens that the small vocabulary does not reach become its last ones."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = data.get(key)
        if isinstance(value, list):
            data[key] = [v if v < vocab else vocab - 1 - i for i, v in enumerate(value)]
        elif value is not None and value >= vocab:
            data[key] = vocab - 1


def fewer_layers(text: dict[str, Any]) -> None:
    """Half the blocks of five; sharing and sparsity start at the same share of the depth."""
    layers, shared = text["num_hidden_layers"], text["num_kv_shared_layers"]
    fewer = PERIOD * ((layers // PERIOD + 1) // 2)
    text["num_hidden_layers"] = fewer
    text["num_kv_shared_layers"] = PERIOD * round(shared * fewer / layers / PERIOD)
    text["layer_types"] = text["layer_types"][:fewer]
    for key in ("intermediate_size", "activation_sparsity_pattern"):
        text[key] = [text[key][i * layers // fewer] for i in range(fewer)]


def kinds(model: Model) -> frozenset[frozenset[str]]:
    """Which combinations of mechanisms a single layer has; numbers left out."""
    return frozenset(mechanisms(layer) for layer in model.layers)


def check_attention(a: AnyAttention) -> None:
    """Windows that a test gets past, and rotations that have every kind of pair."""
    assert a.span is None or a.span <= SPAN
    if a.rope is None or a.rope.scaling is None:
        return
    turns = frequencies(replace(a.rope, scaling=None))
    ratio = frequencies(a.rope) / turns
    if isinstance(a.rope.scaling, Proportional):
        assert set(ratio.tolist()) == {0.0, 1.0}
    elif not isinstance(a.rope.scaling, Linear):
        low = 1.0 / a.rope.scaling.factor
        found = {"low" if r < low * 1.001 else "high" if r > 0.999 else "middle" for r in ratio}
        step = isinstance(a.rope.scaling, Yarn) and a.rope.scaling.fast == a.rope.scaling.slow
        assert found == ({"low", "high"} if step else {"low", "middle", "high"}), found


def check_experts(before: FeedForward, after: FeedForward) -> None:
    """There is a choice, of more than one where there was, and within some of the groups."""
    if isinstance(before, Experts) and isinstance(after, Experts):
        assert after.active < after.experts
        assert (after.active > 1) == (before.active > 1)
        assert (after.router.active_groups < after.router.groups) == (before.router.groups > 1)


def check_gemma(model: Model) -> None:
    """What the published models have beyond one mechanism being on somewhere."""
    assert len(model.layers) > 10
    assert sum(layer.attention.kv_from is not None for layer in model.layers) >= 5
    sparse = [layer.ffn.sparsity > 0 for layer in model.layers]
    assert sparse == sorted(sparse, reverse=True)
    assert 0 < sum(sparse) < len(sparse)
    assert model.ple is not None
    assert model.vocab > model.ple.rows, "no ids beyond the table"
    assert model.nested is not None
    assert model.layers[0].attention.rope != model.layers[4].attention.rope


LAYERS["gemma3n_text"] = fewer_layers
