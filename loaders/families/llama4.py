"""Llama 4 Scout and Maverick (``llama4_text``, and the text part of ``llama4``)."""

from __future__ import annotations

from dataclasses import replace

from loaders.families import Family
from loaders.families.common import (
    FULL,
    OLD_BUFFERS,
    PRE_NORM_NAMES,
    choice,
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
from loaders.families.rope import rope
from loaders.formats.config import Config
from loaders.layout import Place
from loaders.network.spec import Attention, Experts, FeedForward, Gated, Layer, Model, QKNorm, Router, Temperature

CHUNKED = "chunked_attention"
EXPERTS = "layers.{}.feed_forward.experts"
# All experts' gates and ups in one tensor [experts, dim, 2 * width].
GATE_UP = Place(f"{EXPERTS}.gate_up_proj", beside=("experts.gate", "experts.up"), across=True, transposed=True)
NAMES: dict[str, str | Place] = {
    **PRE_NORM_NAMES,
    **{f"layers.{{}}.ffn.{part}": f"layers.{{}}.feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")},
    "layers.{}.experts.router": "layers.{}.feed_forward.router.weight",
    "layers.{}.experts.gate": GATE_UP,
    "layers.{}.experts.up": GATE_UP,
    "layers.{}.experts.down": Place(f"{EXPERTS}.down_proj", transposed=True),
    **{
        f"layers.{{}}.shared.{part}": f"layers.{{}}.feed_forward.shared_expert.{part}_proj.weight"
        for part in ("gate", "up", "down")
    },
}
TEXT_ONLY = ("*vision_model.*", "*multi_modal_projector.*")
# The rest are losses and noise of training.
TRAINING = (
    "for_llm_compressor",
    "cache_implementation",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)


def parse(config: Config) -> Model:
    """The text model: layers that rotate see their own chunk, every fourth sees everything and does not rotate."""
    text = text_of(config, "llama4_text", "vision_config", "*_token_index", "*_token_id")
    common(text)
    text.ignore(*TRAINING)
    text.expect("hidden_act", "silu")
    dim, layers = size(text, "hidden_size"), count(text)
    attention, ffn = attentions(text, dim, layers), feed_forwards(text, layers)
    return Model(
        family="llama4",
        vocab=vocab(text, 202_048),
        dim=dim,
        layers=tuple(map(Layer, attention, ffn)),
        eps=eps(text, 1e-5),
        tied=tied(config, text, default=False),
        context=context(text, 131_072),
    )


def attentions(text: Config, dim: int, layers: int) -> list[Attention]:
    """Which layers rotate is one list, which are cut into chunks another, derived from the first unless given."""
    q, kv = heads(text, 8, queries=40)
    head = head_dim(text, dim, q, default=128)
    rotation = replace(rope(text, head, context(text, 131_072), 500_000.0), interleaved=True)
    norm: QKNorm | None = "unweighted" if text.bool("use_qk_norm", default=True) else None
    rotating = Attention(q, kv, head, head**-0.5, rotation, qk_norm=norm)
    still = Attention(q, kv, head, head**-0.5, None, temperature=temperature(text))
    rotates = rotating_layers(text, layers)
    default = tuple(CHUNKED if turns else FULL for turns in rotates)
    kinds = text.strings("layer_types", length=layers, default=default, choices=(CHUNKED, FULL))
    chunk = span(text, "attention_chunk_size", 8192)
    return [
        replace(rotating if turns else still, chunk=chunk if kind == CHUNKED else None)
        for turns, kind in zip(rotates, kinds, strict=True)
    ]


def rotating_layers(text: Config, layers: int) -> tuple[int, ...]:
    """1 where a layer rotates, in spite of the key's name; an empty list stands for none given."""
    interval = text.int("no_rope_layer_interval", default=4)
    if text.raw("no_rope_layers") in (None, []):
        return tuple(int((i + 1) % interval != 0) for i in range(layers))
    return text.ints("no_rope_layers", length=layers, low=0, high=1)


def temperature(text: Config) -> Temperature | None:
    """Queries of layers without positions, which grow with the context. Early files say 4 for true."""
    found = Temperature(text.float("attn_scale", default=0.1), text.int("floor_scale", default=8192))
    on = text.raw("attn_temperature_tuning") == 4 or text.bool("attn_temperature_tuning", default=True)
    return found if on else None


def feed_forwards(text: Config, layers: int) -> list[FeedForward]:
    """Mixtures in the layers listed, or in every so many; the others are dense and wider."""
    width = size(text, "intermediate_size")
    experts, active = choice(text, "num_local_experts", experts=16, active=1)
    shared = Gated(width, "silu")
    mixture = Experts(experts, active, width, "silu", Router("sigmoid", on_input=True), shared)
    dense = Gated(text.int("intermediate_size_mlp", default=16_384, high=1 << 20), "silu")
    step = text.int("interleave_moe_layer_step", default=1)
    default = tuple(range(step - 1, layers, step))
    mixed = set(text.ints("moe_layers", default=default, low=0, high=layers - 1))
    return [mixture if i in mixed else dense for i in range(layers)]


FAMILY = Family("Llama 4 Scout and Maverick", ("llama4", "llama4_text"), parse, NAMES, OLD_BUFFERS, TEXT_ONLY)
