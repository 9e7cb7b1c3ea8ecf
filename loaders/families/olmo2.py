"""OLMo 2 (``model_type: olmo2``): norms after attention and feed-forward, and over whole queries and keys."""

from __future__ import annotations

from loaders.families import Family
from loaders.families.common import (
    ATTENTION_NAMES,
    OLD_BUFFERS,
    QK_NORM_NAMES,
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
from loaders.network.spec import Attention, Gated, Layer, Model

NAMES = {
    **ATTENTION_NAMES,
    **QK_NORM_NAMES,
    "layers.{}.norm.attn_out": "layers.{}.post_attention_layernorm.weight",
    "layers.{}.norm.ffn_out": "layers.{}.post_feedforward_layernorm.weight",
}


def parse(config: Config) -> Model:
    """Branches are normed on their way back to the residual, and nothing on the way in."""
    common(config)
    config.expect("hidden_act", "silu")
    dim = size(config, "hidden_size")
    q, kv = heads(config)
    head = head_dim(config, dim, q)
    positions = context(config, 2048)
    attention = Attention(q, kv, head, head**-0.5, rope(config, head, positions), qk_norm="whole")
    ffn = Gated(size(config, "intermediate_size"), "silu")
    return Model(
        family="olmo2",
        vocab=vocab(config),
        dim=dim,
        layers=(Layer(attention, ffn, ("attn_out", "ffn_out")),) * count(config),
        eps=eps(config, 1e-5),
        tied=config.bool("tie_word_embeddings", default=False),
        context=positions,
    )


FAMILY = Family("OLMo 2", ("olmo2",), parse, NAMES, OLD_BUFFERS)
