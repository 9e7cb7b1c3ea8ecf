"""Gemma 3, Gemma 4 and Llama 4: what their published configs say, at full size, and what of others is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma3Config, Gemma3TextConfig, Gemma4Config, Gemma4TextConfig, Llama4Config, Llama4TextConfig

from loaders.errors import BadCheckpoint
from loaders.families import families
from loaders.layout import files, spots
from loaders.network.spec import (
    Attention,
    Experts,
    Gated,
    Layer,
    Linear,
    Llama3Scaling,
    Proportional,
    Rope,
    Router,
    Temperature,
    mechanisms,
)
from loaders.network.tensors import active, core, tensors, total
from tests.shrink import parse, real, shrink

SCOUT, MAVERICK = "llama-4-scout-17B-16E", "llama-4-maverick-17B-128E"
# Total, core and active. Gemma's are published to the last of three digits (the core of Gemma 4 without the embedding).
COUNTS = {
    "gemma-3-1B": (999_885_952, 697_896_064, 999_885_952),
    "gemma-3-4B": (3_880_263_168, 3_209_010_688, 3_880_263_168),
    "gemma-3-27B": (27_009_346_304, 25_599_716_096, 27_009_346_304),
    "gemma-4-E2B": (4_628_569_379, 1_877_105_955, 4_628_569_379),
    "gemma-4-E4B": (7_463_013_418, 3_973_352_490, 7_463_013_418),
    SCOUT: (107_769_861_120, 106_735_375_360, 17_172_894_720),
    MAVERICK: (400_711_848_960, 399_677_363_200, 17_184_691_200),
}
CONFIGS = tuple(COUNTS)
SANDWICH = ("attn_in", "attn_out", "ffn_in", "ffn_out")


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = raw.get("text_config", raw)
    return part


@pytest.mark.parametrize("name", CONFIGS)
def test_counts(name: str) -> None:
    model = parse(real(name))
    assert (total(model), core(model), active(model)) == COUNTS[name]


# --------------------------------------------------------------------------------------------------------------- Gemma


@pytest.mark.parametrize(
    ("name", "window", "factor", "scale"),
    [("gemma-3-1B", 512, None, 1 / 16), ("gemma-3-4B", 1024, 8.0, 1 / 16), ("gemma-3-27B", 1024, 8.0, 168**-0.5)],
)
def test_gemma3_layers(name: str, window: int, factor: float | None, scale: float) -> None:
    model = parse(real(name))
    for i, layer in enumerate(model.layers):
        a, full = layer.attention, i % 6 == 5
        assert isinstance(a, Attention)
        long = Rope(1e6, a.head_dim, Linear(factor) if factor else None)
        assert a.rope == (long if full else Rope(1e4, a.head_dim))
        assert a.window == (None if full else window)
        assert (a.scale, a.qk_norm, a.v_norm, a.kv_from) == (scale, "head", False, None)
        assert layer.norms == SANDWICH
        assert not layer.scalar
    assert model.embed_scale == model.dim**0.5
    assert model.tied
    assert model.softcap is None


def test_gemma3_left_out_is_filled_in() -> None:
    model = parse(real("gemma-3-4B"))
    a = model.layers[0].attention
    assert isinstance(a, Attention)
    assert (model.vocab, model.context, model.eps) == (262_208, 131_072, 1e-6)
    assert (a.heads, a.kv_heads, a.head_dim) == (8, 4, 256)


def test_gemma3_norms_are_stored_less_one() -> None:
    model, names = parse(real("gemma-3-1B")), families()["gemma3"].names
    for filed in files(names, model).values():
        assert filed.offset == (1.0 if "norm" in filed.canonical else 0.0)


@pytest.mark.parametrize(
    ("name", "period", "layers", "shared", "sources", "widths"),
    [
        ("gemma-4-E2B", 5, 35, 20, (13, 14), (6144, 12_288)),
        ("gemma-4-E4B", 6, 42, 18, (22, 23), (10_240, 10_240)),
    ],
)
def test_gemma4_layers(
    name: str, period: int, layers: int, shared: int, sources: tuple[int, int], widths: tuple[int, int]
) -> None:
    model = parse(real(name))
    assert len(model.layers) == layers
    for i, layer in enumerate(model.layers):
        full, reads = i % period == period - 1, i >= layers - shared
        a = layer.attention
        assert isinstance(a, Attention)
        assert a.head_dim == (512 if full else 256)
        assert a.rope == (Rope(1e6, 512, Proportional(64)) if full else Rope(1e4, 256))
        assert a.window == (None if full else 512)
        assert (a.scale, a.qk_norm, a.v_norm) == (1.0, "head", True)
        assert a.kv_from == (sources[full] if reads else None)
        assert layer.ffn == Gated(widths[reads], "gelu_tanh")
        assert layer.norms == SANDWICH
        assert layer.scalar
    assert model.ple is not None
    assert (model.ple.rows, model.ple.dim) == (262_144, 256)
    assert model.softcap == 30.0
    assert model.altup is None
    assert model.laurel is None


def test_gemma4_head_sizes_in_both_spellings() -> None:
    """transformers writes the layers that differ, numbers padded with zeros, instead of global_head_dim."""
    raw = text_part(real("gemma-4-E2B"))
    wanted = parse(raw)
    del raw["global_head_dim"]
    assert parse(raw) == wanted, "512 is the default"
    full = [i for i, kind in enumerate(raw["layer_types"]) if kind == "full_attention"]
    for width in (1, 2):
        raw["per_layer_config"] = {str(i).zfill(width): {"head_dim": 512} for i in full}
        assert parse(raw) == wanted
    raw["per_layer_config"] = {}
    assert {a.head_dim for layer in parse(raw).layers if isinstance(a := layer.attention, Attention)} == {256}


def test_gemma4_without_a_table() -> None:
    raw = text_part(real("gemma-4-E4B"))
    model = parse({**raw, "hidden_size_per_layer_input": 0})
    assert model.ple is None
    assert not any("ple." in name for name in tensors(model))


# ------------------------------------------------------------------------------------------------------------- Llama 4


@pytest.mark.parametrize("name", [SCOUT, MAVERICK])
def test_llama4_layers(name: str) -> None:
    model = parse(real(name))
    scaling = Llama3Scaling(16.0, 1.0, 1.0, 8192) if name == SCOUT else None
    mixture = Experts(
        16 if name == SCOUT else 128, 1, 8192, "silu", Router("sigmoid", on_input=True), Gated(8192, "silu")
    )
    for i, layer in enumerate(model.layers):
        a = layer.attention
        assert isinstance(a, Attention)
        assert (a.heads, a.kv_heads, a.head_dim, a.scale) == (40, 8, 128, 128**-0.5)
        if i % 4 == 3:
            assert (a.rope, a.chunk, a.qk_norm, a.temperature) == (None, None, None, Temperature(0.1, 8192))
        else:
            assert a.rope == Rope(500_000.0, 128, scaling, interleaved=True)
            assert (a.chunk, a.qk_norm, a.temperature) == (8192, "unweighted" if name == SCOUT else None, None)
        assert layer.ffn == (mixture if name == SCOUT or i % 2 else Gated(16_384, "silu"))
        assert layer.norms == ("attn_in", "ffn_in")
    assert not model.tied
    assert model.context == (10_485_760 if name == SCOUT else 1_048_576)


def test_llama4_experts_are_windows() -> None:
    """Gates are the left half of each expert's matrix and ups the right, read transposed: nothing is copied."""
    model, names = parse(real(MAVERICK)), families()["llama4"].names
    table, fused = tensors(model), "layers.1.feed_forward.experts."
    for part, left in (("gate", 0), ("up", 8192)):
        found = list(spots(names, table, f"layers.1.experts.{part}"))
        assert len(found) == 128
        for plane, spot in enumerate(found):
            assert (spot.name, spot.shape) == (f"{fused}gate_up_proj", (128, 5120, 16_384))
            assert (spot.block.plane, spot.block.rows, spot.block.cols) == (plane, (0, 5120), (left, left + 8192))
            assert spot.block.transposed
    down = list(spots(names, table, "layers.1.experts.down"))
    assert {(spot.name, spot.shape) for spot in down} == {(f"{fused}down_proj", (128, 8192, 5120))}


