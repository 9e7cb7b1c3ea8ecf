"""Qwen3 MoE, SmolLM3, OLMo 2, Mistral and GPT-2: what is read, and what the files may hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, MistralConfig, Olmo2Config, Qwen3MoeConfig, SmolLM3Config
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint
from loaders.families import families
from loaders.layout import files
from loaders.network.spec import Attention, Experts, Gated, Layer, Model, Plain, Rope, Router
from loaders.network.tensors import active, tensors, total
from tests.conftest import Folder, Open
from tests.makers import Tensors, assert_close, distance, expected, make, prompt, reference, set_config, theirs
from tests.makers import variant as changed
from tests.shrink import parse, real, shrink

# Parameters in all, and those that one token meets.
PARAMETERS = {
    "qwen3-32B": (32_762_123_264, 32_762_123_264),
    "qwen3-30B-A3B": (30_532_122_624, 3_353_032_704),
    "qwen3-235B-A22B": (235_093_634_560, 22_190_763_520),
    "smollm3-3B": (3_075_098_624, 3_075_098_624),
    "olmo2-7B": (7_298_617_344, 7_298_617_344),
    "olmo2-32B": (32_234_279_936, 32_234_279_936),
    "mistral-7B-v0.1": (7_241_732_096, 7_241_732_096),
    "mistral-7B-v0.3": (7_248_023_552, 7_248_023_552),
    # Without 0.44 B of the vision encoder and the projector.
    "mistral-small-3.1-24B": (23_572_403_200, 23_572_403_200),
    "gpt2": (124_439_808, 124_439_808),
    "gpt2-xl": (1_557_611_200, 1_557_611_200),
}
CONFIGS = list(PARAMETERS)
MOE, SMOL, OLMO, SMALL, GPT2 = "qwen3-30B-A3B", "smollm3-3B", "olmo2-7B", "mistral-small-3.1-24B", "gpt2"


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_to_the_digit(name: str) -> None:
    model = parse(real(name))
    assert (total(model), active(model)) == PARAMETERS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_a_place(name: str) -> None:
    """The files hold exactly the parameters of the table, under names without holes."""
    raw = real(name)
    model = parse(raw)
    names = next(f.names for f in families().values() if raw["model_type"] in f.model_types)
    stored = files(names, model)
    assert sum(int(np.prod(filed.shape)) for filed in stored.values()) == total(model)
    assert not any("{" in n for n in stored)


# ---------------------------------------------------------------------------------------------------- facts of layers


def alike(model: Model) -> Layer:
    """The only kind of layer there is."""
    assert len(set(model.layers)) == 1
    return model.layers[0]


@pytest.mark.parametrize(
    ("name", "layers", "q", "width"), [("qwen3-30B-A3B", 48, 32, 768), ("qwen3-235B-A22B", 94, 64, 1536)]
)
def test_qwen3_moe_layers(name: str, layers: int, q: int, width: int) -> None:
    model = parse(real(name))
    attention = Attention(q, 4, 128, 128**-0.5, Rope(1_000_000.0, 128), qk_norm="head")
    experts = Experts(128, 8, width, "silu", Router("softmax", normalized=True))
    assert alike(model) == Layer(attention, experts)
    assert (len(model.layers), model.tied, model.context) == (layers, False, 40_960)


def test_smollm3_layers() -> None:
    model = parse(real("smollm3-3B"))
    attention = Attention(16, 4, 128, 128**-0.5, Rope(5_000_000.0, 128))
    still = replace(attention, rope=None)
    ffn = Gated(11_008, "silu")
    assert model.layers == (*(Layer(attention, ffn),) * 3, Layer(still, ffn)) * 9
    assert model.tied


@pytest.mark.parametrize(
    ("name", "layers", "q", "kv", "width"), [("olmo2-7B", 32, 32, 32, 11_008), ("olmo2-32B", 64, 40, 8, 27_648)]
)
def test_olmo2_layers(name: str, layers: int, q: int, kv: int, width: int) -> None:
    model = parse(real(name))
    attention = Attention(q, kv, 128, 128**-0.5, Rope(500_000.0, 128), qk_norm="whole")
    assert alike(model) == Layer(attention, Gated(width, "silu"), ("attn_out", "ffn_out"))
    assert (len(model.layers), model.eps) == (layers, 1e-6)
    table = tensors(model)
    assert table["layers.0.attn.q_norm"] == (q * 128,)
    assert table["layers.0.attn.k_norm"] == (kv * 128,)


def test_mistral_layers() -> None:
    small, old, new = (parse(real(f"mistral-{name}")) for name in ("small-3.1-24B", "7B-v0.1", "7B-v0.3"))
    # 32 heads of 128 are not 5120: the head's size is said.
    wide = Attention(32, 8, 128, 128**-0.5, Rope(1_000_000_000.0, 128))
    assert alike(small) == Layer(wide, Gated(32_768, "silu"))
    assert (small.dim, small.tied, small.context) == (5120, False, 131_072)
    assert alike(old).attention == replace(wide, rope=Rope(10_000.0, 128), window=4096)
    assert alike(new).attention == replace(wide, rope=Rope(1_000_000.0, 128))


@pytest.mark.parametrize(("name", "layers", "q"), [("gpt2", 12, 12), ("gpt2-xl", 48, 25)])
def test_gpt2_layers(name: str, layers: int, q: int) -> None:
    model = parse(real(name))
    attention = Attention(q, q, 64, 64**-0.5, None, bias=True)
    assert alike(model) == Layer(attention, Plain(4 * 64 * q, "gelu_tanh"))
    assert (len(model.layers), model.positions, model.context) == (layers, 1024, 1024)
    assert (model.layer_norm, model.tied, model.eps) == (True, True, 1e-5)


# ---------------------------------------------------------------------------------------------------------- defaults

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (Qwen3MoeConfig, (*SIZES, "moe_intermediate_size")),
        (SmolLM3Config, SIZES),
        (Olmo2Config, SIZES),
        (MistralConfig, SIZES),
        (GPT2Config, ("vocab_size",)),
    ],
)
def test_defaults_are_those_of_transformers(kind: Any, keys: tuple[str, ...]) -> None:
    """A config that says little means what transformers takes it to mean, and so does one that says all."""
    saved = kind().to_dict()
    assert parse({"model_type": kind.model_type, **{k: saved[k] for k in keys}}) == parse(saved)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "qwen3-32B"])
def test_what_transformers_saves_means_the_same(name: str) -> None:
    raw = real(name)
    _, config = theirs(raw)
    assert parse(json.loads(config.to_json_string(use_diff=False))) == parse(raw)


@pytest.mark.parametrize("keys", [{}, {"sliding_window": None}, {"sliding_window": 64}])
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("kind", [Qwen3MoeConfig, MistralConfig, SmolLM3Config])
def test_windows_are_those_of_transformers(kind: Any, on: bool, keys: dict[str, Any]) -> None:
    """An absent window is not a window of null."""
    raw = {k: v for k, v in kind().to_dict().items() if k not in ("sliding_window", "layer_types")}
    raw.update(keys)
    if "use_sliding_window" in raw:
        raw["use_sliding_window"] = on
    config = kind.from_dict(raw)
    kinds = getattr(config, "layer_types", ["sliding_attention"] * config.num_hidden_layers)
    wanted = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    assert [layer.attention.window for layer in parse(raw).layers] == wanted


@pytest.mark.parametrize("keys", [{}, {"no_rope_layer_interval": 3}, {"no_rope_layers": [0] + [1] * 35}])
def test_layers_that_rotate_are_those_of_transformers(keys: dict[str, Any]) -> None:
    raw = {k: v for k, v in real("smollm3-3B").items() if not k.startswith("no_rope")}
    raw.update(keys)
    wanted = [bool(turns) for turns in SmolLM3Config.from_dict(raw).no_rope_layers]
    assert [layer.attention.rope is not None for layer in parse(raw).layers] == wanted


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mlp_only_layers": None},
        {"mlp_only_layers": [0, 2]},
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 3, "mlp_only_layers": [5]},
        {"decoder_sparse_step": 7},
    ],
)
def test_dense_layers_are_those_of_transformers(keys: dict[str, Any]) -> None:
    raw = {**shrink(real("qwen3-30B-A3B")), "num_hidden_layers": 6, **keys}
    kind, config = theirs(raw)
    with torch.device("meta"):
        layers = kind(config).model.layers
    wanted = [isinstance(layer.mlp, Qwen3MoeSparseMoeBlock) for layer in layers]
    model = parse(raw)
    assert [isinstance(layer.ffn, Experts) for layer in model.layers] == wanted
    for layer in model.layers:
        key = "moe_intermediate_size" if isinstance(layer.ffn, Experts) else "intermediate_size"
        assert layer.ffn.width == raw[key]


def test_routers_of_both_kinds() -> None:
    raw = real("qwen3-30B-A3B")
    for normalized in (True, False):
        ffn = parse({**raw, "norm_topk_prob": normalized}).layers[0].ffn
        assert isinstance(ffn, Experts)
        assert ffn.router == Router("softmax", normalized=normalized)


def test_number_of_experts_has_two_names() -> None:
    raw = real("qwen3-30B-A3B")
    other = {**raw, "num_local_experts": raw["num_experts"]}
    assert parse(other) == parse(raw)
    del other["num_experts"]
    assert parse(other) == parse(raw)


def test_the_text_part_alone_is_the_same_model() -> None:
    raw = real("mistral-small-3.1-24B")
    assert parse(raw["text_config"]) == parse(raw)
    # transformers writes it for the whole, whatever the text's is.
    assert parse({**raw, "tie_word_embeddings": True}) == parse(raw)


def test_gpt2_variants() -> None:
    raw = real("gpt2")
    assert alike(parse({**raw, "n_inner": 3000})).ffn.width == 3000
    assert alike(parse({**raw, "scale_attn_weights": False})).attention.scale == 1.0  # type: ignore[union-attr]
    assert parse({**raw, "activation_function": "gelu_pytorch_tanh"}) == parse(raw)
    assert not parse({**raw, "tie_word_embeddings": False}).tied


# ------------------------------------------------------------------------------------------------------- checkpoints

KINDS = ["sliding_attention", "full_attention"]
# Configs that no published file has, but that a family reads. ``...`` takes a key away.
DERIVED: dict[str, tuple[str, dict[str, Any]]] = {
    "moe-some-dense": (MOE, {"mlp_only_layers": [1]}),
    "moe-every-second": (MOE, {"decoder_sparse_step": 2}),
    "moe-as-chosen": (MOE, {"norm_topk_prob": False}),
    "moe-window": (MOE, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": ...}),
    "smol-window": (SMOL, {"use_sliding_window": True, "sliding_window": 9, "layer_types": ...}),
    "smol-kinds": (SMOL, {"use_sliding_window": True, "sliding_window": 9, "layer_types": KINDS * 4}),
    "olmo-tied": (OLMO, {"tie_word_embeddings": True}),
    "gpt2-untied": (GPT2, {"tie_word_embeddings": False}),
    "gpt2-unscaled": (GPT2, {"scale_attn_weights": False}),
    "gpt2-inner": (GPT2, {"n_inner": 70}),
}


def small(name: str, **keys: Any) -> dict[str, Any]:
    """The text part of a shrunk config, with other values."""
    raw = shrink(real(name))
    return {k: v for k, v in {**raw.get("text_config", raw), **keys}.items() if v is not ...}


@pytest.mark.parametrize("case", DERIVED)
def test_logits_of_configs_that_no_file_has(case: str, tmp_path: Path, opened: Open) -> None:
    name, keys = DERIVED[case]
    folder = make(tmp_path / "new", small(name, **keys))
    model = reference(folder)
    ids = prompt(model.config.vocab_size, 40)
    wanted = expected(model, ids)
    session = opened(folder)
    assert_close(session.logits(ids), wanted)
    session.reset()
    session.step(ids[:20])
    assert_close(np.stack([session.step(ids[i : i + 1]) for i in range(20, 40)]), wanted[20:])


@pytest.mark.parametrize("name", [MOE, SMOL, OLMO, SMALL, GPT2])
def test_folders_that_transformers_saved(name: str, folders: Folder, tmp_path: Path, opened: Open) -> None:
    """With the config it writes, which spells some keys in another way."""
    raw = small(name)
    folder = make(tmp_path / "saved", raw, saved_config=True)
    ids = prompt(raw["vocab_size"], 12)
    assert np.array_equal(opened(folder).logits(ids), opened(folders(name)).logits(ids))


def published_small(tensors: Tensors) -> Tensors:
    """The names of the upload of Mistral Small 3.1, with stand-ins for its vision encoder."""
    vision = {
        "vision_tower.patch_conv.weight": torch.zeros(4, 3, 2, 2),
        "vision_tower.transformer.layers.0.attention.q_proj.weight": torch.zeros(6, 6),
        "multi_modal_projector.linear_1.weight": torch.zeros(5, 6),
        "multi_modal_projector.patch_merger.merging_layer.weight": torch.zeros(6, 24),
    }
    return {**{f"language_model.{name}": t for name, t in tensors.items()}, **vision}


def newer_small(tensors: Tensors) -> Tensors:
    """The names that transformers 5 gives the same tensors."""
    text = {
        name if name == "lm_head.weight" else "model.language_model." + name.removeprefix("model."): t
        for name, t in tensors.items()
    }
    return {**text, "model.vision_tower.ln_pre.weight": torch.zeros(6)}


@pytest.mark.parametrize("names", [published_small, newer_small])
def test_text_of_a_multimodal_folder(
    names: Callable[[Tensors], Tensors], folders: Folder, tmp_path: Path, opened: Open
) -> None:
    folder = changed(folders(SMALL), tmp_path / "whole", names)
    (folder / "config.json").write_text(json.dumps(shrink(real(SMALL))))
    ids = prompt(546, 12)
    assert np.array_equal(opened(folder).logits(ids), opened(folders(SMALL)).logits(ids))
    checkpoint = Checkpoint.open(folder)
    vision = names({})
    assert checkpoint.skipped_bytes == sum(t.nbytes for t in vision.values())
    assert checkpoint.ignored == ()
    checkpoint.close()


def old_gpt2(tensors: Tensors) -> Tensors:
    """The names of the upload: no prefix, and the causal masks that files held then."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril() for i in range(2)}
    return {**{name.removeprefix("transformer."): t for name, t in tensors.items()}, **masks}


