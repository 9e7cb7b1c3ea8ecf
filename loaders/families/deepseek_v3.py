"""DeepSeek V3, R1 and what follows their shape: Moonlight (``model_type: deepseek_v3``), Kimi K2 (``kimi_k2``)."""

from __future__ import annotations

from dataclasses import replace

from loaders.errors import BadCheckpoint
from loaders.families import Family
from loaders.families.common import (
    EXPERT_NAMES,
    OLD_BUFFERS,
    PRE_NORM_NAMES,
    choice,
    common,
    context,
    count,
    eps,
    size,
    vocab,
)
from loaders.families.rope import mscale, rope, weight
from loaders.formats.config import Config
from loaders.formats.placed import FP8_BLOCK
from loaders.layout import Place
from loaders.network.spec import Experts, Gated, LatentAttention, Layer, Model, Router, Yarn

# Of the norms of latents: that of their class, whatever rms_norm_eps says, in the published code and in transformers.
# Moonlight says 1e-5; vLLM and llama.cpp take that for these norms too.
LATENT_EPS = 1e-6


def parse(config: Config) -> Model:
    """Latent attention everywhere; the first layers are dense, the rest are mixtures with shared experts."""
    common(config, quantized=True)
    fp8(config)
    config.ignore("aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "output_router_logits")
    config.expect("hidden_act", "silu")
    positions, layers = context(config, 4096), count(config)
    attention = latent(config, positions)
    dense, mixture = Gated(size(config, "intermediate_size"), "silu"), experts(config)
    first = config.int("first_k_dense_replace", default=3, low=0)
    if first > layers:
        expected = f"at most num_hidden_layers={layers}"
        raise BadCheckpoint(first, file=config.file, field="first_k_dense_replace", expected=expected)
    return Model(
        family="deepseek_v3",
        vocab=vocab(config),
        dim=size(config, "hidden_size"),
        layers=(Layer(attention, dense),) * first + (Layer(attention, mixture),) * (layers - first),
        eps=eps(config),
        tied=config.bool("tie_word_embeddings", default=False),
        context=positions,
        lookahead=config.int("num_nextn_predict_layers", "num_mtp_layers", default=0, low=0, high=16),
    )


def latent(config: Config, positions: int) -> LatentAttention:
    """Attention over one latent per token. A head is ``qk_nope_head_dim`` values and ``qk_rope_head_dim`` rotated."""
    heads = config.int("num_attention_heads", high=1 << 16)
    config.int("num_key_value_heads", default=heads, high=1 << 16)
    config.expect("num_key_value_heads", heads)
    nope = config.int("qk_nope_head_dim", default=128, high=1 << 14)
    turned = config.int("qk_rope_head_dim", default=64, high=1 << 14)
    if turned % 2:
        raise BadCheckpoint(turned, file=config.file, field="qk_rope_head_dim", expected="an even number")
    config.expect("qk_head_dim", nope + turned)
    config.expect("head_dim", turned)
    found = rope(config, turned, positions, kinds=("default", "yarn"))
    # Absent it is 1536; an explicit null projects queries directly.
    rank = config.int("q_lora_rank", default=1536, high=1 << 20)
    return LatentAttention(
        heads=heads,
        q_rank=None if config.null("q_lora_rank") else rank,
        kv_rank=config.int("kv_lora_rank", default=512, high=1 << 20),
        nope_dim=nope,
        v_dim=config.int("v_head_dim", default=128, high=1 << 14),
        scale=(nope + turned) ** -0.5 * sharpened(config, found.scaling) ** 2,
        rope=replace(found, interleaved=config.bool("rope_interleave", default=True)),
        eps=LATENT_EPS,
    )


def sharpened(config: Config, scaling: object) -> float:
    """What queries and keys of a stretched context are both multiplied by, rotated or not."""
    if not isinstance(scaling, Yarn):
        return 1.0
    subs = [config.sub(key, default=None) for key in ("rope_parameters", "rope_scaling")]
    weights = {weight(sub, "mscale_all_dim") for sub in subs if sub is not None}
    if len(weights) > 1:
        expected = "the same as in rope_parameters"
        raise BadCheckpoint("another", file=config.file, field="rope_scaling.mscale_all_dim", expected=expected)
    return mscale(scaling.factor, weights.pop())


def experts(config: Config) -> Experts:
    """Sigmoid routing without an auxiliary loss: a bias evens out the load, groups bound the traffic."""
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    config.expect("moe_layer_freq", 1)
    width = config.int("moe_intermediate_size", default=2048, high=1 << 20)
    shared = config.int("n_shared_experts", default=1, high=1 << 10)
    router = Router(
        "sigmoid",
        normalized=config.bool("norm_topk_prob", default=True),
        scale=config.float("routed_scaling_factor", default=2.5, low=0.0),
        bias=True,
        groups=config.int("n_group", default=8, high=1 << 16),
        active_groups=config.int("topk_group", default=4, high=1 << 16),
    )
    total, active = choice(config, "n_routed_experts", experts=256, active=8)

    def bad(key: str, found: int, expected: str) -> BadCheckpoint:
        return BadCheckpoint(found, file=config.file, field=key, expected=expected)

    if total % router.groups or total // router.groups < 2:
        raise bad("n_group", router.groups, f"groups of two or more, a divisor of n_routed_experts={total}")
    if router.active_groups > router.groups:
        raise bad("topk_group", router.active_groups, f"at most n_group={router.groups}")
    if active > total // router.groups * router.active_groups:
        raise bad(
            "num_experts_per_tok", active, f"what topk_group={router.active_groups} of {router.groups} groups hold"
        )
    return Experts(total, active, width, "silu", router, Gated(width * shared, "silu"))


def fp8(config: Config) -> None:
    """Weights may be e4m3 with a scale per block; how activations would be rounded is no concern of ours."""
    sub = config.sub("quantization_config", default=None)
    if sub is not None:
        sub.str("quant_method", choices=("fp8",))
        sub.expect("fmt", "e4m3")
        sub.expect("activation_scheme", "dynamic")
        sub.expect("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
        sub.expect("scale_fmt", "ue8m0")  # scales that are powers of two, in float32 all the same


# A head's rows of one matrix: what takes the latent to its key, then what takes it to its value.
EXPANSION = "layers.{}.self_attn.kv_b_proj.weight"
KEYS_VALUES = ("attn.k_b", "attn.v_b")

NAMES: dict[str, str | Place] = {
    **PRE_NORM_NAMES,
    "layers.{}.attn.q_a": "layers.{}.self_attn.q_a_proj.weight",
    "layers.{}.attn.q_a_norm": "layers.{}.self_attn.q_a_layernorm.weight",
    "layers.{}.attn.q_b": "layers.{}.self_attn.q_b_proj.weight",
    "layers.{}.attn.kv_a": "layers.{}.self_attn.kv_a_proj_with_mqa.weight",
    "layers.{}.attn.kv_norm": "layers.{}.self_attn.kv_a_layernorm.weight",
    "layers.{}.attn.k_b": Place(EXPANSION, beside=KEYS_VALUES, together=True, transposed=True),
    "layers.{}.attn.v_b": Place(EXPANSION, beside=KEYS_VALUES, together=True),
    **EXPERT_NAMES,
    "layers.{}.experts.bias": "layers.{}.mlp.gate.e_score_correction_bias",
    **{
        f"layers.{{}}.shared.{part}": f"layers.{{}}.mlp.shared_experts.{part}_proj.weight"
        for part in ("gate", "up", "down")
    },
}
IGNORE = {**OLD_BUFFERS, "*layers.{past}.*": "a module that predicts a second token, used in training and to speculate"}

FAMILY = Family("DeepSeek V3, R1 and Kimi K2", ("deepseek_v3", "kimi_k2"), parse, NAMES, IGNORE)
