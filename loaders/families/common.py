"""Configuration and names that several families share."""

from __future__ import annotations

from loaders.errors import BadCheckpoint
from loaders.formats.config import REQUIRED, Config, Required
from loaders.layout import Place
from loaders.network.spec import Norm

# Keys that say nothing about what the network computes at inference.
IRRELEVANT = (
    "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "_name_or_path", "auto_map",
    "trust_remote_code", "_attn_implementation*", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type",
    "torchscript", "unsloth_*", "transformers.js_config", "gradient_checkpointing", "license", "use_return_dict",
)  # fmt: skip

ATTENTION_NAMES = {
    "embed": "embed_tokens.weight",
    "norm": "norm.weight",
    "head": "lm_head.weight",
    "layers.{}.norm.attn_in": "layers.{}.input_layernorm.weight",
    "layers.{}.attn.q": "layers.{}.self_attn.q_proj.weight",
    "layers.{}.attn.k": "layers.{}.self_attn.k_proj.weight",
    "layers.{}.attn.v": "layers.{}.self_attn.v_proj.weight",
    "layers.{}.attn.o": "layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn.gate": "layers.{}.mlp.gate_proj.weight",
    "layers.{}.ffn.up": "layers.{}.mlp.up_proj.weight",
    "layers.{}.ffn.down": "layers.{}.mlp.down_proj.weight",
}

# In pre-norm models the norm called "post attention" is the one before the FFN.
PRE_NORM_NAMES = {**ATTENTION_NAMES, "layers.{}.norm.ffn_in": "layers.{}.post_attention_layernorm.weight"}

QK_NORM_NAMES = {
    "layers.{}.attn.q_norm": "layers.{}.self_attn.q_norm.weight",
    "layers.{}.attn.k_norm": "layers.{}.self_attn.k_norm.weight",
}

# The Gemmas since the third: a norm before and after both branches, and two kinds of attention.
SLIDING, FULL = "sliding_attention", "full_attention"
SANDWICH: tuple[Norm, ...] = ("attn_in", "attn_out", "ffn_in", "ffn_out")
SANDWICH_NAMES = {
    **ATTENTION_NAMES,
    **QK_NORM_NAMES,
    "layers.{}.norm.attn_out": "layers.{}.post_attention_layernorm.weight",
    "layers.{}.norm.ffn_in": "layers.{}.pre_feedforward_layernorm.weight",
    "layers.{}.norm.ffn_out": "layers.{}.post_feedforward_layernorm.weight",
}

PLE_NAMES = {
    "ple.table": "embed_tokens_per_layer.weight",
    "ple.proj": "per_layer_model_projection.weight",
    "ple.norm": "per_layer_projection_norm.weight",
    "layers.{}.ple.gate": "layers.{}.per_layer_input_gate.weight",
    "layers.{}.ple.proj": "layers.{}.per_layer_projection.weight",
    "layers.{}.ple.norm": "layers.{}.post_per_layer_input_norm.weight",
}

# Only matched for tensors no layer asked for: layers that own keys and values consume theirs.
UNSHARED = {
    f"*layers.*.self_attn.{name}.weight": "a layer that shares keys and values has no use for its own"
    for name in ("k_proj", "v_proj", "k_norm")
}

# Files that give every expert tensors of its own.
EXPERT_NAMES: dict[str, str | Place] = {
    "layers.{}.experts.router": "layers.{}.mlp.gate.weight",
    **{
        f"layers.{{}}.experts.{part}": Place(f"layers.{{}}.mlp.experts.{{}}.{part}_proj.weight", each=True)
        for part in ("gate", "up", "down")
    },
}

OLD_BUFFERS = {"*.rotary_emb.inv_freq": "a buffer that follows from the config"}


def common(config: Config, quantized: bool = False) -> None:
    """Marks the keys no family needs, and refuses weights that are already quantized, unless the family reads such."""
    config.ignore(*IRRELEVANT)
    if not quantized:
        config.expect("quantization_config")
    config.expect("attention_bias", False)
    config.expect("tie_encoder_decoder", False)


