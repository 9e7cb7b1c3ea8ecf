"""Gemma 3 text (``gemma3_text``, and the text part of ``gemma3``)."""

from __future__ import annotations

from math import sqrt

from loaders.families import Family
from loaders.families.common import (
    FULL,
    OLD_BUFFERS,
    SANDWICH,
    SANDWICH_NAMES,
    SLIDING,
    common,
    context,
    count,
    eps,
    head_dim,
    heads,
    size,
    span,
    text_of,
    tied,
    vocab,
)
from loaders.families.rope import two_ropes
from loaders.formats.config import Config
from loaders.layout import Place
from loaders.network.spec import Attention, Gated, Layer, Model

# Norms multiply by 1 + w, and files keep w.
NAMES = {name: Place(file, offset=1.0) if "norm" in name else file for name, file in SANDWICH_NAMES.items()}
TEXT_ONLY = ("*vision_tower.*", "*multi_modal_projector.*")
OUTSIDE = ("vision_config", "*_token_index", "*_token_id", "mm_tokens_per_image")


def parse(config: Config) -> Model:
    """The text model. Multimodal configs leave out much of it: Gemma 3 4B's values are what holds then."""
    text = text_of(config, "gemma3_text", *OUTSIDE)
    common(text)
    text.ignore("cache_implementation")
    text.expect("hidden_activation", "gelu_pytorch_tanh")
    text.expect("attn_logit_softcapping")
    text.expect("use_bidirectional_attention", False)
    dim = size(text, "hidden_size")
    return Model(
        family="gemma3",
        vocab=vocab(text, 262_208),
        dim=dim,
        layers=parse_layers(text, dim),
        eps=eps(text),
        tied=tied(config, text, default=True),
        context=context(text, 131_072),
        embed_scale=sqrt(dim),
        softcap=text.float("final_logit_softcapping", default=None, low=0.0),
    )


def parse_layers(text: Config, dim: int) -> tuple[Layer, ...]:
    """Every so many layers one sees everything and turns slowly; the others see a window."""
    layers = count(text)
    q, kv = heads(text, 4, queries=8)
    head = head_dim(text, dim, q, default=256)
    scale = text.float("query_pre_attn_scalar", default=256.0, low=0.0) ** -0.5
    # Said a second time under the other name by transformers, which reads neither where there is a list.
    period = text.int("sliding_window_pattern", "_sliding_window_pattern", default=6)
    default = tuple(SLIDING if (i + 1) % period else FULL for i in range(layers))
    kinds = text.strings("layer_types", length=layers, default=default, choices=(SLIDING, FULL))
    # Full layers are stretched from 4B on.
    rotations = two_ropes(text, head, context(text, 131_072), ("default", "linear"))
    window = span(text, "sliding_window", 4096)
    ffn = Gated(size(text, "intermediate_size"), "gelu_tanh")
    kinds_of_attention = {
        SLIDING: Attention(q, kv, head, scale, rotations[SLIDING], window, qk_norm="head"),
        FULL: Attention(q, kv, head, scale, rotations[FULL], qk_norm="head"),
    }
    return tuple(Layer(kinds_of_attention[kind], ffn, SANDWICH) for kind in kinds)


FAMILY = Family("Gemma 3 text", ("gemma3", "gemma3_text"), parse, NAMES, OLD_BUFFERS, TEXT_ONLY)