@pytest.mark.parametrize(
    ("keys", "rotating", "mixed"),
    [
        ({"no_rope_layers": None, "moe_layers": None}, {0, 1, 2}, {1, 3, 5}),
        ({"no_rope_layers": [], "moe_layers": []}, {0, 1, 2}, set()),
        ({"no_rope_layers": [], "no_rope_layer_interval": 2, "moe_layers": [0]}, {0, 2, 4}, {0}),
        ({"no_rope_layers": [0, 1, 1, 0, 0, 1], "moe_layers": [4, 5]}, {1, 2, 5}, {4, 5}),
        ({"moe_layers": None, "interleave_moe_layer_step": 3}, {0, 1, 2, 4, 5}, {2, 5}),
    ],
)
def test_llama4_layer_lists(keys: dict[str, Any], rotating: set[int], mixed: set[int]) -> None:
    raw = text_part(real(MAVERICK))
    raw.update(
        num_hidden_layers=6, moe_layers=[1, 3, 5], no_rope_layers=[1, 1, 1, 0, 1, 1], attn_temperature_tuning=True
    )
    raw.update(keys)
    model = parse(raw)
    expected = rotating if "no_rope_layer_interval" in keys or keys.get("no_rope_layers") else rotating | {4, 5}
    assert {i for i, layer in enumerate(model.layers) if layer.attention.rope is not None} == expected
    assert {i for i, layer in enumerate(model.layers) if layer.attention.chunk is not None} == expected
    assert {i for i, layer in enumerate(model.layers) if isinstance(layer.ffn, Experts)} == mixed
    theirs = Llama4TextConfig.from_dict(raw)
    assert expected == {i for i, turns in enumerate(theirs.no_rope_layers) if turns}
    assert mixed == set(theirs.moe_layers)