def heads(config: Config, default: int | None = None, queries: int | Required = REQUIRED) -> tuple[int, int]:
    """(query heads, key-value heads); the second must divide the first.

    ``default``: key-value heads where the config names none (None: as many as query heads); ``queries``: query heads.
    """
    q = config.int("num_attention_heads", default=queries, high=1 << 16)
    kv = config.int("num_key_value_heads", default=q if default is None else default, high=1 << 16)
    if q % kv:
        field, expected = config.field("num_key_value_heads"), f"a divisor of num_attention_heads={q}"
        raise BadCheckpoint(kv, file=config.file, field=field, expected=expected)
    return q, kv


def head_dim(config: Config, dim: int, q: int, default: int | None = None) -> int:
    """The explicit head_dim, or dim / heads, which must divide. Rotation needs it even."""
    if not config.has("head_dim") and default is None and dim % q:
        raise BadCheckpoint(
            dim, file=config.file, field="hidden_size", expected=f"a multiple of num_attention_heads={q}"
        )
    size = config.int("head_dim", default=default or dim // q, high=1 << 14)
    if size % 2:
        raise BadCheckpoint(size, file=config.file, field="head_dim", expected="an even number")
    return size


def count(config: Config) -> int:
    """The number of layers."""
    return config.int("num_hidden_layers", high=4096)


def context(config: Config, default: int) -> int:
    """Positions the model was made for. Absurd values are cut: nothing is sized by this number alone."""
    return min(config.int("max_position_embeddings", default=default, high=1 << 62), 1 << 30)


def vocab(config: Config, default: int | Required = REQUIRED) -> int:
    """Rows of the token embedding."""
    return config.int("vocab_size", default=default, high=1 << 24)


def size(config: Config, key: str) -> int:
    """A width of the network."""
    return config.int(key, high=1 << 20)


def eps(config: Config, default: float = 1e-6) -> float:
    """The epsilon of every norm."""
    return config.float("rms_norm_eps", default=default, low=0.0)


def choice(config: Config, *keys: str, experts: int, active: int) -> tuple[int, int]:
    """(experts, how many of them a token runs through). ``keys``: names of the first number; both have defaults."""
    total = config.int(*keys, default=experts, high=1 << 16)
    chosen = config.int("num_experts_per_tok", default=active, high=1 << 16)
    if chosen > total:
        field = config.field("num_experts_per_tok")
        raise BadCheckpoint(chosen, file=config.file, field=field, expected=f"at most {keys[0]}={total}")
    return total, chosen


def text_of(config: Config, kind: str, *ignored: str) -> Config:
    """The part of a config that describes the text model, whose model_type is ``kind``: itself, or its text_config.

    ``ignored``: what else a multimodal config holds.
    """
    if config.str("model_type") == kind:
        return config
    common(config)
    config.ignore(*ignored)
    text = config.sub("text_config")
    text.expect("model_type", kind)
    return text


def tied(config: Config, text: Config, default: bool) -> bool:
    """Whether the head is the embedding. A multimodal config may say it outside, inside, or twice the same."""
    outer = config.bool("tie_word_embeddings", default=None)
    inner = text.bool("tie_word_embeddings", default=default if outer is None else outer)
    if outer is not None and inner != outer:
        field = text.field("tie_word_embeddings")
        raise BadCheckpoint(inner, file=text.file, field=field, expected=f"{outer} as in tie_word_embeddings")
    return inner


def span(config: Config, key: str, default: int) -> int:
    """Keys a query sees. An explicit null is refused where ``default`` would quietly take its place."""
    if config.null(key):
        raise BadCheckpoint("null", file=config.file, field=config.field(key), expected="an integer")
    return config.int(key, default=default)


def kv_sources(text: Config, kinds: tuple[str, ...], default: int) -> list[int | None]:
    """For each layer the one whose keys and values it reads: the last of its own kind before sharing begins.

    ``default``: how many layers share where the config does not say.
    """
    shared = text.int("num_kv_shared_layers", default=default, low=0)
    first = len(kinds) - shared
    if first < 1:
        raise BadCheckpoint(
            shared, file=text.file, field="num_kv_shared_layers", expected=f"less than num_hidden_layers={len(kinds)}"
        )
    last = {kind: i for i, kind in enumerate(kinds[:first])}
    for i in range(first, len(kinds)):
        if kinds[i] not in last:
            raise BadCheckpoint(
                f"layer {i} shares keys of kind {kinds[i]!r}",
                file=text.file,
                field="num_kv_shared_layers",
                expected=f"a layer of that kind before layer {first}",
            )
    return [None if i < first else last[kind] for i, kind in enumerate(kinds)]
