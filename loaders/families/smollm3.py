"""SmolLM3 (``model_type: smollm3``): Llama whose every fourth layer knows no positions."""

from __future__ import annotations

from dataclasses import replace

from loaders.families import Family
from loaders.families.common import (
    FULL,
    OLD_BUFFERS,
    PRE_NORM_NAMES,
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
    """Windows, where a config switches them on, hold for the layers without positions."""
    common(config)
    config.expect("mlp_bias", False)
    config.expect("hidden_act", "silu")
    config.ignore("pretraining_tp", "max_window_layers")
    dim, layers = size(config, "hidden_size"), count(config)
    q, kv = heads(config, default=4)
    head = head_dim(config, dim, q)
    positions = context(config, 32768)
    attention = Attention(q, kv, head, head**-0.5, rope(config, head, positions, theta=2_000_000.0))
    rotated = rotates(config, layers)
    seen = windows(config, rotated)
    ffn = Gated(size(config, "intermediate_size"), "silu")
    return Model(
        family="smollm3",
        vocab=vocab(config),
        dim=dim,
        layers=tuple(
            Layer(replace(attention, rope=attention.rope if turns else None, window=window), ffn)
            for turns, window in zip(rotated, seen, strict=True)
        ),
        eps=eps(config),
        tied=config.bool("tie_word_embeddings", default=True),
        context=positions,
    )


def rotates(config: Config, layers: int) -> tuple[int, ...]:
    """1 for a layer that rotates. ``no_rope_layers`` lists, despite its name, those that do; it beats the interval."""
    interval = config.int("no_rope_layer_interval", default=4)
    default = tuple(int((i + 1) % interval != 0) for i in range(layers))
    return config.ints("no_rope_layers", length=layers, default=default, low=0, high=1)


def windows(config: Config, rotated: tuple[int, ...]) -> list[int | None]:
    """The window of each layer; None sees everything. A kind of layer that nothing switches on is refused."""
    on = config.bool("use_sliding_window", default=False)
    length = config.int("sliding_window", default=None)
    window = length if on else None
    default = tuple(FULL if turns or window is None else SLIDING for turns in rotated)
    choices = (FULL,) if window is None else (FULL, SLIDING)
    kinds = config.strings("layer_types", length=len(rotated), default=default, choices=choices)
    return [window if kind == SLIDING else None for kind in kinds]


FAMILY = Family("SmolLM3", ("smollm3",), parse, PRE_NORM_NAMES, OLD_BUFFERS)
