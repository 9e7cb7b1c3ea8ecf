"""GPT-2 (``model_type: gpt2``): learned positions, norms that subtract the mean, biases, no gate."""

from __future__ import annotations

from loaders.errors import BadCheckpoint
from loaders.families import Family
from loaders.families.common import common, vocab
from loaders.formats.config import Config
from loaders.layout import Names, Place
from loaders.network.spec import Attention, Layer, Model, Plain

QKV = ("attn.q", "attn.k", "attn.v")
QKV_BIAS = tuple(f"{name}_bias" for name in QKV)

# Matrices are stored as [in, out].
NAMES: Names = {
    "embed": "wte.weight",
    "positions": "wpe.weight",
    "norm": "ln_f.weight",
    "norm_bias": "ln_f.bias",
    "head": "lm_head.weight",
    **{f"layers.{{}}.{n}": Place("h.{}.attn.c_attn.weight", QKV, across=True, transposed=True) for n in QKV},
    **{f"layers.{{}}.{n}": Place("h.{}.attn.c_attn.bias", QKV_BIAS) for n in QKV_BIAS},
    "layers.{}.attn.o": Place("h.{}.attn.c_proj.weight", transposed=True),
    "layers.{}.attn.o_bias": "h.{}.attn.c_proj.bias",
    "layers.{}.ffn.up": Place("h.{}.mlp.c_fc.weight", transposed=True),
    "layers.{}.ffn.up_bias": "h.{}.mlp.c_fc.bias",
    "layers.{}.ffn.down": Place("h.{}.mlp.c_proj.weight", transposed=True),
    "layers.{}.ffn.down_bias": "h.{}.mlp.c_proj.bias",
    "layers.{}.norm.attn_in": "h.{}.ln_1.weight",
    "layers.{}.norm.attn_in_bias": "h.{}.ln_1.bias",
    "layers.{}.norm.ffn_in": "h.{}.ln_2.weight",
    "layers.{}.norm.ffn_in_bias": "h.{}.ln_2.bias",
}

MASK = "the causal mask, which follows from the config"
IGNORE = {"*h.*.attn.bias": MASK, "*h.*.attn.masked_bias": MASK}

IRRELEVANT = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "n_special", "predict_special_tokens", "output_past",
    "summary_*", "task_specific_params", "_num_labels",
)  # fmt: skip


def parse(config: Config) -> Model:
    """The baseline that every other family departs from."""
    common(config)
    config.ignore(*IRRELEVANT)
    config.str("activation_function", default="gelu_new", choices=("gelu_new", "gelu_pytorch_tanh"))
    config.expect("scale_attn_by_inverse_layer_idx", False)
    config.expect("reorder_and_upcast_attn", False)
    config.expect("add_cross_attention", False)
    dim, q = config.int("n_embd", default=768, high=1 << 20), config.int("n_head", default=12, high=1 << 16)
    if dim % q:
        raise BadCheckpoint(dim, file=config.file, field="n_embd", expected=f"a multiple of n_head={q}")
    head = dim // q
    scaled = config.bool("scale_attn_weights", default=True)
    attention = Attention(q, q, head, head**-0.5 if scaled else 1.0, None, bias=True)
    ffn = Plain(config.int("n_inner", default=4 * dim, high=1 << 22), "gelu_tanh")
    positions = config.int("n_positions", default=1024, high=1 << 24)
    return Model(
        family="gpt2",
        vocab=vocab(config),
        dim=dim,
        layers=(Layer(attention, ffn),) * config.int("n_layer", default=12, high=4096),
        eps=config.float("layer_norm_epsilon", default=1e-5, low=0.0),
        tied=config.bool("tie_word_embeddings", default=True),
        context=positions,
        positions=positions,
        layer_norm=True,
    )


FAMILY = Family("GPT-2", ("gpt2",), parse, NAMES, IGNORE)
