"""Configurations of every family that cannot be, or that are not implemented: what is changed, and how it is refused.

Changes are of the text part of a shrunk config, where its family has the key; a value may follow from that config.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

Config = dict[str, Any]
BAD, UNSUPPORTED = 65, 78


class Case(NamedTuple):
    """A change of a config, the exit code it leads to, and what the line must name."""

    id: str
    keys: Config
    code: int
    field: str


# Counts and widths: none of them may be zero, negative, absurd or another type than an integer.
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings", "sliding_window", "attention_chunk_size", "moe_intermediate_size",
    "intermediate_size_mlp", "num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "n_group", "topk_group", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "global_head_dim", "laurel_rank", "altup_num_inputs", "floor_scale",
    "vocab_size_per_layer_input", "interleave_moe_layer_step", "decoder_sparse_step", "sliding_window_pattern",
    "n_embd", "n_head", "n_layer", "n_positions",
)  # fmt: skip
NO_SIZES: tuple[Any, ...] = (0, -1, 1 << 40, -(1 << 40), "8", 8.0, True, [8], {"size": 8})
# Contexts are cut instead, since nothing is sized by them.
LEGAL_SIZES = [("max_position_embeddings", 1 << 40)]

SWITCHES = (
    "tie_word_embeddings", "norm_topk_prob", "use_sliding_window", "use_qk_norm", "use_double_wide_mlp",
    "altup_correct_scale", "attn_temperature_tuning",
)  # fmt: skip
NO_SWITCHES: tuple[Any, ...] = ("true", 1, 0.0, [], {})

NUMBERS = ("rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_local_base_freq", "routed_scaling_factor",
           "query_pre_attn_scalar", "final_logit_softcapping")  # fmt: skip
NO_NUMBERS: tuple[Any, ...] = (0, -1.0, "1e-6", True, [1e-6], 10**400)
IGNORED = {("gemma3n_text", "query_pre_attn_scalar")}

# Per-layer lists: each must have a value for every layer, of the right kind.
LISTS = ("layer_types", "no_rope_layers", "intermediate_size", "activation_sparsity_pattern")


def cases(text: Config) -> Iterator[Case]:
    """Every case that this config has the keys for."""
    yield from sizes(text)
    yield from numbers(text)
    yield from lists(text)
    yield from ratios(text)
    yield from experts(text)
    yield from elsewhere(text)


def sizes(text: Config) -> Iterator[Case]:
    """Sizes that are none."""
    for key in SIZES:
        if isinstance(text.get(key), int):
            yield from (Case(f"{key}={v!r}", {key: v}, BAD, key) for v in NO_SIZES if (key, v) not in LEGAL_SIZES)


def numbers(text: Config) -> Iterator[Case]:
    """Numbers and switches that are none."""
    for keys, values in ((NUMBERS, NO_NUMBERS), (SWITCHES, NO_SWITCHES)):
        for key in keys:
            if text.get(key) is not None and (text["model_type"], key) not in IGNORED:
                yield from (Case(f"{key}={str(v)[:9]}", {key: v}, BAD, key) for v in values)


def lists(text: Config) -> Iterator[Case]:
    """Lists too short, too long, of the wrong things, and none at all."""
    for key in LISTS:
        value = text.get(key)
        if isinstance(value, list) and value:
            for id_, v in {
                "short": value[:-1],
                "long": [*value, value[-1]],
                "text": "x" * len(value),
                "null": [*value[:-1], None],
                "nested": [*value[:-1], value],
                "object": dict.fromkeys(map(str, range(len(value))), 1),
            }.items():
                yield Case(f"{key} {id_}", {key: v}, BAD, key)
            if isinstance(value[0], str):
                yield Case(f"{key} unknown", {key: [*value[:-1], "linear_attention"]}, UNSUPPORTED, f"{key}[")
            elif key != "activation_sparsity_pattern":
                yield Case(f"{key} negative", {key: [*value[:-1], -1]}, BAD, f"{key}[")
    if text["model_type"] == "llama4_text":
        layers = text["num_hidden_layers"]
        for bad in ([layers], [-1], ["0"], [0.0]):
            yield Case(f"moe_layers={bad}", {"moe_layers": bad}, BAD, "moe_layers[0]")
        yield Case("moe_layers text", {"moe_layers": "all"}, BAD, "moe_layers")
    if text["model_type"] == "qwen3_moe":
        yield Case("mlp_only_layers", {"mlp_only_layers": [text["num_hidden_layers"]]}, BAD, "mlp_only_layers[0]")


def ratios(text: Config) -> Iterator[Case]:
    """Counts that do not go into one another."""
    q, own_head = text.get("num_attention_heads"), text.get("head_dim") is not None
    latent = "kv_lora_rank" in text
    if q is not None and not latent:
        for kv in (q - 1, q + 1, 2 * q):
            yield Case(f"kv heads {kv} of {q}", {"num_key_value_heads": kv}, BAD, "num_key_value_heads")
        if not own_head:
            yield Case("heads", {"num_attention_heads": 7, "num_key_value_heads": 7}, BAD, "hidden_size")
    if own_head:
        yield Case("odd head", {"head_dim": text["head_dim"] - 1}, BAD, "head_dim")
    if "global_head_dim" in text:
        yield Case("odd global head", {"global_head_dim": 15}, BAD, "global_head_dim")
    if "n_head" in text:
        yield Case("heads", {"n_head": 5}, BAD, "n_embd")
    if latent:
        yield Case("odd rotation", {"qk_rope_head_dim": 15}, BAD, "qk_rope_head_dim")
        yield Case("kv heads", {"num_key_value_heads": 1 + q}, UNSUPPORTED, "num_key_value_heads")
    for key in ("num_kv_shared_layers", "first_k_dense_replace"):
        if key in text:
            bad = text["num_hidden_layers"] + 1
            yield from (Case(f"{key}={v!r}", {key: v}, BAD, key) for v in (bad, -1, "1", 1.0, True))


def experts(text: Config) -> Iterator[Case]:
    """Mixtures nobody could route in."""
    key = next((k for k in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(k)), None)
    if key is None:
        return
    total, active = text[key], text["num_experts_per_tok"]
    yield Case("active above", {"num_experts_per_tok": total + 1}, BAD, "num_experts_per_tok")
    if active > 1:
        one_group = {"n_group": 1, "topk_group": 1} if "n_group" in text else {}
        fewer = max(2, active - 1)
        above = {"num_experts_per_tok": fewer + 1}
        yield Case("experts below active", {key: fewer, **above, **one_group}, BAD, "num_experts_per_tok")
    if "n_group" in text:
        yield Case("groups", {"n_group": total - 1}, BAD, "n_group")
        yield Case("groups of one", {"n_group": total}, BAD, "n_group")
        yield Case("active groups", {"topk_group": text["n_group"] + 1}, BAD, "topk_group")
        yield Case("scores", {"scoring_func": "softmax"}, UNSUPPORTED, "scoring_func")
        yield Case("top-k", {"topk_method": "greedy"}, UNSUPPORTED, "topk_method")
        yield Case("frequency", {"moe_layer_freq": 2}, UNSUPPORTED, "moe_layer_freq")


def elsewhere(text: Config) -> Iterator[Case]:
    """What is sound, and not implemented; and what nobody has heard of."""
    yield Case("unknown key", {"mystery_norm": True}, UNSUPPORTED, "mystery_norm")
    yield Case("quantized", {"quantization_config": {"quant_method": "awq", "bits": 4}}, UNSUPPORTED, "quant")
    yield Case("kind", {"model_type": "bert"}, UNSUPPORTED, "model_type")
    yield Case("attention bias", {"attention_bias": True}, UNSUPPORTED, "attention_bias")
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        if key in text:
            yield from (Case(f"activation {v!r}", {key: v}, UNSUPPORTED, key) for v in ("relu2", "SILU"))
    if "n_embd" in text:
        yield Case("scaled by layer", {"scale_attn_by_inverse_layer_idx": True}, UNSUPPORTED, "inverse_layer_idx")
        yield Case("cross attention", {"add_cross_attention": True}, UNSUPPORTED, "add_cross_attention")
    yield from rotations(text)


def rotations(text: Config) -> Iterator[Case]:
    """Rotary positions of other kinds, and of numbers that make none; in the place where this config has its own."""
    if "n_embd" in text:
        return
    at = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    inner = text.get(at) or {}
    wrong_type = "no string" if at == "rope_parameters" or inner else None
    if "full_attention" in inner:

        def change(**keys: Any) -> Config:
            return {at: {**copy.deepcopy(inner), "full_attention": {**inner["full_attention"], **keys}}}
    else:

        def change(**keys: Any) -> Config:
            return {at: {**inner, **keys}}

    kind = "type" if "type" in inner else "rope_type"
    for name in ("longrope", "dynamic", ""):
        yield Case(f"rope {name!r}", change(**{kind: name}), UNSUPPORTED, kind)
    yield Case("rope number", change(**{kind: 3}), BAD, kind)
    yield Case("rope unknown", change(mystery=1.0), UNSUPPORTED, "mystery")
    yield Case("rope list", {at: [1, 2]}, BAD, at)
    if wrong_type is not None:
        for key in set(inner) & {"factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"}:
            yield from (Case(f"{key}={v}", change(**{key: v}), BAD, key) for v in (0, -2.0, 5e-324, 1e308, "8"))
        for key in set(inner) & {"mscale", "mscale_all_dim"}:
            yield from (Case(f"{key}={v}", change(**{key: v}), BAD, key) for v in (-0.5, 1e308, "1"))
        for key in set(inner) & {"original_max_position_embeddings"}:
            yield from (Case(f"{key}={v}", change(**{key: v}), BAD, key) for v in (0, -4, 1.5, 1 << 40))
    if text.get("rope_theta") is not None:
        yield from (Case(f"theta={v}", {"rope_theta": v}, BAD, "rope_theta") for v in (1.0, 5e-324, 1e308))


# What a fuzzer puts in the place of any value.
NASTY: tuple[Any, ...] = (
    None, -1, 0, 1, 2, 3, 5, 7, 16, 2**31 - 1, 2**31, 1 << 40, -(2**63), 10**400, 1e308, -1e308, 5e-324, 0.5, 1.5, 8.0,
    "x", "8", "", "\n", "\x1b[31m", "default", [], [[]], [None], [1], ["x"], {}, {"a": {"b": [1]}}, True, False,
)  # fmt: skip


def places(value: Config, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path to every key, nested ones too."""
    for key, inner in value.items():
        yield (*at, key)
        if isinstance(inner, dict):
            yield from places(inner, (*at, key))


def at_place(value: Config, place: tuple[str, ...]) -> Any:
    """What a path leads to."""
    found: Any = value
    for key in place:
        found = found[key]
    return found


def replaced(value: Config, place: tuple[str, ...], by: object) -> Config:
    """A copy with another value at a path."""
    found = copy.deepcopy(value)
    at_place(found, place[:-1])[place[-1]] = by
    return found
