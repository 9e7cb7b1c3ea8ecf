"""Configuration and names that several families share."""

from __future__ import annotations

from loaders.errors import BadCheckpoint
from loaders.formats.config import Config

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


def common(config: Config, quantized: bool = False) -> None:
    """Marks the keys no family needs, and refuses weights that are already quantized, unless the family reads such."""
    config.ignore(*IRRELEVANT)
    if not quantized:
        config.expect("quantization_config")
    config.expect("attention_bias", False)
    config.expect("tie_encoder_decoder", False)


def heads(config: Config, default: int | None = None) -> tuple[int, int]:
    """(query heads, key-value heads); the second must divide the first. Absent, ``default`` holds; null: as many."""
    q = config.int("num_attention_heads", high=1 << 16)
    absent = q if default is None or "num_key_value_heads" in config.data else default
    kv = config.int("num_key_value_heads", default=absent, high=1 << 16)
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
