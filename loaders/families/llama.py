"""Llama 3.2 and the Llama 2 and 3 models of the same shape (``model_type: llama``)."""

from __future__ import annotations

from loaders.families import Family
from loaders.families.common import (
    OLD_BUFFERS,
    PRE_NORM_NAMES,
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


def parse(config: Config) -> Model:
    """A plain pre-norm decoder with grouped queries and, from Llama 3.1 on, stretched rotary wavelengths."""
    common(config)
    config.expect("mlp_bias", False)
    config.ignore("pretraining_tp")
    config.expect("hidden_act", "silu")
    dim = size(config, "hidden_size")
    q, kv = heads(config)
    head = head_dim(config, dim, q)
    positions = context(config, 2048)
    attention = Attention(q, kv, head, head**-0.5, rope(config, head, positions))
    layer = Layer(attention, Gated(size(config, "intermediate_size"), "silu"))
    return Model(
        family="llama",
        vocab=vocab(config),
        dim=dim,
        layers=(layer,) * count(config),
        eps=eps(config),
        tied=config.bool("tie_word_embeddings", default=False),
        context=positions,
    )


FAMILY = Family("Llama 3.2", ("llama",), parse, PRE_NORM_NAMES, OLD_BUFFERS)
