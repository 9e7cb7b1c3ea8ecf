"""Mistral 7B and its like (``mistral``), and the text part of Mistral Small 3.1 (``mistral3``)."""

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
    text_of,
    vocab,
)
from loaders.families.rope import rope
from loaders.formats.config import Config
from loaders.network.spec import Attention, Gated, Layer, Model

# Tied embeddings, too, are not about the text: transformers writes true beside heads of their own.
OUTSIDE = (
    "vision_config", "vision_feature_layer", "image_token_i*", "projector_hidden_act", "multimodal_projector_bias",
    "spatial_merge_size", "tie_word_embeddings",
)  # fmt: skip
TEXT_ONLY = ("*vision_tower.*", "*multi_modal_projector.*")


def parse(config: Config) -> Model:
    """The text model; a multimodal config is entered at ``text_config`` and the rest of it left alone."""
    text = text_of(config, "mistral", *OUTSIDE)
    text.str("model_type")
    common(text)
    text.expect("hidden_act", "silu")
    dim = size(text, "hidden_size")
    q, kv = heads(text, default=8)
    head = head_dim(text, dim, q)
    positions = context(text, 131_072)
    attention = Attention(q, kv, head, head**-0.5, rope(text, head, positions), window(text))
    ffn = Gated(size(text, "intermediate_size"), "silu")
    return Model(
        family="mistral",
        vocab=vocab(text),
        dim=dim,
        layers=(Layer(attention, ffn),) * count(text),
        eps=eps(text),
        tied=text.bool("tie_word_embeddings", default=False),
        context=positions,
    )


def window(text: Config) -> int | None:
    """The window of every layer. Absent, that of Mistral 7B v0.1 holds; only an explicit null switches it off."""
    return None if text.null("sliding_window") else text.int("sliding_window", default=4096)


FAMILY = Family("Mistral", ("mistral", "mistral3"), parse, PRE_NORM_NAMES, OLD_BUFFERS, TEXT_ONLY)
