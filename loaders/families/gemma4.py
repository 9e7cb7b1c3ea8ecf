"""Gemma 4 text, E2B and E4B (``gemma4_text``, and the text part of ``gemma4``)."""

from __future__ import annotations

from math import sqrt

from loaders.errors import BadCheckpoint
from loaders.families import Family
from loaders.families.common import (
    FULL,
    PLE_NAMES,
    SANDWICH,
    SANDWICH_NAMES,
    SLIDING,
    UNSHARED,
    common,
    context,
    count,
    eps,
    head_dim,
    heads,
    kv_sources,
    size,
    span,
    text_of,
    tied,
    vocab,
)
from loaders.families.rope import rope_of
from loaders.formats.config import Config
from loaders.network.spec import PLE, Attention, Gated, Layer, Model, Proportional, Rope

NAMES = {**SANDWICH_NAMES, **PLE_NAMES, "layers.{}.scalar": "layers.{}.layer_scalar"}
TEXT_ONLY = ("*vision_tower.*", "*audio_tower.*", "*embed_vision.*", "*embed_audio.*")
OUTSIDE = ("vision_config", "audio_config", "*_token_id", "*_token_index", "*_soft_tokens_*")
# What configures mechanisms that are refused when they are on.
OFF = (
    "num_experts",
    "top_k_experts",
    "*moe_intermediate_size",
    "expert_intermediate_size",
    "num_global_key_value_heads",
)


def parse(config: Config) -> Model:
    """The text model: a PLE on a single residual, and full layers of another head size than sliding ones."""
    text = text_of(config, "gemma4_text", *OUTSIDE)
    common(text)
    text.expect("hidden_activation", "gelu_pytorch_tanh")
    text.expect("enable_moe_block", False)
    text.expect("attention_k_eq_v", False)
    text.expect("use_bidirectional_attention", "vision")  # among an image's tokens, of which there are none
    text.ignore(*OFF)
    dim = size(text, "hidden_size")
    rows = text.int("vocab_size_per_layer_input", default=262_144, high=1 << 24)
    width = text.int("hidden_size_per_layer_input", default=256, low=0, high=1 << 14)
    return Model(
        family="gemma4",
        vocab=vocab(text, 262_144),
        dim=dim,
        layers=parse_layers(text, dim),
        eps=eps(text),
        tied=tied(config, text, default=True),
        context=context(text, 131_072),
        embed_scale=sqrt(dim),
        softcap=text.float("final_logit_softcapping", default=None, low=0.0),
        ple=PLE(rows, width) if width else None,
    )


def parse_layers(text: Config, dim: int) -> tuple[Layer, ...]:
    """Layers that share keys and values may have a wider feed-forward; the last layer always sees everything."""
    q, kv = heads(text, 4, queries=8)
    layers = count(text)
    default = tuple(FULL if (i + 1) % 6 == 0 or i + 1 == layers else SLIDING for i in range(layers))
    kinds = text.strings("layer_types", length=layers, default=default, choices=(SLIDING, FULL))
    if kinds[-1] != FULL:
        field = text.field(f"layer_types[{layers - 1}]")
        raise BadCheckpoint(f'"{kinds[-1]}"', file=text.file, field=field, expected=f'"{FULL}" in the last layer')
    sizes, sources = head_dims(text, dim, q, kinds), kv_sources(text, kinds, 0)
    width, window = size(text, "intermediate_size"), span(text, "sliding_window", 512)
    wide = 2 if text.bool("use_double_wide_mlp", default=False) else 1

    def layer(i: int) -> Layer:
        source = sources[i]
        if source is not None and sizes[source] != sizes[i]:
            expected = f"{sizes[source]} as in layer {source}, whose keys it reads"
            raise BadCheckpoint(sizes[i], file=text.file, field=text.field(f"head_dim of layer {i}"), expected=expected)
        rotation = rope(text, kinds[i], sizes[i])
        seen = window if kinds[i] == SLIDING else None
        attention = Attention(q, kv, sizes[i], 1.0, rotation, seen, qk_norm="head", v_norm=True, kv_from=source)
        return Layer(attention, Gated(width if source is None else wide * width, "gelu_tanh"), SANDWICH, scalar=True)

    return tuple(map(layer, range(layers)))


def head_dims(text: Config, dim: int, q: int, kinds: tuple[str, ...]) -> list[int]:
    """The head size of each layer: published files give two, transformers writes down the layers that differ."""
    plain = head_dim(text, dim, q, default=256)
    full = text.int("global_head_dim", default=512, low=2, high=1 << 14)
    each = text.sub("per_layer_config", default=None)
    if each is None:
        sizes = [plain if kind == SLIDING else full for kind in kinds]
    else:
        keys = {int(key): key for key in each.data if key.isdecimal() and len(key) < 9}  # "04", as there are tens
        own = [each.sub(keys.get(i, str(i)), default=None) for i in range(len(kinds))]
        sizes = [plain if sub is None else head_dim(sub, dim, q, default=plain) for sub in own]
    if odd := [found for found in sizes if found % 2]:
        raise BadCheckpoint(odd[0], file=text.file, field=text.field("global_head_dim"), expected="an even number")
    return sizes


def rope(text: Config, kind: str, head: int) -> Rope:
    """Full layers turn a quarter of their pairs, and slowly; sliding layers turn all of them."""
    both = text.sub("rope_parameters", default=None)
    if both is None:
        return Rope(1e4, head) if kind == SLIDING else Rope(1e6, head, Proportional(head // 8))
    own = both.sub(kind)
    return rope_of(own, head, context(text, 131_072), own.float("rope_theta"), ("default", "proportional"))


FAMILY = Family("Gemma 4 text, E2B and E4B", ("gemma4", "gemma4_text"), parse, NAMES, UNSHARED, TEXT_ONLY)
