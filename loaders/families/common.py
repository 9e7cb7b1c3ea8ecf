"""Configuration and names that several families share."""

from __future__ import annotations

from loaders.errors import BadCheckpoint
from loaders.formats.config import Config
from loaders.network.spec import Llama3Scaling, Rope

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

OLD_BUFFERS = {"*.rotary_emb.inv_freq": "a buffer that follows from the config"}


def common(config: Config) -> None:
    """Marks the keys no family needs, and refuses a checkpoint whose weights are already quantized."""
    config.ignore(*IRRELEVANT)
    config.expect("quantization_config")
    config.expect("attention_bias", False)
    config.expect("tie_encoder_decoder", False)


def heads(config: Config) -> tuple[int, int]:
    """(query heads, key-value heads); the second must divide the first."""
    q = config.int("num_attention_heads", high=1 << 16)
    kv = config.int("num_key_value_heads", default=q, high=1 << 16)
    if q % kv:
        raise BadCheckpoint(
            kv, file=config.file, field="num_key_value_heads", expected=f"a divisor of num_attention_heads={q}"
        )
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


def rope(config: Config, dim: int, context: int, theta: float = 10_000.0) -> Rope:
    """Rotary positions in the new spelling (rope_parameters) or the old (rope_theta and rope_scaling)."""
    return agreed(
        config, config.sub("rope_parameters", default=None), "rope_theta", "rope_scaling", dim, context, theta
    )


def agreed(
    config: Config, new: Config | None, base: str, scaling: str | None, dim: int, context: int, theta: float
) -> Rope:
    """One rotation from both spellings. Files may carry the old one beside the new; the two must then agree."""
    outer = config.float(base, default=None, low=0.0)
    old = config.sub(scaling, default=None) if scaling is not None else None
    theta = theta if outer is None else outer
    if new is None:
        return Rope(theta, dim) if old is None else rope_of(old, dim, context, theta)
    found = rope_of(new, dim, context, theta)
    if outer is not None and found.theta != outer:
        raise BadCheckpoint(
            outer, file=config.file, field=config.field(base), expected=f"{found.theta} as in rope_parameters"
        )
    if old is not None and rope_of(old, dim, context, found.theta) != found:
        raise BadCheckpoint("other than rope_parameters", file=config.file, field=config.field(str(scaling)))
    return found


def rope_of(sub: Config, dim: int, context: int, theta: float) -> Rope:
    """One set of rope parameters; ``theta`` is what holds when it names none."""
    theta = sub.float("rope_theta", default=theta, low=0.0)
    sub.expect("partial_rotary_factor", 1.0, 1)
    kind = sub.str("rope_type", "type", default="default", choices=("default", "llama3"))
    if kind == "default":
        return Rope(theta, dim)
    low, high = sub.float("low_freq_factor", low=0.0), sub.float("high_freq_factor", low=0.0)
    if high <= low:
        expected = f"more than low_freq_factor={low}"
        raise BadCheckpoint(high, file=sub.file, field=sub.field("high_freq_factor"), expected=expected)
    original = sub.int("original_max_position_embeddings", default=context)
    return Rope(theta, dim, Llama3Scaling(sub.float("factor", low=0.0), low, high, original))


def count(config: Config) -> int:
    """The number of layers."""
    return config.int("num_hidden_layers", high=4096)


def context(config: Config, default: int) -> int:
    """Positions the model was made for. Absurd values are cut: nothing is sized by this number alone."""
    return min(config.int("max_position_embeddings", default=default, high=1 << 62), 1 << 30)


def vocab(config: Config) -> int:
    """Rows of the token embedding."""
    return config.int("vocab_size", high=1 << 24)


def size(config: Config, key: str) -> int:
    """A width of the network."""
    return config.int(key, high=1 << 20)


def eps(config: Config, default: float = 1e-6) -> float:
    """The epsilon of every norm."""
    return config.float("rms_norm_eps", default=default, low=0.0)
