"""Gemma 3, Gemma 4 and Llama 4: configurations that are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from loaders.errors import BadCheckpoint, EdgeError, Unsupported
from tests.refusals import change_in, refused
from tests.shrink import parse, real
from tests.test_families_gemma_llama4 import MAVERICK, SCOUT, text_part

Change = dict[str, Any] | Callable[[dict[str, Any]], Any]

REFUSED: dict[str, tuple[str, Change, type[EdgeError], tuple[str, ...]]] = {
    "3-activation": ("gemma-3-1B", {"hidden_activation": "silu"}, Unsupported, ("hidden_activation", '"silu"')),
    "3-softcap": ("gemma-3-1B", {"attn_logit_softcapping": 50.0}, Unsupported, ("attn_logit_softcapping", "50.0")),
    "3-both-ways": ("gemma-3-4B", {"use_bidirectional_attention": True}, Unsupported, ("use_bidirectional_attention",)),
    "3-bias": ("gemma-3-4B", {"attention_bias": True}, Unsupported, ("text_config.attention_bias", "true")),
    "3-kind": (
        "gemma-3-1B", {"layer_types": ["chunked_attention"] * 26}, Unsupported, ("layer_types[0]", "chunked_attention"),
    ),
    "3-length": (
        "gemma-3-1B", {"layer_types": ["full_attention"] * 25}, BadCheckpoint,
        ("a list of 25", "a list of 26"),
    ),
    "3-no-window": ("gemma-3-1B", {"sliding_window": 0}, BadCheckpoint, ("sliding_window", "0")),
    "3-null-window": ("gemma-3-1B", {"sliding_window": None}, BadCheckpoint, ("sliding_window: null", "an integer")),
    "3-no-period": ("gemma-3-1B", {"sliding_window_pattern": 0}, BadCheckpoint, ("sliding_window_pattern", "0")),
    "3-periods": (
        "gemma-3-1B", {"_sliding_window_pattern": 5}, BadCheckpoint,
        ("_sliding_window_pattern", "disagrees"),
    ),
    "3-heads": (
        "gemma-3-4B", {"num_key_value_heads": 3}, BadCheckpoint,
        ("text_config.num_key_value_heads", "a divisor of num_attention_heads=8"),
    ),
    "3-scalar": ("gemma-3-1B", {"query_pre_attn_scalar": 0}, BadCheckpoint, ("query_pre_attn_scalar", "> 0")),
    "3-rope": (
        "gemma-3-4B", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, Unsupported,
        ("text_config.rope_scaling.rope_type", '"yarn"', "default or linear"),
    ),
    "3-factor": (
        "gemma-3-4B", {"rope_scaling": {"rope_type": "linear"}}, BadCheckpoint,
        ("rope_scaling.factor", "missing"),
    ),
    "3-quantized": ("gemma-3-1B", {"quantization_config": {"bits": 4}}, Unsupported, ("quantization_config",)),
    "3-sharing": ("gemma-3-1B", {"num_kv_shared_layers": 4}, Unsupported, ("unknown key num_kv_shared_layers",)),
    "4-activation": ("gemma-4-E2B", {"hidden_activation": "gelu"}, Unsupported, ("hidden_activation", '"gelu"')),
    "4-k-is-v": ("gemma-4-E2B", {"attention_k_eq_v": True}, Unsupported, ("text_config.attention_k_eq_v", "true")),
    "4-experts": ("gemma-4-E2B", {"enable_moe_block": True}, Unsupported, ("text_config.enable_moe_block", "true")),
    "4-both-ways": (
        "gemma-4-E2B", {"use_bidirectional_attention": "all"}, Unsupported, ("use_bidirectional_attention", '"all"'),
    ),
    "4-last": (
        "gemma-4-E2B", {"layer_types": ["full_attention"] + ["sliding_attention"] * 34}, BadCheckpoint,
        ("layer_types[34]", "sliding_attention", "in the last layer"),
    ),
    "4-length": (
        "gemma-4-E2B", {"layer_types": ["full_attention"] * 36}, BadCheckpoint,
        ("a list of 36", "a list of 35"),
    ),
    "4-all-shared": ("gemma-4-E2B", {"num_kv_shared_layers": 35}, BadCheckpoint, ("num_kv_shared_layers", "less than")),
    "4-no-source": (
        "gemma-4-E2B", {"num_kv_shared_layers": 32}, BadCheckpoint, ("layer 4 shares keys", "before layer 3"),
    ),
    "4-source-size": (
        "gemma-4-E2B", {"per_layer_config": {"34": {"head_dim": 128}}}, BadCheckpoint,
        ("head_dim of layer 34", "128", "256 as in layer 14"),
    ),
    "4-past-the-end": (
        "gemma-4-E2B", {"per_layer_config": {"35": {"head_dim": 512}}}, Unsupported, ("per_layer_config.35",),
    ),
    "4-per-layer-key": (
        "gemma-4-E2B", {"per_layer_config": {"34": {"num_key_value_heads": 2}}}, Unsupported,
        ("per_layer_config.34.num_key_value_heads",),
    ),
    "4-twice": (
        "gemma-4-E2B", {"per_layer_config": {"4": {"head_dim": 512}, "04": {"head_dim": 256}}}, EdgeError,
        ("per_layer_config",),
    ),
    "4-odd-head": ("gemma-4-E2B", {"global_head_dim": 511}, BadCheckpoint, ("global_head_dim", "511", "even")),
    "4-heads": ("gemma-4-E4B", {"num_key_value_heads": 3}, BadCheckpoint, ("num_key_value_heads", "a divisor of")),
    "4-window": ("gemma-4-E4B", {"sliding_window": 0}, BadCheckpoint, ("text_config.sliding_window", "0")),
    "4-rope": (
        "gemma-4-E2B", lambda text: text["rope_parameters"]["full_attention"].update(rope_type="linear"), Unsupported,
        ("rope_parameters.full_attention.rope_type", '"linear"', "default or proportional"),
    ),
    "4-share": (
        "gemma-4-E2B", lambda text: text["rope_parameters"]["full_attention"].update(partial_rotary_factor=1.5),
        BadCheckpoint, ("partial_rotary_factor", "1.5"),
    ),
    "4-one-rope": (
        "gemma-4-E2B", lambda text: text["rope_parameters"].pop("sliding_attention"), BadCheckpoint,
        ("rope_parameters.sliding_attention", "missing"),
    ),
    "4-no-theta": (
        "gemma-4-E2B", lambda text: text["rope_parameters"]["full_attention"].pop("rope_theta"), BadCheckpoint,
        ("full_attention.rope_theta", "missing"),
    ),
    "4-old-rope": (
        "gemma-4-E2B", {"rope_scaling": {"factor": 8.0}}, Unsupported,
        ("unknown key text_config.rope_scaling",),
    ),
    "l-activation": (MAVERICK, {"hidden_act": "gelu"}, Unsupported, ("hidden_act", '"gelu"')),
    "l-bias": (MAVERICK, {"attention_bias": True}, Unsupported, ("attention_bias", "true")),
    "l-heads": (MAVERICK, {"num_key_value_heads": 7}, BadCheckpoint, ("num_key_value_heads", "num_attention_heads=40")),
    "l-chunk": (MAVERICK, {"attention_chunk_size": 0}, BadCheckpoint, ("text_config.attention_chunk_size", "0")),
    "l-null-chunk": (MAVERICK, {"attention_chunk_size": None}, BadCheckpoint, ("attention_chunk_size: null",)),
    "l-experts": (
        MAVERICK, {"num_experts_per_tok": 9, "num_local_experts": 8}, BadCheckpoint,
        ("num_experts_per_tok", "9", "at most num_local_experts=8"),
    ),
    "l-no-experts": (MAVERICK, {"num_local_experts": 0}, BadCheckpoint, ("num_local_experts", "0")),
    "l-moe-past": (MAVERICK, {"moe_layers": [1, 48]}, BadCheckpoint, ("moe_layers[1]", "48", "from 0 to 47")),
    "l-moe-step": (MAVERICK, {"interleave_moe_layer_step": 0}, BadCheckpoint, ("interleave_moe_layer_step", "0")),
    "l-rope-length": (MAVERICK, {"no_rope_layers": [1] * 47}, BadCheckpoint, ("no_rope_layers", "a list of 47", "48")),
    "l-rope-value": (MAVERICK, {"no_rope_layers": [1] * 47 + [2]}, BadCheckpoint, ("no_rope_layers[47]", "2")),
    "l-interval": (MAVERICK, {"no_rope_layer_interval": 0}, BadCheckpoint, ("no_rope_layer_interval", "0")),
    "l-types": (MAVERICK, {"layer_types": ["full_attention"]}, BadCheckpoint, ("layer_types", "a list of 48")),
    "l-kind": (
        MAVERICK, {"layer_types": ["sliding_attention"] * 48}, Unsupported, ("layer_types[0]", "sliding_attention"),
    ),
    "l-tuning": (MAVERICK, {"attn_temperature_tuning": 3}, BadCheckpoint, ("attn_temperature_tuning", "true or false")),
    "l-floor": (MAVERICK, {"floor_scale": 0}, BadCheckpoint, ("floor_scale", "0")),
    "l-rope": (
        SCOUT, lambda text: text["rope_scaling"].update(rope_type="yarn"), Unsupported,
        ("rope_scaling.rope_type", '"yarn"'),
    ),
    "l-bands": (
        SCOUT, lambda text: text["rope_scaling"].update(high_freq_factor=0.5), BadCheckpoint,
        ("high_freq_factor", "0.5", "low_freq_factor=1.0"),
    ),
    "l-quantized": (MAVERICK, {"quantization_config": {"bits": 8}}, Unsupported, ("quantization_config",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_refused_by_name(case: str) -> None:
    name, change, error, messages = REFUSED[case]
    raw = real(name)
    text = text_part(raw)
    change_in(text, change)
    refused(raw, error, *messages)


@pytest.mark.parametrize(
    ("name", "kind"), [("gemma-3-4B", "gemma3n_text"), ("gemma-4-E2B", "gemma3_text"), (SCOUT, "llama")]
)
def test_text_of_another_family(name: str, kind: str) -> None:
    raw = real(name)
    raw["text_config"]["model_type"] = kind
    with pytest.raises(Unsupported, match=rf'text_config\.model_type: "{kind}"'):
        parse(raw)
    with pytest.raises(BadCheckpoint, match="text_config: missing"):
        parse({**raw, "text_config": None})


@pytest.mark.parametrize("name", ["gemma-3-27B", SCOUT])
def test_misspelt_keys_are_refused(name: str) -> None:
    """The configs that the test of all families does not take; inside and outside of text_config."""
    raw = real(name)
    for at in ((), ("text_config",)):
        for key in text_part(raw) if at else raw:
            changed = copy.deepcopy(raw)
            inside = changed["text_config"] if at else changed
            value = inside.pop(key)
            if value is None:
                continue
            # Outside, patterns that end so allow for any token's number; inside, one begins so.
            inside["misspelt_" + key if at else key + "_misspelt"] = value
            with pytest.raises(EdgeError, match=key):
                parse(changed)
