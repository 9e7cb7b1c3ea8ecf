"""Gemma 3n text (``gemma3n_text``, and the text part of ``gemma3n``)."""

from __future__ import annotations

from math import sqrt
from typing import Any

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
    text_of,
    vocab,
)
from loaders.families.gemma3n_slices import nested, slices
from loaders.families.rope import two_ropes
from loaders.formats.config import Config
from loaders.network.matformer import Slice
from loaders.network.spec import PLE, AltUp, Attention, Gated, Laurel, Layer, Model

NAMES = {
    **SANDWICH_NAMES,
    **PLE_NAMES,
    **{f"altup.expand.{k}": f"altup_projections.{k - 1}.weight" for k in range(1, 16)},
    **{f"altup.merge.{k}": f"altup_unembed_projections.{k - 1}.weight" for k in range(1, 16)},
    "layers.{}.laurel.left": "layers.{}.laurel.linear_left.weight",
    "layers.{}.laurel.right": "layers.{}.laurel.linear_right.weight",
    "layers.{}.laurel.norm": "layers.{}.laurel.post_laurel_norm.weight",
    "layers.{}.altup.router": "layers.{}.altup.modality_router.weight",
    "layers.{}.altup.norm": "layers.{}.altup.router_norm.weight",
    "layers.{}.altup.predict": "layers.{}.altup.prediction_coefs.weight",
    "layers.{}.altup.correct": "layers.{}.altup.correction_coefs.weight",
    "layers.{}.altup.scale": "layers.{}.altup.correct_output_scale",
}

IGNORE = {**UNSHARED, "*layers.*.altup.correct_output_scale": "altup_correct_scale is off"}

TEXT_ONLY = ("*vision_tower.*", "*audio_tower.*", "*embed_vision.*", "*embed_audio.*")
OUTSIDE = ("vision_config", "audio_config", "*_token_id", "*_soft_tokens_*", "tie_word_embeddings")


def parse(config: Config) -> Model:
    """The text model; a multimodal config is entered at ``text_config`` and the rest of it left alone."""
    text = text_of(config, "gemma3n_text", *OUTSIDE)
    common(text)
    # The scale is 1; clipping and learning rates belong to training.
    text.ignore("query_pre_attn_scalar", "altup_coef_clip", "altup_lr_multiplier")
    text.expect("hidden_activation", "gelu_pytorch_tanh")
    layers = parse_layers(text)
    dim = text.int("hidden_size", default=2048, high=1 << 20)
    streams = text.int("altup_num_inputs", default=4, low=2, high=16)
    softcap = text.float("final_logit_softcapping", default=30.0, low=0.0)
    # The published file pads the vocabulary past the table: ids beyond it look up row 0.
    ple = PLE(
        rows=text.int("vocab_size_per_layer_input", default=262_144, high=1 << 24),
        dim=text.int("hidden_size_per_layer_input", default=256, high=1 << 14),
    )
    return Model(
        family="gemma3n",
        vocab=vocab(text),
        dim=dim,
        layers=layers,
        eps=eps(text),
        tied=text.bool("tie_word_embeddings", default=True),
        context=context(text, 32_768),
        embed_scale=sqrt(dim),
        # Absent, the default holds; an explicit null switches it off.
        softcap=None if text.null("final_logit_softcapping") else softcap,
        ple=ple,
        altup=AltUp(
            streams,
            text.int("altup_active_idx", default=0, low=0, high=streams - 1),
            text.bool("altup_correct_scale", default=True),
        ),
        laurel=Laurel(text.int("laurel_rank", default=64, high=1 << 16)),
        nested=nested(dim, layers),
    )


def parse_layers(text: Config) -> tuple[Layer, ...]:
    """Every per-layer list, turned into one record per layer."""
    layers, positions = count(text), context(text, 32_768)
    q, kv = heads(text)
    head = head_dim(text, q, q, default=256)
    kinds = text.strings(
        "layer_types",
        length=layers,
        default=tuple(FULL if (i + 1) % 5 == 0 else SLIDING for i in range(layers)),
        choices=(SLIDING, FULL),
    )
    widths = per_layer(text, "intermediate_size", layers)
    sparsity = sparsities(text, layers)
    sources = kv_sources(text, kinds, 15)
    rotations = two_ropes(text, head, positions)
    window = text.int("sliding_window", default=512)

    def attention(i: int) -> Attention:
        return Attention(
            heads=q,
            kv_heads=kv,
            head_dim=head,
            scale=1.0,
            rope=rotations[kinds[i]],
            window=window if kinds[i] == SLIDING else None,
            qk_norm="head",
            v_norm=True,
            kv_from=sources[i],
        )

    return tuple(Layer(attention(i), Gated(widths[i], "gelu_tanh", sparsity[i]), SANDWICH) for i in range(layers))


def per_layer(text: Config, key: str, layers: int) -> tuple[int, ...]:
    """A scalar for all layers, or a list with one value for each."""
    if isinstance(text.raw(key), list):
        return text.ints(key, length=layers, high=1 << 20)
    return (text.int(key, high=1 << 20),) * layers


def sparsities(text: Config, layers: int) -> tuple[float, ...]:
    """The share of gate values cut in each layer. An explicit null means the published pattern, not none."""
    value = text.raw("activation_sparsity_pattern")
    if value is None:
        sparse = 10 if layers > 10 else 0
        return (0.95,) * sparse + (0.0,) * (layers - sparse)
    if isinstance(value, list):
        pattern = text.floats("activation_sparsity_pattern", length=layers)
    else:
        pattern = (text.float("activation_sparsity_pattern"),) * layers
    for share in pattern:
        if not 0.0 <= share < 1.0:
            raise BadCheckpoint(share, file=text.file, field="activation_sparsity_pattern", expected="0 <= share < 1")
    return pattern


def sliced_config(raw: dict[str, Any], model: Model, part: Slice) -> dict[str, Any]:
    """The ``config.json`` of a slice, as a text-only model: every per-layer list filtered by the kept layers."""
    text = dict(raw.get("text_config", raw))
    for key in ("dtype", "torch_dtype"):
        if key in raw:
            text.setdefault(key, raw[key])
    layers = [model.layers[i] for i in part.keep]
    text.update(
        architectures=["Gemma3nForCausalLM"],
        model_type="gemma3n_text",
        num_hidden_layers=len(layers),
        intermediate_size=list(part.widths),
        layer_types=[FULL if layer.attention.window is None else SLIDING for layer in layers],
        activation_sparsity_pattern=[layer.ffn.sparsity if isinstance(layer.ffn, Gated) else 0.0 for layer in layers],
        num_kv_shared_layers=sum(layer.attention.kv_from is not None for layer in layers),
    )
    return text


FAMILY = Family("Gemma 3n text", ("gemma3n", "gemma3n_text"), parse, NAMES, IGNORE, TEXT_ONLY, slices, sliced_config)