def test_llama4_chunks_may_differ_from_rotation() -> None:
    """Two lists in transformers, each read where it applies."""
    raw = text_part(real(MAVERICK))
    raw["layer_types"] = ["full_attention", "chunked_attention"] * 24
    for i, layer in enumerate(parse(raw).layers):
        assert layer.attention.chunk == (8192 if i % 2 else None)
        assert (layer.attention.rope is None) == (i % 4 == 3)


@pytest.mark.parametrize(("value", "on"), [(4, True), (True, True), (False, False), (None, True)])
def test_llama4_temperature(value: object, on: bool) -> None:
    raw = text_part(real(MAVERICK))
    raw.update(attn_temperature_tuning=value, floor_scale=100, attn_scale=0.25)
    a = parse(raw).layers[3].attention
    assert isinstance(a, Attention)
    assert a.temperature == (Temperature(0.25, 100) if on else None)


# ------------------------------------------------------------------------------------------------------------ defaults


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")


@pytest.mark.parametrize("kind", [Gemma3TextConfig, Gemma4TextConfig, Llama4TextConfig])
def test_defaults_are_those_of_transformers(kind: type) -> None:
    """A config of three sizes means what transformers takes it to mean, and so does the one it saves."""
    saved = kind().to_dict()
    said = {"model_type": saved["model_type"], **{key: saved[key] for key in SIZES}}
    assert parse(said) == parse(saved)
    for key in SIZES:
        with pytest.raises(BadCheckpoint, match=f"{key}: missing"):
            parse({k: v for k, v in said.items() if k != key})


@pytest.mark.parametrize("kind", [Gemma3Config, Gemma4Config, Llama4Config])
def test_multimodal_configs_as_transformers_saves_them(kind: type) -> None:
    saved = kind().to_dict()
    assert parse(saved) == parse(saved["text_config"])


