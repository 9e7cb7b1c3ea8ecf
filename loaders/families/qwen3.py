"""Qwen3 dense (``model_type: qwen3``): Llama with norms on queries and keys and an explicit head size."""

from __future__ import annotations

from dataclasses import replace

from loaders.families import Family
from loaders.families.common import (
    FULL,
    OLD_BUFFERS,
    PRE_NORM_NAMES,
    QK_NORM_NAMES,
    SLIDING,
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
    """Windows, where a config switches them on, hold for the layers from ``max_window_layers`` on."""
    common(config)
    config.expect("hidden_act", "silu")
    dim, layers = size(config, "hidden_size"), count(config)
    q, kv = heads(config)
    head = head_dim(config, dim, q, default=128)
    positions = context(config, 32768)
    attention = Attention(q, kv, head, head**-0.5, rope(config, head, positions), qk_norm="head")
    ffn = Gated(size(config, "intermediate_size"), "silu")
    return Model(
        family="qwen3",
        vocab=vocab(config),
        dim=dim,
        layers=tuple(Layer(replace(attention, window=window), ffn) for window in windows(config, layers)),
        eps=eps(config),
        tied=config.bool("tie_word_embeddings", default=False),
        context=positions,
    )


def windows(config: Config, layers: int) -> list[int | None]:
    """The window of each layer; None sees everything."""
    on = config.bool("use_sliding_window", default=False)
    first = config.int("max_window_layers", default=28, low=0)
    # Absent, transformers' default holds; an explicit null switches windows off.
    length = config.int("sliding_window", default=4096)
    window = length if on and not config.null("sliding_window") else None
    default = tuple(SLIDING if window and i >= first else FULL for i in range(layers))
    kinds = config.strings("layer_types", length=layers, default=default, choices=(FULL, SLIDING))
    return [window if kind == SLIDING else None for kind in kinds]


FAMILY = Family("Qwen3 dense", ("qwen3",), parse, {**PRE_NORM_NAMES, **QK_NORM_NAMES}, OLD_BUFFERS)