def test_gpt2_as_it_was_uploaded(folders: Folder, tmp_path: Path, opened: Open) -> None:
    folder = changed(folders(GPT2), tmp_path / "old", old_gpt2)
    ids = prompt(251, 12)
    assert np.array_equal(opened(folder).logits(ids), opened(folders(GPT2)).logits(ids))
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.ignored) == {"h.0.attn.bias", "h.1.attn.bias"}
    checkpoint.close()


def test_gpt2_reads_each_position(folders: Folder, opened: Open) -> None:
    """The same token twice: nothing but its position tells one from the other. Past the last row there is none."""
    session = opened(folders(GPT2))
    assert session.plan.context <= 256
    same = session.logits(np.full(8, 7))
    assert min(distance(same[i : i + 1], same[:1]) for i in range(1, 8)) > 0.01


@pytest.mark.parametrize("name", [MOE, SMOL, OLMO, SMALL, GPT2])
def test_every_missing_tensor_is_named(name: str, folders: Folder, tmp_path: Path) -> None:
    """All of them, one at a time, each expert among them."""
    source = folders(name)
    checkpoint = Checkpoint.open(source)
    wanted = sorted({piece.tensor.name for placed in checkpoint.where.values() for piece in placed.pieces})
    checkpoint.close()
    folder = changed(source, tmp_path / "less", lambda t: t)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    assert set(wanted) == set(header) - {"__metadata__"}
    with path.open("r+b") as file:
        for missing in wanted:
            renamed = {(k[:-1] + "x" if k == missing else k): v for k, v in header.items()}
            file.seek(8)
            file.write(json.dumps(renamed, separators=(",", ":")).encode().ljust(length))
            file.flush()
            with pytest.raises(BadCheckpoint) as info:
                Checkpoint.open(folder)
            assert missing.removeprefix("model.").removeprefix("transformer.") in str(info.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (MOE, "model.layers.1.mlp.experts.5.up_proj.weight", "[24, 64] by config.json"),
        (MOE, "model.layers.1.mlp.experts.0.down_proj.weight", "[64, 24] by config.json"),
        (MOE, "model.layers.2.mlp.gate.weight", "[8, 64] by config.json"),
        (OLMO, "model.layers.1.self_attn.q_norm.weight", "[128] by config.json"),
        (GPT2, "transformer.h.1.attn.c_attn.weight", "[48, 144] by config.json"),
        (GPT2, "transformer.h.1.attn.c_attn.bias", "[144] by config.json"),
        (GPT2, "transformer.h.0.mlp.c_fc.weight", "[48, 192] by config.json"),
        (GPT2, "transformer.wpe.weight", "[256, 48] by config.json"),
    ],
)
def test_wrong_shapes_are_refused(name: str, tensor: str, message: str, folders: Folder, tmp_path: Path) -> None:
    t = load_file(folders(name) / "model.safetensors")[tensor]
    for i, other in enumerate((t[:-1], t.T if t.ndim == 2 else t[None])):
        folder = changed(folders(name), tmp_path / f"shape{i}", lambda found, other=other: {**found, tensor: other})
        with pytest.raises(BadCheckpoint) as info:
            Checkpoint.open(folder)
        assert tensor in str(info.value)
        assert message in str(info.value)


def test_experts_that_the_config_does_not_count(folders: Folder, tmp_path: Path) -> None:
    """More in the file than the config says, or fewer: neither runs."""
    folder = changed(folders(MOE), tmp_path / "count", lambda t: t)
    for experts, message in ((7, "shape [8, 64]"), (9, "shape [8, 64]")):
        set_config(folder, num_experts=experts)
        with pytest.raises(BadCheckpoint, match=r"mlp\.gate\.weight") as info:
            Checkpoint.open(folder)
        assert message in str(info.value)
    extra = "model.layers.0.mlp.experts.8.up_proj.weight"
    folder = changed(folders(MOE), tmp_path / "extra", lambda t: {**t, extra: torch.zeros(24, 64)})
    with pytest.raises(BadCheckpoint, match="no place for"):
        Checkpoint.open(folder)


def test_norms_of_other_places_are_refused(folders: Folder, tmp_path: Path) -> None:
    """OLMo 2 norms nothing on the way in: a file that has such norms is another model's."""
    extra = "model.layers.0.input_layernorm.weight"
    folder = changed(folders(OLMO), tmp_path / "norm", lambda t: {**t, extra: torch.ones(128)})
    with pytest.raises(BadCheckpoint, match=extra):
        Checkpoint.open(folder)