@pytest.mark.parametrize("layers", [5, 7, 11, 12])
def test_gemma4_patterns_are_those_of_transformers(layers: int) -> None:
    theirs = Gemma4TextConfig(num_hidden_layers=layers)
    said = {"model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers}
    kinds = [
        "full_attention" if layer.attention.window is None else "sliding_attention" for layer in parse(said).layers
    ]
    assert kinds == theirs.layer_types


def test_gemma3_both_spellings() -> None:
    raw = text_part(real("gemma-3-4B"))
    wanted = parse(raw)
    new = {k: v for k, v in raw.items() if k != "rope_scaling"}
    full = {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}
    new["rope_parameters"] = {"full_attention": full, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    assert parse(new) == wanted
    assert parse(
        {**new, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5 + ["sliding_attention"] * 4}
    )
    assert parse({**raw, "sliding_window_pattern": 2}) == parse({**raw, "_sliding_window_pattern": 2}) != wanted
    for key, value in (
        ("rope_theta", 77.0),
        ("rope_local_base_freq", 77.0),
        ("rope_scaling", {"factor": 2.0, "type": "linear"}),
    ):
        with pytest.raises(BadCheckpoint, match=key):
            parse({**new, key: value})


@pytest.mark.parametrize("name", ["gemma-3-1B", "gemma-4-E2B"])
def test_final_softcap(name: str) -> None:
    raw = text_part(real(name))
    assert parse({**raw, "final_logit_softcapping": 12.5}).softcap == 12.5
    assert parse({**raw, "final_logit_softcapping": None}).softcap is None


def test_tied_inside_or_outside() -> None:
    raw = real("gemma-3-4B")
    assert not parse({**raw, "tie_word_embeddings": False}).tied
    raw["text_config"]["tie_word_embeddings"] = False
    assert not parse(raw).tied
    with pytest.raises(BadCheckpoint, match=r"text_config\.tie_word_embeddings: False \(expected True as in"):
        parse({**raw, "tie_word_embeddings": True})


# ----------------------------------------------------------------------------------------------------------- shrinking


@pytest.mark.parametrize("name", CONFIGS)
def test_shrunk_to_a_million(name: str) -> None:
    """Small, with every kind of layer; sharing layers have two sources of each kind to choose from."""
    model = parse(shrink(real(name)))
    assert total(model) < 1_200_000
    owners = [layer.attention for layer in model.layers if layer.attention.kv_from is None]
    if model.family == "gemma4":
        assert sum(a.window is None for a in owners) == 2
        assert {layer.attention.kv_from for layer in model.layers} == {None, len(owners) - 2, len(owners) - 1}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma-3-4B", {"rope_scaling": None}),
        ("gemma-3-1B", {"layer_types": ["full_attention"] * 26}),
        ("gemma-4-E2B", {"use_double_wide_mlp": False}),
        ("gemma-4-E2B", {"global_head_dim": 256}),
        ("gemma-4-E2B", {"hidden_size_per_layer_input": 0}),
        (SCOUT, {"rope_scaling": None}),
        (SCOUT, {"use_qk_norm": False}),
        (MAVERICK, {"attn_temperature_tuning": False}),
        (MAVERICK, {"moe_layers": []}),
        (MAVERICK, {"no_rope_layers": [1] * 48}),
    ],
)
def test_what_is_switched_off_is_seen(name: str, change: dict[str, Any]) -> None:
    """Widths and head sizes are no mechanisms of their own: there the layers are compared."""
    raw = real(name)
    before = parse(raw)
    text_part(raw).update(change)
    after = parse(raw)
    assert after != before
    if not {"use_double_wide_mlp", "global_head_dim"} & change.keys():
        assert mechanisms(after) != mechanisms(before)


def test_layers_hash() -> None:
    """Equal layers make one run: rows of the table that is printed."""
    model = parse(real(MAVERICK))
    assert [(first, last) for first, last, _ in model.runs[:5]] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]
    distinct: set[Layer] = set(model.layers)
    assert len(distinct) == 3
