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

CONFIGS = Path(__file__).parents[1] / "loaders" / "configs"
GEMMA = ("gemma-3n-E4B", "gemma-3n-E2B")
DEEPSEEKS = ("deepseek-v3", "kimi-k2", "moonlight-16B-A3B")
DENSE = ("smollm3-3B", "olmo2-7B", "olmo2-32B", "mistral-7B-v0.1", "mistral-small-3.1-24B", "gpt2")
GEMMAS = ("gemma-3-1B", "gemma-3-4B", "gemma-4-E2B", "gemma-4-E4B")
NAMES = (
    *GEMMA, "llama-3.2-1B", "llama-3.2-3B", "llama-3.1-8B", "qwen3-0.6B", "qwen3-8B", "qwen3-30B-A3B", *DENSE,
    *DEEPSEEKS, *GEMMAS, "llama-4-scout-17B-16E",
    "llama-4-maverick-17B-128E",
)  # fmt: skip

# What each number is divided by. Sizes that could be mistaken for one another stay different.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
LLAMA = {**HEADS, "hidden_size": 16, "head_dim": 4, "intermediate_size": 32, "num_hidden_layers": 4}
DEEPSEEK = {
    "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64, "intermediate_size": 128,
    "moe_intermediate_size": 85, "q_lora_rank": 32, "kv_lora_rank": 25, "qk_nope_head_dim": 10, "qk_rope_head_dim": 4,
    "v_head_dim": 13, "num_hidden_layers": 12, "n_routed_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512,
    "max_position_embeddings": 64, "original_max_position_embeddings": 16,
}  # fmt: skip
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
    "qwen3_moe": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8, "intermediate_size": 32,
        "moe_intermediate_size": 32, "num_hidden_layers": 16, "max_window_layers": 16, "num_experts": 16,
        "num_experts_per_tok": 4, "vocab_size": 256, "max_position_embeddings": 64,
    },
    "smollm3": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 64,
        "vocab_size": 256, "max_position_embeddings": 64,
    },
    "olmo2": {
        "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32, "intermediate_size": 96,
        "num_hidden_layers": 16, "vocab_size": 256, "max_position_embeddings": 8,
    },
    "mistral": {
        "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32, "head_dim": 8, "intermediate_size": 128,
        "num_hidden_layers": 10, "sliding_window": 256, "vocab_size": 240, "max_position_embeddings": 64,
    },
    "gpt2": {
        "n_embd": 16, "n_head": 5, "n_layer": 6, "n_positions": 4, "n_ctx": 4, "vocab_size": 200,
    },
    "gemma3_text": {
        "hidden_size": 32, "head_dim": 16, "query_pre_attn_scalar": 16, "intermediate_size": 96, "vocab_size": 700,
        "max_position_embeddings": 64,
    },
    "gemma4_text": {
        "hidden_size": 32, "num_attention_heads": 2, "head_dim": 32, "global_head_dim": 32, "intermediate_size": 100,
        "hidden_size_per_layer_input": 21, "vocab_size": 700, "vocab_size_per_layer_input": 600, "sliding_window": 32,
        "max_position_embeddings": 64,
    },
    "llama4_text": {
        "hidden_size": 80, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 170,
        "intermediate_size_mlp": 160, "attention_chunk_size": 512, "vocab_size": 500, "max_position_embeddings": 64,
        "original_max_position_embeddings": 256,
    },
    "deepseek_v3": DEEPSEEK,
    "kimi_k2": {**DEEPSEEK, "num_hidden_layers": 15, "n_routed_experts": 16},
}  # fmt: skip
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


def kinds(model: Model) -> frozenset[object]:
    """Which combinations of mechanisms a single layer has; numbers left out."""
    return frozenset((mechanisms(layer), layer.norms, layer.attention.rope is None) for layer in model.layers)


def check_attention(a: AnyAttention) -> None:
    """Windows that a test gets past, and rotations that have every kind of pair."""
    assert a.span is None or a.span <= SPAN
    if a.rope is None or a.rope.scaling is None:
        return
    turns = frequencies(replace(a.rope, scaling=None))
    ratio, scaling = frequencies(a.rope) / turns, a.rope.scaling
    if isinstance(scaling, Proportional):
        assert set(ratio.tolist()) == {0.0, 1.0}
    elif not isinstance(scaling, Linear):
        low = 1.0 / scaling.factor
        found = {"low" if r < low * 1.001 else "high" if r > 0.999 else "middle" for r in ratio}
        ends = (scaling.fast, scaling.slow) if isinstance(scaling, Yarn) else (scaling.high, scaling.low)
        step = ends[0] == ends[1]
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


def first_layers(layers: int) -> Callable[[dict[str, Any]], None]:
    """Only the first so many, of lists too: for patterns that repeat within them."""

    def cut(text: dict[str, Any]) -> None:
        before = text["num_hidden_layers"]
        text["num_hidden_layers"] = layers
        for key, value in text.items():
            if isinstance(value, list) and len(value) == before:
                text[key] = value[:layers]

    return cut


LAYERS["gemma3n_text"] = fewer_layers
LAYERS["smollm3"] = first_layers(8)


def gemma3_layers(text: dict[str, Any]) -> None:
    """One full layer and sliding ones on both sides of it. What a multimodal config leaves out is written down."""
    said = dict(text)
    text.update(num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256)
    text.update(vocab_size=262_208, max_position_embeddings=131_072, rms_norm_eps=1e-6)
    text.update(said, num_hidden_layers=7, sliding_window=16)
    text.update({key: min(text[key], most) for key, most in (("num_attention_heads", 8), ("num_key_value_heads", 4))})


def gemma4_layers(text: dict[str, Any]) -> None:
    """Two periods that own keys and values, and one that shares."""
    period = text["layer_types"].index("full_attention") + 1
    text.update(
        num_hidden_layers=3 * period, num_kv_shared_layers=period, layer_types=text["layer_types"][: 3 * period]
    )


def llama4_layers(text: dict[str, Any]) -> None:
    """Six layers, the fourth without rotation; eight experts; queries that grow from the eighth token on."""
    text.update(num_hidden_layers=6, num_local_experts=8, floor_scale=8, no_rope_layers=text["no_rope_layers"][:6])
    text["attn_temperature_tuning"] = True  # published as 4, which transformers refuses today
    if "moe_layers" in text:
        text["moe_layers"] = [i for i in text["moe_layers"] if i < 6]


LAYERS.update(gemma3_text=gemma3_layers, gemma4_text=gemma4_layers, llama4_text=llama4_layers)


def distinct() -> tuple[str, ...]:
    """One configuration for each family and set of mechanisms: what the dearer tests run over."""
    found: dict[frozenset[object], str] = {}
    for name in NAMES:
        model = parse(real(name))
        found.setdefault(frozenset({mechanisms(model), kinds(model)}), name)
    return tuple(found.values())


DISTINCT = distinct()
# Those whose int8 and int4 forms tests compare with their own dequantized weights; the README's table says so.
QUANTIZED = DISTINCT
