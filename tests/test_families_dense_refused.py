"""What a config of Qwen3 MoE, SmolLM3, OLMo 2, Mistral or GPT-2 may not say, each refused by the key it says it in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from loaders.errors import BadCheckpoint, EdgeError, Unsupported
from tests.refusals import change_in, refused
from tests.shrink import parse, real

MOE, SMOL, OLMO, MISTRAL, SMALL, GPT2 = (
    "qwen3-30B-A3B", "smollm3-3B", "olmo2-7B", "mistral-7B-v0.1", "mistral-small-3.1-24B", "gpt2",
)  # fmt: skip
OTHERS = ("qwen3-32B", "qwen3-235B-A22B", "olmo2-32B", "mistral-7B-v0.3", "gpt2-xl")


def inside(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["text_config"].update(keys)


WRONG_HEADS = {"head_dim": None, "num_attention_heads": 48, "num_key_value_heads": 48}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
Change = dict[str, Any] | Callable[[dict[str, Any]], None]

UNSUPPORTED: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    **{f"bias-{name}": (name, {"attention_bias": True}, ("attention_bias", "true")) for name in (MOE, SMOL, OLMO)},
    **{f"act-{name}": (name, {"hidden_act": "gelu"}, ("hidden_act", '"gelu"')) for name in (MOE, SMOL, OLMO, MISTRAL)},
    **{f"yarn-{name}": (name, {"rope_scaling": YARN}, ("rope_scaling", '"yarn"')) for name in (MOE, SMOL, OLMO)},
    **{f"bits-{name}": (name, {"quantization_config": {}}, ("quantization_config",)) for name in (MOE, SMOL, GPT2)},
    **{f"key-{name}": (name, {"sinks": 4}, ("unknown key sinks",)) for name in (MOE, SMOL, OLMO, MISTRAL, SMALL, GPT2)},
    "mlp-bias": (SMOL, {"mlp_bias": True}, ("mlp_bias", "true")),
    "moe-window-from": (MOE, {"use_sliding_window": True, "sliding_window": 64}, ("max_window_layers", "48")),
    "moe-layer-types": (MOE, {"layer_types": ["full_attention"] * 48}, ("layer_types",)),
    "moe-shared": (MOE, {"shared_expert_intermediate_size": 512}, ("shared_expert_intermediate_size",)),
    "smol-kinds-while-off": (SMOL, {"layer_types": ["sliding_attention"] * 36}, ("layer_types[0]", '"sliding_')),
    "smol-other-kind": (SMOL, {"layer_types": ["chunked_attention"] * 36}, ("layer_types[0]", '"chunked_')),
    "mistral-layer-types": (MISTRAL, {"layer_types": ["full_attention"] * 32}, ("layer_types",)),
    "small-act": (SMALL, inside(hidden_act="gelu"), ("text_config.hidden_act", '"gelu"')),
    "small-key": (SMALL, inside(sinks=4), ("unknown key text_config.sinks",)),
    "small-other-text": (SMALL, inside(model_type="ministral3"), ("text_config.model_type", '"ministral3"')),
    "small-bits": (SMALL, {"quantization_config": {"bits": 4}}, ("quantization_config",)),
    "gpt2-exact-gelu": (GPT2, {"activation_function": "gelu"}, ("activation_function", '"gelu"', "gelu_new")),
    "gpt2-by-layer": (GPT2, {"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx", "true")),
    "gpt2-upcast": (GPT2, {"reorder_and_upcast_attn": True}, ("reorder_and_upcast_attn", "true")),
    "gpt2-cross": (GPT2, {"add_cross_attention": True}, ("add_cross_attention", "true")),
    "gpt2-rope": (GPT2, {"rope_theta": 10_000.0}, ("unknown key rope_theta",)),
}

BAD: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    **{
        f"kv-heads-{name}": (name, {"num_key_value_heads": 5}, ("num_key_value_heads", "a divisor of num_attention"))
        for name in (MOE, SMOL, OLMO, MISTRAL)
    },
    **{
        f"heads-{name}": (name, WRONG_HEADS, ("hidden_size", "a multiple of num_att"))
        for name in (MOE, SMOL, OLMO, MISTRAL)
    },
    **{
        f"window-0-{name}": (name, {"sliding_window": 0, "use_sliding_window": True}, ("sliding_window", "0"))
        for name in (MOE, SMOL)
    },
    "window-0": (MISTRAL, {"sliding_window": 0}, ("sliding_window", "0")),
    "window-negative": (MISTRAL, {"sliding_window": -4096}, ("sliding_window", "-4096")),
    "window-off-but-0": (SMOL, {"sliding_window": 0}, ("sliding_window", "0")),
    "more-active": (MOE, {"num_experts_per_tok": 129}, ("num_experts_per_tok", "129", "at most num_experts=128")),
    "fewer-experts": (MOE, {"num_experts": 4}, ("num_experts_per_tok", "8", "at most num_experts=4")),
    "none-active": (MOE, {"num_experts_per_tok": 0}, ("num_experts_per_tok", "0")),
    "no-experts": (MOE, {"num_experts": 0}, ("num_experts", "0")),
    "two-counts": (MOE, {"num_local_experts": 64}, ("num_local_experts", "64", "num_experts = 128")),
    "expert-width": (MOE, {"moe_intermediate_size": None}, ("moe_intermediate_size", "missing")),
    "normalized-maybe": (MOE, {"norm_topk_prob": 1}, ("norm_topk_prob", "true or false")),
    "dense-past-the-last": (MOE, {"mlp_only_layers": [48]}, ("mlp_only_layers[0]", "48", "from 0 to 47")),
    "dense-negative": (MOE, {"mlp_only_layers": [0, -1]}, ("mlp_only_layers[1]", "-1")),
    "dense-text": (MOE, {"mlp_only_layers": "0"}, ("mlp_only_layers", "a list")),
    "step-0": (MOE, {"decoder_sparse_step": 0}, ("decoder_sparse_step", "0")),
    "rotations-length": (SMOL, {"no_rope_layers": [1, 1, 1, 0]}, ("no_rope_layers", "a list of 36")),
    "rotations-value": (SMOL, {"no_rope_layers": [2] * 36}, ("no_rope_layers[0]", "from 0 to 1")),
    "rotations-bool": (SMOL, {"no_rope_layers": [True] * 36}, ("no_rope_layers[0]", "true")),
    "interval-0": (SMOL, {"no_rope_layers": None, "no_rope_layer_interval": 0}, ("no_rope_layer_interval", "0")),
    "types-length": (SMOL, {"layer_types": ["full_attention"] * 35}, ("layer_types", "a list of 35")),
    "no-text": (SMALL, {"text_config": None}, ("text_config", "missing")),
    "text-kind-missing": (SMALL, inside(model_type=None), ("text_config.model_type", "missing")),
    "small-kv": (SMALL, inside(num_key_value_heads=5), ("num_key_value_heads", "5")),
    "odd-head": (SMALL, inside(head_dim=127), ("head_dim", "127", "even")),
    "gpt2-heads": (GPT2, {"n_head": 5}, ("n_embd", "768", "a multiple of n_head=5")),
    "gpt2-no-heads": (GPT2, {"n_head": 0}, ("n_head", "0")),
    "gpt2-inner": (GPT2, {"n_inner": -1}, ("n_inner", "-1")),
    "gpt2-positions": (GPT2, {"n_positions": 0}, ("n_positions", "0")),
    "gpt2-endless": (GPT2, {"n_positions": 10**12}, ("n_positions",)),
    "gpt2-eps": (GPT2, {"layer_norm_epsilon": 0.0}, ("layer_norm_epsilon", "> 0")),
    "gpt2-scale": (GPT2, {"scale_attn_weights": 1}, ("scale_attn_weights", "true or false")),
    "gpt2-vocab": (GPT2, {"vocab_size": None}, ("vocab_size", "missing")),
}
REFUSED = {**{k: (*v, Unsupported) for k, v in UNSUPPORTED.items()}, **{k: (*v, BadCheckpoint) for k, v in BAD.items()}}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_refused_by_name(case: str) -> None:
    name, change, messages, error = REFUSED[case]
    raw = real(name)
    change_in(raw, change)
    refused(raw, error, *messages)


@pytest.mark.parametrize("name", [MOE, SMOL, OLMO, MISTRAL, SMALL, GPT2, *OTHERS])
def test_misspelt_keys_are_refused(name: str) -> None:
    """At the top, where a multimodal config says little of the text, as inside."""
    raw = real(name)
    for key, value in raw.items():
        if value is None:
            continue
        others = {k: v for k, v in raw.items() if k != key}
        with pytest.raises(EdgeError, match=key):
            parse({**copy.deepcopy(others), "misspelt_" + key: value})
