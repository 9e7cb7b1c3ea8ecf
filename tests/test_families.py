"""What the families read: full-size parses, what is refused by name, and checkpoints that must match their config."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3nTextConfig, LlamaConfig, Qwen3Config

from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, EdgeError, MissingFile, Unsupported
from loaders.families import FILES, families
from loaders.network.spec import AltUp, Attention, Llama3Scaling, Model, Rope, mechanisms
from loaders.network.tensors import head, tensors, total
from tests.conftest import Folder, Open
from tests.makers import Tensors, assert_close, distance, prompt, set_config, theirs, variant
from tests.refusals import change_in, refused
from tests.shrink import GEMMA, NAMES, kinds, parse, real, shrink

PARAMETERS = {
    "llama-3.2-1B": 1_235_814_400,
    "llama-3.2-3B": 3_212_749_824,
    "llama-3.1-8B": 8_030_261_248,
    "qwen3-0.6B": 596_049_920,
    "qwen3-8B": 8_190_735_360,
    "qwen3-30B-A3B": 30_532_122_624,
    "smollm3-3B": 3_075_098_624,
    "olmo2-7B": 7_298_617_344,
    "olmo2-32B": 32_234_279_936,
    "mistral-7B-v0.1": 7_241_732_096,
    "mistral-small-3.1-24B": 23_572_403_200,
    "gpt2": 124_439_808,
    "gemma-3-1B": 999_885_952,
    "gemma-3-4B": 3_880_263_168,
    "gemma-4-E2B": 4_628_569_379,
    "gemma-4-E4B": 7_463_013_418,
    "llama-4-scout-17B-16E": 107_769_861_120,
    "llama-4-maverick-17B-128E": 400_711_848_960,
    # Without the module for the token after next, which is not run.
    "deepseek-v3": 671_026_419_200,
    "kimi-k2": 1_026_408_232_448,
    "moonlight-16B-A3B": 15_960_110_208,
    # Without the keys and values that sharing layers carry in vain: see test_slices.
    "gemma-3n-E2B": 4_456_156_768 - 20_974_080,
    "gemma-3n-E4B": 6_866_696_688 - 31_461_120,
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_to_the_digit(name: str) -> None:
    assert total(parse(real(name))) == PARAMETERS[name]


# GPT-2's names for what all others call the same.
OLD_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
}


@pytest.mark.parametrize("name", NAMES)
def test_facts_of_the_published_configs(name: str) -> None:
    raw, model = real(name), parse(real(name))
    text = raw.get("text_config", raw)

    if "vocab_size" not in text:  # Gemma 3 4B leaves to transformers what transformers takes for granted
        text = theirs(raw)[1].to_dict()

    def said(key: str) -> Any:
        return text[key if key in text else OLD_KEYS[key]]

    assert (model.vocab, model.dim, len(model.layers)) == (
        text["vocab_size"],
        said("hidden_size"),
        said("num_hidden_layers"),
    )
    assert model.context == said("max_position_embeddings")
    assert model.eps == said("rms_norm_eps")
    if "tie_word_embeddings" in text:
        assert model.tied == text["tie_word_embeddings"]
    assert head(model) == ("embed" if model.tied else "head")
    a = model.layers[0].attention
    assert a.heads == said("num_attention_heads")
    if isinstance(a, Attention):
        assert a.kv_heads == said("num_key_value_heads")
        assert a.head_dim == text.get("head_dim", model.dim // a.heads)


def test_gemma_layers() -> None:
    for name, shared in (("gemma-3n-E4B", 15), ("gemma-3n-E2B", 10)):
        model = parse(real(name))
        for i, layer in enumerate(model.layers):
            full = i % 5 == 4
            assert layer.attention.window == (None if full else 512)
            assert layer.attention.rope == Rope(1_000_000.0 if full else 10_000.0, 256)
            assert layer.attention.kv_from == (None if i < 20 else 19 if full else 18)
            assert layer.ffn.sparsity == (0.95 if i < 10 else 0.0)
            assert layer.attention.scale == 1.0
            assert layer.attention.qk_norm == "head"
            assert layer.attention.v_norm
        assert sum(layer.attention.kv_from is not None for layer in model.layers) == shared
        assert model.last_writer == 19
        assert model.altup == AltUp(4, 0, True)
        assert model.softcap == 30.0
        assert model.embed_scale == 2048**0.5


def test_llama_rope() -> None:
    wanted = Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert parse(real("llama-3.2-1B")).layers[0].attention.rope == Rope(500_000.0, 64, wanted)
    assert parse(real("llama-3.1-8B")).layers[0].attention.rope == Rope(500_000.0, 128, replace(wanted, factor=8.0))
    assert parse(real("qwen3-8B")).layers[0].attention.rope == Rope(1_000_000.0, 128)


@pytest.mark.parametrize("name", NAMES)
def test_shrinking_switches_nothing_off(name: str) -> None:
    """The assertion is in shrink; here it is shown to bite."""
    small = shrink(real(name))
    assert total(parse(small)) < 10_000_000
    broken = copy.deepcopy(small)
    text = broken.get("text_config", broken)
    switch: dict[str, Any] = {
        "gemma3n_text": {"num_kv_shared_layers": 0},
        "gemma4_text": {"num_kv_shared_layers": 0},
        "llama": {"rope_scaling": None, "rope_parameters": None},
        "qwen3_moe": {"norm_topk_prob": False},
        "smollm3": {"no_rope_layers": [1] * 8},
    }
    text.update(switch.get(text["model_type"], {"tie_word_embeddings": not parse(small).tied}))
    was, now = parse(real(name)), parse(broken)
    assert mechanisms(now) != mechanisms(was) or kinds(now) != kinds(was)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gemma-3n-E2B", {"activation_sparsity_pattern": [0.0] * 15}),
        ("gemma-3n-E2B", {"layer_types": ["full_attention"] * 15}),
        ("gemma-3n-E2B", {"altup_correct_scale": False}),
        ("gemma-3n-E2B", {"final_logit_softcapping": None}),
        ("gemma-3n-E2B", {"tie_word_embeddings": False}),
        ("llama-3.2-1B", {"rope_scaling": None}),
        ("llama-3.2-1B", {"tie_word_embeddings": False}),
    ],
)
def test_mechanisms_see_what_is_switched_off(name: str, keys: dict[str, Any]) -> None:
    raw = shrink(real(name))
    assert mechanisms(parse({**raw, **keys})) != mechanisms(parse(raw))


# ---------------------------------------------------------------------------------------------- spellings and defaults


def test_defaults_are_those_of_transformers() -> None:
    """A config that says little means what transformers takes it to mean."""
    gemma = Gemma3nTextConfig().to_dict()
    said = {"model_type": "gemma3n_text", "num_hidden_layers": 35, "intermediate_size": 16384}
    needed = {k: gemma[k] for k in ("vocab_size", "num_attention_heads", "num_key_value_heads")}
    assert parse({**said, **needed}) == parse(gemma) == parse(real("gemma-3n-E4B"))
    for kind, base in ((LlamaConfig, {}), (Qwen3Config, {"num_key_value_heads": 32})):
        saved = kind().to_dict()
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        assert parse({"model_type": kind.model_type, **base, **{k: saved[k] for k in keys}}) == parse(saved)


def respelled(raw: dict[str, Any]) -> dict[str, Any]:
    """A new-spelling config in the old spelling."""
    old = copy.deepcopy(raw)
    new = old.pop("rope_parameters")
    if "full_attention" in new:
        old["rope_theta"] = new["full_attention"]["rope_theta"]
        old["rope_local_base_freq"] = new["sliding_attention"]["rope_theta"]
    else:
        old["rope_theta"] = new.pop("rope_theta")
        old["rope_scaling"] = new
    return old


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "llama-3.1-8B"])
def test_both_spellings_of_rope(name: str) -> None:
    raw = real(name)
    assert parse(respelled(raw)) == parse(raw)
    assert parse({**respelled(raw), "rope_scaling": None}) != parse(raw) or name.startswith("gemma")


def test_type_is_the_old_name_of_rope_type() -> None:
    raw = real("llama-3.2-1B")
    scaling = raw["rope_scaling"]
    scaling["type"] = scaling.pop("rope_type")
    assert parse(raw) == parse(real("llama-3.2-1B"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt2"])
@pytest.mark.parametrize("theta", [5_000.0, 123_456.0])
def test_rope_theta_is_read(name: str, theta: float) -> None:
    raw = real(name)
    text = raw.get("text_config", raw)
    if "rope_parameters" in text:
        inner = text["rope_parameters"]
        inner.get("full_attention", inner)["rope_theta"] = theta
    else:
        text["rope_theta"] = theta
    ropes = [layer.attention.rope for layer in parse(raw).layers]
    assert theta in {rope.theta for rope in ropes if rope is not None}


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "llama-3.1-8B"])
def test_two_spellings_that_disagree_are_refused(name: str) -> None:
    """transformers lets rope_scaling win over rope_parameters for some, and fills gaps for others: no guessing."""
    new = real(name)
    llama3 = {**real("llama-3.2-1B")["rope_scaling"], "factor": 3.0}
    with pytest.raises(EdgeError, match="rope_scaling"):
        parse({**new, "rope_scaling": llama3})
    with pytest.raises(EdgeError, match="rope_theta"):
        parse({**new, "rope_theta": 77.0})


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "llama-3.1-8B"])
def test_two_spellings_that_agree_are_one(name: str) -> None:
    new = real(name)
    inner = new["rope_parameters"]
    assert parse({**new, "rope_theta": inner.get("full_attention", inner)["rope_theta"]}) == parse(new)
    assert parse({**new, "rope_scaling": None}) == parse(new)


def test_scalar_width_is_a_width_for_every_layer() -> None:
    raw = real("gemma-3n-E2B")
    assert parse({**raw, "intermediate_size": 8192}) == parse(raw)


def test_softcap_off_is_said_with_null(folders: Folder, opened: Open, tmp_path: Path) -> None:
    raw = real("gemma-3n-E2B")
    assert parse({**raw, "final_logit_softcapping": None}).softcap is None
    del raw["final_logit_softcapping"]
    assert parse(raw).softcap == 30.0
    source = folders("gemma-3n-E2B")
    off = opened(set_config(variant(source, tmp_path / "off", lambda t: t), final_logit_softcapping=None))
    capped = opened(source)
    ids = prompt(off.model.vocab, 12)
    logits = off.logits(ids)
    assert_close(capped.logits(ids), (np.tanh(logits.astype(np.float64) / 30.0) * 30.0).astype(np.float32))
    assert distance(logits, capped.logits(ids)) > 0.01


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({}, [None] * 28),
        ({"use_sliding_window": True}, [None] * 28),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 20}, [None] * 20 + [64] * 8),
        ({"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 20}, [None] * 28),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 25,
            },
            [64] * 3 + [None] * 25,
        ),
    ],
)
def test_qwen3_windows(keys: dict[str, Any], windows: list[int | None]) -> None:
    model = parse({**real("qwen3-0.6B"), **keys})
    assert [layer.attention.window for layer in model.layers] == windows


@pytest.mark.parametrize("keys", [{}, {"sliding_window": None}, {"sliding_window": 64}, {"max_window_layers": 0}])
def test_qwen3_windows_are_those_of_transformers(keys: dict[str, Any]) -> None:
    """An absent window is not a window of null."""
    raw = {k: v for k, v in real("qwen3-0.6B").items() if k != "sliding_window"}
    raw.update(use_sliding_window=True, max_window_layers=20)
    raw.update(keys)
    theirs = Qwen3Config.from_dict(raw)
    wanted = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    assert [layer.attention.window for layer in parse(raw).layers] == wanted


# ------------------------------------------------------------------------------------------------------------ refusals

Change = dict[str, Any] | Callable[[dict[str, Any]], None]

REFUSED: dict[str, tuple[str, Change, type[EdgeError], tuple[str, ...]]] = {
    "attention-bias": ("llama-3.2-1B", {"attention_bias": True}, Unsupported, ("attention_bias", "true")),
    "attention-bias-qwen": ("qwen3-8B", {"attention_bias": True}, Unsupported, ("attention_bias", "true")),
    "attention-bias-gemma": ("gemma-3n-E2B", {"attention_bias": True}, Unsupported, ("attention_bias", "true")),
    "mlp-bias": ("llama-3.2-1B", {"mlp_bias": True}, Unsupported, ("mlp_bias", "true")),
    "gelu": ("llama-3.2-1B", {"hidden_act": "gelu"}, Unsupported, ("hidden_act", '"gelu"', '"silu"')),
    "gelu-qwen": ("qwen3-8B", {"hidden_act": "gelu"}, Unsupported, ("hidden_act", '"gelu"')),
    "exact-gelu": ("gemma-3n-E2B", {"hidden_activation": "gelu"}, Unsupported, ("hidden_activation", '"gelu"')),
    "yarn": (
        "qwen3-8B",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        Unsupported,
        ("rope_scaling.rope_type", '"yarn"', "default or llama3"),
    ),
    "linear": (
        "llama-3.1-8B",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        Unsupported,
        ("rope_parameters.rope_type", '"linear"'),
    ),
    "partial-rotary": (
        "llama-3.1-8B",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        Unsupported,
        ("partial_rotary_factor", "0.5"),
    ),
    "bands-the-wrong-way": (
        "llama-3.2-1B",
        lambda raw: raw["rope_scaling"].update(high_freq_factor=0.5),
        BadCheckpoint,
        ("high_freq_factor", "low_freq_factor=1.0"),
    ),
    "rope-without-factor": (
        "llama-3.2-1B",
        lambda raw: raw["rope_scaling"].pop("factor"),
        BadCheckpoint,
        ("rope_scaling.factor", "missing"),
    ),
    "unknown-key": ("llama-3.2-1B", {"attention_sinks": 4}, Unsupported, ("unknown key attention_sinks",)),
    "unknown-key-gemma": ("gemma-3n-E2B", {"attn_logit_softcapping": 50.0}, Unsupported, ("attn_logit_softcapping",)),
    "unknown-nested": (
        "gemma-3n-E4B",
        lambda raw: raw["text_config"].update(num_experts=8),
        Unsupported,
        ("unknown key text_config.num_experts",),
    ),
    "unknown-in-rope": (
        "llama-3.2-1B",
        lambda raw: raw["rope_scaling"].update(beta_fast=32),
        Unsupported,
        ("rope_scaling.beta_fast",),
    ),
    "quantized": ("llama-3.2-1B", {"quantization_config": {"bits": 4}}, Unsupported, ("quantization_config", "absent")),
    "quantized-gemma": ("gemma-3n-E4B", {"quantization_config": {"bits": 4}}, Unsupported, ("quantization_config",)),
    "model-type": (
        "llama-3.2-1B",
        {"model_type": "mamba"},
        Unsupported,
        ("model_type", "'mamba'", "gemma3n, gemma3n_text, ", "llama, ", "qwen3, "),
    ),
    "no-model-type": ("llama-3.2-1B", {"model_type": None}, Unsupported, ("model_type", "None")),
    "odd-model-type": ("llama-3.2-1B", {"model_type": ["llama"]}, Unsupported, ("model_type", "['llama']")),
    "text-of-another": (
        "gemma-3n-E4B",
        lambda raw: raw["text_config"].update(model_type="gemma3_text"),
        Unsupported,
        ("text_config.model_type", '"gemma3_text"'),
    ),
    "no-text-config": ("gemma-3n-E4B", {"text_config": None}, BadCheckpoint, ("text_config", "missing")),
    "widths-length": (
        "gemma-3n-E2B",
        {"intermediate_size": [8192] * 29},
        BadCheckpoint,
        ("intermediate_size", "a list of 29", "a list of 30"),
    ),
    "types-length": (
        "gemma-3n-E2B",
        {"layer_types": ["full_attention"] * 31},
        BadCheckpoint,
        ("layer_types", "a list of 31"),
    ),
    "sparsity-length": (
        "gemma-3n-E2B",
        {"activation_sparsity_pattern": [0.95] * 10},
        BadCheckpoint,
        ("activation_sparsity_pattern", "a list of 10", "30"),
    ),
    "qwen-types-length": (
        "qwen3-0.6B",
        {"layer_types": ["full_attention"]},
        BadCheckpoint,
        ("layer_types", "a list of"),
    ),
    "layer-kind": (
        "gemma-3n-E2B",
        {"layer_types": ["chunked_attention"] * 30},
        Unsupported,
        ("layer_types[0]", '"chunked_attention"'),
    ),
    "kv-heads": (
        "llama-3.2-1B",
        {"num_key_value_heads": 5},
        BadCheckpoint,
        ("num_key_value_heads", "a divisor of num_attention_heads=32"),
    ),
    "odd-head": ("qwen3-8B", {"head_dim": 127}, BadCheckpoint, ("head_dim", "127", "even")),
    "indivisible": (
        "llama-3.2-1B",
        {"head_dim": None, "hidden_size": 2050},
        BadCheckpoint,
        ("hidden_size", "2050", "a multiple of num_attention_heads=32"),
    ),
    "sparsity-one": (
        "gemma-3n-E2B",
        {"activation_sparsity_pattern": [1.0] + [0.0] * 29},
        BadCheckpoint,
        ("activation_sparsity_pattern", "1.0", "0 <= share < 1"),
    ),
    "sparsity-negative": (
        "gemma-3n-E2B",
        {"activation_sparsity_pattern": [0.0] * 29 + [-0.1]},
        BadCheckpoint,
        ("activation_sparsity_pattern", "-0.1"),
    ),
    "sparsity-text": (
        "gemma-3n-E2B",
        {"activation_sparsity_pattern": ["0.95"] * 30},
        BadCheckpoint,
        ("activation_sparsity_pattern[0]", "a finite number"),
    ),
    "all-shared": (
        "gemma-3n-E2B",
        {"num_kv_shared_layers": 30},
        BadCheckpoint,
        ("num_kv_shared_layers", "30", "less than num_hidden_layers=30"),
    ),
    "more-than-all-shared": (
        "gemma-3n-E2B",
        {"num_kv_shared_layers": 31},
        BadCheckpoint,
        ("num_kv_shared_layers", "31"),
    ),
    "no-source-of-its-kind": (
        "gemma-3n-E2B",
        {"num_kv_shared_layers": 27},
        BadCheckpoint,
        ("layer 4 shares keys of kind 'full_attention'", "a layer of that kind before layer 3"),
    ),
    "active-stream": ("gemma-3n-E2B", {"altup_active_idx": 4}, BadCheckpoint, ("altup_active_idx", "from 0 to 3")),
    "one-stream": ("gemma-3n-E2B", {"altup_num_inputs": 1}, BadCheckpoint, ("altup_num_inputs", "from 2 to 16")),
    "no-layers": ("llama-3.2-1B", {"num_hidden_layers": 0}, BadCheckpoint, ("num_hidden_layers", "0")),
    "float-layers": ("llama-3.2-1B", {"num_hidden_layers": 16.0}, BadCheckpoint, ("num_hidden_layers", "16.0")),
    "text-size": ("llama-3.2-1B", {"hidden_size": "2048"}, BadCheckpoint, ("hidden_size", '"2048"')),
    "no-vocab": ("llama-3.2-1B", {"vocab_size": None}, BadCheckpoint, ("vocab_size", "missing")),
    "huge": ("llama-3.2-1B", {"hidden_size": 1 << 40}, BadCheckpoint, ("hidden_size",)),
    "zero-eps": ("llama-3.2-1B", {"rms_norm_eps": 0.0}, BadCheckpoint, ("rms_norm_eps", "> 0")),
    "tied-maybe": ("llama-3.2-1B", {"tie_word_embeddings": 1}, BadCheckpoint, ("tie_word_embeddings", "true or false")),
    "negative-theta": ("llama-3.2-1B", {"rope_theta": -1.0}, BadCheckpoint, ("rope_theta", "-1.0")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_refused_by_name(case: str) -> None:
    name, change, error, messages = REFUSED[case]
    raw = real(name)
    change_in(raw, change)
    refused(raw, error, *messages)


@pytest.mark.parametrize("name", NAMES)
def test_misspelt_keys_are_refused(name: str) -> None:
    """No key of the published config is overlooked when it is misspelt: it is refused, whatever its default."""
    raw = real(name)
    text = raw.get("text_config", raw)
    for key in text:
        changed = copy.deepcopy(raw)
        inside = changed.get("text_config", changed)
        value = inside.pop(key)
        if value is None:
            continue
        inside["misspelt_" + key] = value
        with pytest.raises(EdgeError, match=key):
            parse(changed)


def test_supported_model_types_all_have_a_family() -> None:
    found = families()
    assert set(found) == set(FILES.values())
    for kind, module in FILES.items():
        assert kind in found[module].model_types


# ------------------------------------------------------------------------------------------------ checkpoint strictness

STRICT = ["gemma-3n-E2B", "llama-3.1-8B", "qwen3-0.6B"]


def refusal(folder: Path, error: type[EdgeError], *messages: str) -> str:
    """Opens a folder that must be refused."""
    with pytest.raises(EdgeError) as info:
        Checkpoint.open(folder)
    assert type(info.value) is error, info.value
    assert info.value.exit_code == {BadCheckpoint: 65, Unsupported: 78, MissingFile: 66}[error]
    text = str(info.value)
    for message in messages:
        assert message in text
    assert "\n" not in text
    return text


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def with_tensor(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize("name", STRICT)
def test_every_missing_tensor_is_named(name: str, folders: Folder, tmp_path: Path) -> None:
    """All of them, one at a time: nothing the spec names may be absent."""
    source = folders(name)
    checkpoint = Checkpoint.open(source)
    wanted = {where.name: canonical for canonical, where in checkpoint.where.items()}
    shapes = tensors(checkpoint.model)
    checkpoint.close()
    folder = variant(source, tmp_path / "less", lambda t: t)
    whole = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for missing, canonical in wanted.items():
        renamed = {(k[:-1] + "x" if k == missing else k): v for k, v in header.items()}
        text = json.dumps(renamed, separators=(",", ":")).encode().ljust(size)
        (folder / "model.safetensors").write_bytes(whole[:8] + text + whole[8 + size :])
        found = refusal(folder, BadCheckpoint, missing.removeprefix("model."))
        if canonical != "embed":
            assert f"{missing}: no such tensor (expected shape {list(shapes[canonical])}" in found


@pytest.mark.parametrize("name", STRICT)
def test_extra_tensors_are_listed(name: str, folders: Folder, tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    folder = variant(folders(name), tmp_path / "more", with_tensor(bias, torch.zeros(4)))
    refusal(folder, BadCheckpoint, "no place for", bias)
    folder = variant(folders(name), tmp_path / "adapter", with_tensor("adapter.weight", torch.zeros(4)))
    refusal(folder, BadCheckpoint, "no place for", "adapter.weight")
    many = {f"extra.{i}.weight": torch.zeros(1) for i in range(25)}
    folder = variant(folders(name), tmp_path / "many", lambda t: {**t, **many})
    refusal(folder, BadCheckpoint, "and 15 more")


def test_v_norm_of_a_sharing_layer_does_not_exist(folders: Folder, tmp_path: Path) -> None:
    extra = "model.layers.2.self_attn.v_norm.weight"
    folder = variant(folders("gemma-3n-E2B"), tmp_path / "norm", with_tensor(extra, torch.ones(16)))
    refusal(folder, BadCheckpoint, extra)


def test_a_second_embedding_is_refused(folders: Folder, tmp_path: Path) -> None:
    extra = with_tensor("other.embed_tokens.weight", torch.zeros(3, 3))
    refusal(variant(folders("llama-3.2-1B"), tmp_path / "two", extra), BadCheckpoint, "2 token embeddings")
    folder = variant(folders("llama-3.2-1B"), tmp_path / "none", without("model.embed_tokens.weight"))
    refusal(folder, BadCheckpoint, "no token embedding", "embed_tokens.weight")


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize(
    "tensor",
    ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"],
)
@pytest.mark.parametrize("how", ["longer", "transposed", "flat"])
def test_wrong_shapes_are_refused(name: str, tensor: str, how: str, folders: Folder, tmp_path: Path) -> None:
    def change(found: Tensors) -> Tensors:
        t = found[tensor]
        other = {
            "longer": torch.cat((t, t[:1])),
            "transposed": t.T if t.ndim > 1 else t[None],
            "flat": t.reshape(-1, 1),
        }
        return {**found, tensor: other[how]}

    folder = variant(folders(name), tmp_path / "shape", change)
    text = refusal(folder, BadCheckpoint, tensor, "shape [", "by config.json")
    assert "model.safetensors" in text


@pytest.mark.parametrize(
    ("dtype", "error"),
    [
        (torch.int8, BadCheckpoint),
        (torch.int64, BadCheckpoint),
        (torch.uint8, BadCheckpoint),
        (torch.bool, BadCheckpoint),
        (torch.float64, Unsupported),
        (torch.float8_e4m3fn, Unsupported),
    ],
)
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_types_that_are_no_weights_are_refused(
    tensor: str, dtype: torch.dtype, error: type[EdgeError], folders: Folder, tmp_path: Path
) -> None:
    folder = variant(folders("llama-3.2-1B"), tmp_path / "type", lambda t: {**t, tensor: t[tensor].to(dtype)})
    refusal(folder, error, tensor, "one of BF16, F16, F32")


def test_scaled_fp8_is_no_type_of_a_ple_table(folders: Folder, tmp_path: Path) -> None:
    """Its rows are read one at a time, as they are stored."""

    def change(found: Tensors) -> Tensors:
        name = next(name for name in found if name.endswith("embed_tokens_per_layer.weight"))
        scales = torch.ones([-(-n // 128) for n in found[name].shape])
        return {**found, name: found[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}

    folder = variant(folders("gemma-3n-E2B"), tmp_path / "table", change)
    refusal(folder, Unsupported, "embed_tokens_per_layer.weight", "F8_E4M3", "one of BF16, F16, F32")


@pytest.mark.parametrize("name", ["llama-3.1-8B", "qwen3-0.6B"])
def test_layer_counts_that_disagree(name: str, folders: Folder, tmp_path: Path) -> None:
    source = folders(name)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    folder = variant(source, tmp_path / "fewer", lambda t: t, num_hidden_layers=layers - 1)
    refusal(folder, BadCheckpoint, f"model.layers.{layers - 1}.", f"those of {layers - 1} layers")
    folder = variant(source, tmp_path / "more", lambda t: t, num_hidden_layers=layers + 1)
    found = refusal(folder, BadCheckpoint, f"model.layers.{layers}.", f"num_hidden_layers={layers + 1}")
    assert "no such tensor" in found


def gemma_with(layers: int) -> dict[str, Any]:
    """The lists of a shrunk E2B, for another number of layers."""
    raw = shrink(real("gemma-3n-E2B"))
    extended = (raw["layer_types"] * 2)[:layers]
    sparsity = (raw["activation_sparsity_pattern"] + [0.0] * 15)[:layers]
    return {
        "num_hidden_layers": layers,
        "layer_types": extended,
        "activation_sparsity_pattern": sparsity,
        "intermediate_size": 256,
        "num_kv_shared_layers": raw["num_kv_shared_layers"] + layers - 15,
    }


@pytest.mark.parametrize("layers", [14, 16])
def test_gemma_layer_counts_that_disagree(layers: int, folders: Folder, tmp_path: Path) -> None:
    folder = variant(folders("gemma-3n-E2B"), tmp_path / "count", lambda t: t, **gemma_with(layers))
    # The table's width depends on the layers too.
    refusal(folder, BadCheckpoint, "model.embed_tokens_per_layer.weight", f"{layers * 12}] by config.json")


def test_keys_of_layers_that_do_not_exist_are_not_ignored(folders: Folder, tmp_path: Path) -> None:
    """Only layers of the model share; layer 40 of a model of 15 is a sign of another model."""
    extra = "model.layers.40.self_attn.k_proj.weight"
    folder = variant(folders("gemma-3n-E2B"), tmp_path / "forty", with_tensor(extra, torch.zeros(32, 64)))
    refusal(folder, BadCheckpoint, extra)


def test_sharing_that_the_file_contradicts(folders: Folder, tmp_path: Path) -> None:
    """More owners than the file has keys for."""
    folder = variant(folders("gemma-3n-E2B"), tmp_path / "fewer", lambda t: t, num_kv_shared_layers=0)
    refusal(folder, BadCheckpoint, "model.layers.10.self_attn.k_proj.weight", "no such tensor")


def test_rotary_buffers_of_old_files_are_ignored(folders: Folder, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = variant(folders("llama-3.2-1B"), tmp_path / "old", with_tensor(name, torch.ones(8)))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.ignored == (name,)
    checkpoint.close()


def test_folders_without_the_files(folders: Folder, tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere", MissingFile, "no such folder")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", MissingFile, "config.json")
    (tmp_path / "empty" / "config.json").write_text((folders("llama-3.2-1B") / "config.json").read_text())
    refusal(tmp_path / "empty", MissingFile, "no weights")


@pytest.mark.parametrize("name", GEMMA)
def test_canonical_names_are_complete(name: str) -> None:
    """Every tensor of the spec has a name in the file, and no two the same."""
    from loaders.layout import file_name

    model: Model = parse(real(name))
    family = families()["gemma3n"]
    names = [file_name(family.names, canonical) for canonical in tensors(model)]
    assert len(set(names)) == len(names)
    assert not any("{" in n for n in names)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt2"])
def test_an_absurd_context_sizes_nothing(name: str) -> None:
    raw = real(name)
    raw.get("text_config", raw)["max_position_embeddings"] = 10**12
    assert parse(raw).context == 1 << 30
