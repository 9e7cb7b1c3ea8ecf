"""Qwen3 mixtures (``model_type: qwen3_moe``): Qwen3 whose feed-forwards are experts, eight of 128 for each token."""

from __future__ import annotations

from loaders.families import Family
from loaders.families.common import (
    EXPERT_NAMES,
    OLD_BUFFERS,
    PRE_NORM_NAMES,
    QK_NORM_NAMES,
    choice,
    common,
    context,
    count,
    eps,
    head_dim,
    heads,
    size,
    vocab,
)
from loaders.families.rope import rope
from loaders.formats.config import Config
from loaders.layout import Names
from loaders.network.spec import Attention, Experts, FeedForward, Gated, Layer, Model, Router

NAMES: Names = {**PRE_NORM_NAMES, **QK_NORM_NAMES, **EXPERT_NAMES}


def parse(config: Config) -> Model:
    """Experts in every layer, but where the config keeps a dense one."""
    common(config)
    config.expect("hidden_act", "silu")
    config.ignore("output_router_logits", "router_aux_loss_coef")
    # Qwen3 Coder says so of what its class has anyway.
    config.expect("qkv_bias", False)
    config.expect("use_qk_norm", True)
    config.expect("shared_expert_intermediate_size", 0)
    dim, layers = size(config, "hidden_size"), count(config)
    q, kv = heads(config, default=4)
    head = head_dim(config, dim, q)
    positions = context(config, 32768)
    rotation = rope(config, head, positions)
    attention = Attention(q, kv, head, head**-0.5, rotation, window(config), qk_norm="head")
    dense, mixture = Gated(size(config, "intermediate_size"), "silu"), experts(config)
    kept = dense_layers(config, layers)
    ffns: list[FeedForward] = [dense if i in kept else mixture for i in range(layers)]
    return Model(
        family="qwen3_moe",
        vocab=vocab(config),
        dim=dim,
        layers=tuple(Layer(attention, ffn) for ffn in ffns),
        eps=eps(config),
        tied=config.bool("tie_word_embeddings", default=False),
        context=positions,
    )


def window(config: Config) -> int | None:
    """One window for all layers or none. Files of old carry ``max_window_layers``, which this family has given up."""
    on = config.bool("use_sliding_window", default=False)
    length = config.int("sliding_window", default=4096)
    if on and not config.null("sliding_window"):
        config.expect("max_window_layers", 0)
        return length
    config.ignore("max_window_layers")
    return None


def experts(config: Config) -> Experts:
    """The mixture of a layer; what transformers saves has the other name for the number of experts."""
    total, active = choice(config, "num_experts", "num_local_experts", experts=128, active=8)
    router = Router("softmax", normalized=config.bool("norm_topk_prob", default=False))
    return Experts(total, active, size(config, "moe_intermediate_size"), "silu", router)


def dense_layers(config: Config, layers: int) -> set[int]:
    """Layers named one by one, and all whose number, counted from 1, the step does not divide."""
    named = config.ints("mlp_only_layers", default=(), low=0, high=layers - 1)
    step = config.int("decoder_sparse_step", default=1)
    return {*named, *(i for i in range(layers) if (i + 1) % step)}


FAMILY = Family("Qwen3 MoE", ("qwen3_moe",), parse, NAMES, OLD_BUFFERS)
