"""DeepSeek V3, Kimi K2 and Moonlight: what their configs say, what is refused, and files as they are published."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config

from loaders.checkpoint import SCALE, Checkpoint, match
from loaders.errors import BadCheckpoint, EdgeError, Unsupported
from loaders.families import family_of
from loaders.formats.pack import Pack
from loaders.formats.placed import FP8
from loaders.formats.safetensors import Shards, Tensor
from loaders.layout import files
from loaders.network.spec import Experts, Gated, LatentAttention, Model, Rope, Router, Yarn
from loaders.network.tensors import active, tensors, total
from loaders.packing import write_pack
from tests.conftest import Folder, Open
from tests.makers import Tensors, assert_close, distance, expected, prompt, set_config, theirs, variant
from tests.refusals import refused
from tests.shrink import DEEPSEEKS, parse, real, shrink

V3, K2, MOONLIGHT = DEEPSEEKS
BLOCK = 128


# ------------------------------------------------------------------------------------------------ the published configs


@pytest.mark.parametrize(
    ("name", "all_of_them", "met"),
    [
        (V3, 671_026_419_200, 37_552_297_472),
        (K2, 1_026_408_232_448, 32_861_500_928),
        (MOONLIGHT, 15_960_110_208, 2_914_776_192),
    ],
)
def test_published_totals(name: str, all_of_them: int, met: int) -> None:
    """671B and 37B, 1T and 32B, 16B and 3B."""
    model = parse(real(name))
    assert (total(model), active(model)) == (all_of_them, met)


def test_deepseek_v3_layers() -> None:
    model = parse(real(V3))
    sharpened = 0.1 * np.log(40) + 1.0
    attention = LatentAttention(
        heads=128,
        q_rank=1536,
        kv_rank=512,
        nope_dim=128,
        v_dim=128,
        scale=192**-0.5 * sharpened**2,
        rope=Rope(10_000.0, 64, Yarn(40.0, 4096, 1.0), interleaved=True),
        eps=1e-6,
    )
    mixture = Experts(256, 8, 2048, "silu", Router("sigmoid", True, 2.5, True, 8, 4), Gated(2048, "silu"))
    assert [layer.attention for layer in model.layers] == [attention] * 61
    assert [layer.ffn for layer in model.layers] == [Gated(18432, "silu")] * 3 + [mixture] * 58
    assert (model.vocab, model.dim, model.context, model.tied) == (129_280, 7168, 163_840, False)
    assert model.lookahead == 1


def test_kimi_k2_layers() -> None:
    """DeepSeek's shape with half the heads, half as many experts again, and no groups."""
    model, deepseek = parse(real(K2)), parse(real(V3)).layers[-1].attention
    sharpened = 0.1 * np.log(32) + 1.0
    step = Yarn(32.0, 4096, 1.0, fast=1.0, slow=1.0)
    attention = replace(
        deepseek, heads=64, scale=192**-0.5 * sharpened**2, rope=Rope(50_000.0, 64, step, interleaved=True)
    )
    mixture = Experts(384, 8, 2048, "silu", Router("sigmoid", True, 2.827, True), Gated(2048, "silu"))
    assert [layer.attention for layer in model.layers] == [attention] * 61
    assert [layer.ffn for layer in model.layers] == [Gated(18432, "silu")] + [mixture] * 60
    assert (model.vocab, model.dim, model.context, model.lookahead) == (163_840, 7168, 131_072, 0)


def test_moonlight_layers() -> None:
    """Queries without a bottleneck, no stretching, two shared experts in one; its norms of latents keep 1e-6."""
    model = parse(real(MOONLIGHT))
    a, f = model.layers[-1].attention, model.layers[-1].ffn
    assert a == LatentAttention(16, None, 512, 128, 128, 192**-0.5, Rope(50_000.0, 64, interleaved=True), 1e-6)
    assert f == Experts(64, 6, 1408, "silu", Router("sigmoid", True, 2.446, True), Gated(2816, "silu"))
    assert model.eps == 1e-5
    assert len(model.layers) == 27


@pytest.mark.parametrize("name", DEEPSEEKS)
def test_a_token_is_576_values_in_a_layer(name: str) -> None:
    for layer in parse(real(name)).layers:
        assert layer.attention.cached == 512 + 64
        assert layer.attention.span is None


def test_defaults_are_those_of_transformers() -> None:
    """An absent key means what it means to transformers, an absent q_lora_rank something else than null."""
    saved = DeepseekV3Config().to_dict()
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    little = parse({"model_type": "deepseek_v3", **{key: saved[key] for key in needed}})
    assert replace(little, lookahead=1) == parse(saved)
    assert little.layers[0].attention == replace(
        parse(real(V3)).layers[0].attention, scale=192**-0.5, rope=Rope(10_000.0, 64, interleaved=True)
    )
    assert little.layers[-1].ffn == parse(real(V3)).layers[-1].ffn


def test_a_saved_config_says_the_same() -> None:
    """What transformers writes for a config it read: new spellings, and derived keys beside the rest."""
    for name in (V3, MOONLIGHT):
        raw = real(name)
        _, config = theirs(raw)
        saved = json.loads(config.to_json_string())
        assert "rope_scaling" not in saved
        assert parse(saved) == parse(raw)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 0.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.707}, 0.0707 * np.log(40) + 1.0),
        ({"mscale_all_dim": 1.0}, 0.1 * np.log(40) + 1.0),
    ],
)
def test_scores_are_sharpened_by_mscale_all_dim(keys: dict[str, float], factor: float) -> None:
    raw = real(V3)
    plain = {k: v for k, v in raw["rope_scaling"].items() if not k.startswith("mscale")}
    a = parse({**raw, "rope_scaling": {**plain, **keys}}).layers[0].attention
    assert a.scale == pytest.approx(192**-0.5 * factor**2, rel=1e-12)


def test_pairs_need_not_be_neighbours() -> None:
    a = parse({**real(V3), "rope_interleave": False}).layers[0].attention
    assert a.rope is not None
    assert not a.rope.interleaved


@pytest.mark.parametrize("first", [0, 1, 61])
def test_any_number_of_layers_may_be_dense(first: int) -> None:
    layers = parse({**real(V3), "first_k_dense_replace": first}).layers
    assert [isinstance(layer.ffn, Experts) for layer in layers] == [i >= first for i in range(61)]


def test_weights_may_be_wider_than_fp8() -> None:
    raw = real(V3)
    del raw["quantization_config"]
    assert parse(raw) == parse(real(V3))


# ------------------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, Any], type[EdgeError], tuple[str, ...]]] = {
    "softmax": ({"scoring_func": "softmax"}, Unsupported, ('"softmax"', '"sigmoid"')),
    "greedy": ({"topk_method": "group_limited_greedy"}, Unsupported, ('"noaux_tc"',)),
    "every-second-layer": ({"moe_layer_freq": 2}, Unsupported, ("2",)),
    "fewer-key-heads": ({"num_key_value_heads": 64}, Unsupported, ("64", "128")),
    "bias": ({"attention_bias": True}, Unsupported, ("true",)),
    "gelu": ({"hidden_act": "gelu"}, Unsupported, ('"gelu"',)),
    "other-head": ({"head_dim": 128}, Unsupported, ("128", "64")),
    "other-qk-head": ({"qk_head_dim": 128}, Unsupported, ("128", "192")),
    "llama3-rope": ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, Unsupported, ('"llama3"', "default or yarn")),
    "unknown-key": ({"index_topk": 2048}, Unsupported, ("unknown key",)),
    "too-few-experts": ({"n_routed_experts": 4, "n_group": 1, "topk_group": 1}, BadCheckpoint, ("4",)),
    "more-active": ({"num_experts_per_tok": 257}, BadCheckpoint, ("257", "n_routed_experts=256")),
    "more-than-groups-hold": ({"num_experts_per_tok": 129}, BadCheckpoint, ("129", "topk_group=4 of 8 groups")),
    "groups": ({"n_group": 7}, BadCheckpoint, ("7", "a divisor of n_routed_experts=256")),
    "groups-of-one": ({"n_group": 256}, BadCheckpoint, ("256", "two or more")),
    "more-active-groups": ({"topk_group": 9}, BadCheckpoint, ("9", "n_group=8")),
    "no-active-groups": ({"topk_group": 0}, BadCheckpoint, ("0",)),
    "no-active": ({"num_experts_per_tok": 0}, BadCheckpoint, ("0",)),
    "no-shared": ({"n_shared_experts": 0}, BadCheckpoint, ("0",)),
    "odd-rope": ({"qk_rope_head_dim": 63}, BadCheckpoint, ("63", "even")),
    "more-dense-layers": ({"first_k_dense_replace": 62}, BadCheckpoint, ("62", "num_hidden_layers=61")),
    "negative-dense": ({"first_k_dense_replace": -1}, BadCheckpoint, ("-1",)),
    "no-latent": ({"kv_lora_rank": 0}, BadCheckpoint, ("0",)),
    "no-bottleneck": ({"q_lora_rank": 0}, BadCheckpoint, ("0",)),
    "scale": ({"routed_scaling_factor": 0.0}, BadCheckpoint, ("0.0",)),
    "normalized-maybe": ({"norm_topk_prob": 1}, BadCheckpoint, ("true or false",)),
    "interleaved-maybe": ({"rope_interleave": 1}, BadCheckpoint, ("true or false",)),
    "two-counts": ({"num_mtp_layers": 2, "num_nextn_predict_layers": 1}, BadCheckpoint, ("disagrees",)),
}
NAMED = {"too-few-experts": "num_experts_per_tok", "more-than-groups-hold": "num_experts_per_tok"}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    keys, error, messages = REFUSED[case]
    refused({**real(V3), **keys}, error, NAMED.get(case, next(iter(keys))), *messages)


@pytest.mark.parametrize(
    ("keys", "error", "messages"),
    [
        ({"quant_method": "awq"}, Unsupported, ("quant_method", '"awq"')),
        ({"quant_method": "compressed-tensors"}, Unsupported, ("quant_method",)),
        ({"quant_method": None}, BadCheckpoint, ("quant_method", "missing")),
        ({"fmt": "e5m2"}, Unsupported, ("fmt", '"e5m2"')),
        ({"weight_block_size": [64, 128]}, Unsupported, ("weight_block_size", "[64, 128]", "[128, 128]")),
        ({"activation_scheme": "static"}, Unsupported, ("activation_scheme", '"static"')),
        ({"modules_to_not_convert": ["lm_head"]}, Unsupported, ("modules_to_not_convert",)),
        ({"bits": 8}, Unsupported, ("bits",)),
    ],
)
def test_other_quantizations_are_refused(
    keys: dict[str, Any], error: type[EdgeError], messages: tuple[str, ...]
) -> None:
    raw = real(V3)
    raw["quantization_config"].update(keys)
    refused(raw, error, *(f"quantization_config.{messages[0]}", *messages[1:]))


def test_sharpening_said_in_two_ways_must_agree() -> None:
    raw = real(V3)
    new = {**raw["rope_scaling"], "rope_theta": 10_000.0, "rope_type": "yarn"}
    del new["type"]
    assert parse({**raw, "rope_parameters": new}) == parse(real(V3))
    new.update(mscale=0.5, mscale_all_dim=0.5)
    refused({**raw, "rope_parameters": new}, BadCheckpoint, "rope_scaling.mscale_all_dim")


# ----------------------------------------------------------------------------------------------------- checkpoint files


def quantizable(name: str, value: torch.Tensor) -> bool:
    """The matrices that published files hold in fp8: projections, not embeddings, routers or heads."""
    return value.ndim == 2 and name.endswith(("_proj.weight", "_with_mqa.weight"))


def quantized(found: Tensors) -> Tensors:
    """Projections in e4m3 with one float32 scale for each block of 128 x 128."""
    out = {}
    for name, value in found.items():
        if not quantizable(name, value):
            out[name] = value
            continue
        high, wide = value.shape
        size = (-(-high // BLOCK), -(-wide // BLOCK))
        padded = torch.zeros(size[0] * BLOCK, size[1] * BLOCK)
        padded[:high, :wide] = value
        peak = padded.view(size[0], BLOCK, size[1], BLOCK).abs().amax((1, 3))
        scale = peak / 448.0
        out[name] = (value / spread(scale, high, wide)).to(torch.float8_e4m3fn)
        out[name + SCALE] = scale
    return out


def spread(scale: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """The scale of each value."""
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:high, :wide]


def widened(found: Tensors) -> Tensors:
    """What a quantized file means, in float32."""
    out = {}
    for name, value in found.items():
        if value.dtype == torch.float8_e4m3fn:
            out[name] = value.float() * spread(found[name + SCALE], *value.shape)
        elif not name.endswith(SCALE):
            out[name] = value
    return out


@pytest.fixture(scope="module")
def pair(folders: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """name -> the same shrunk model twice: in fp8 with scales, and in float32."""

    @cache
    def made(name: str) -> tuple[Path, Path]:
        base = tmp_path_factory.mktemp(name)
        fp8 = variant(folders(name), base / "fp8", quantized)
        return fp8, variant(folders(name), base / "wide", lambda t: widened(quantized(t)))

    return made


@pytest.mark.parametrize("name", [V3, K2])
def test_fp8_gives_the_logits_of_its_own_values(
    name: str, pair: Callable[[str], tuple[Path, Path]], opened: Open
) -> None:
    fp8, wide = (opened(folder) for folder in pair(name))
    assert fp8.checkpoint.dtype == FP8
    ids = prompt(fp8.model.vocab, 40)
    assert np.array_equal(fp8.logits(ids), wide.logits(ids))


def test_fp8_runs_as_transformers_runs_its_values(pair: Callable[[str], tuple[Path, Path]], opened: Open) -> None:
    fp8, wide = pair(V3)
    session = opened(fp8)
    ids = prompt(session.model.vocab, 40)
    assert_close(session.logits(ids), expected(loaded(shrink(real(V3)), load_file(wide / "model.safetensors")), ids))


def loaded(raw: dict[str, Any], found: Tensors) -> Any:
    """transformers' model with the tensors of a file, experts one by one as published."""
    kind, config = theirs(raw)
    model = kind(config)
    state = model.state_dict()
    for name in state:
        if name.endswith("experts.gate_up_proj"):
            rows = [name.replace("gate_up_proj", f"{{}}.{part}_proj.weight") for part in ("gate", "up")]
            each = [torch.cat([found[row.format(e)] for row in rows]) for e in range(config.n_routed_experts)]
            state[name] = torch.stack(each)
        elif name.endswith("experts.down_proj"):
            each = [found[name.replace("down_proj", f"{e}.down_proj.weight")] for e in range(config.n_routed_experts)]
            state[name] = torch.stack(each)
        else:
            state[name] = found[name]
    model.load_state_dict(state)
    return model.float().eval()


def test_a_pack_of_fp8_is_that_of_its_values(
    pair: Callable[[str], tuple[Path, Path]], opened: Open, tmp_path: Path
) -> None:
    logits = []
    for which, folder in zip(("fp8", "wide"), pair(V3), strict=True):
        checkpoint = Checkpoint.open(folder)
        write_pack(checkpoint, tmp_path / which)
        checkpoint.close()
        pack = Pack.open(tmp_path / which)
        assert pack.verify() > 0
        pack.close()
        session = opened(tmp_path / which, precision="int8")
        logits.append(session.logits(prompt(session.model.vocab, 24)))
    assert np.array_equal(*logits)


SCALED = "model.layers.4.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda scale: None, ("no such tensor",)),
        (lambda scale: torch.cat((scale, scale)), ("F32 of shape [2, 1]", "F32 of shape [1, 1]")),
        (lambda scale: scale.flatten(), ("F32 of shape [1]", "F32 of shape [1, 1]")),
        (lambda scale: scale.bfloat16(), ("BF16 of shape [1, 1]", "F32 of shape [1, 1]")),
    ],
)
def test_bad_scales_are_named(
    change: Callable[[torch.Tensor], torch.Tensor | None],
    messages: tuple[str, ...],
    pair: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    def changed(found: Tensors) -> Tensors:
        scale = change(found.pop(SCALED + SCALE))
        return found if scale is None else {**found, SCALED + SCALE: scale}

    turned_away(variant(pair(V3)[0], tmp_path / "bad", changed), BadCheckpoint, SCALED + SCALE, *messages)


def test_fp8_without_any_scales_is_another_format(folders: Folder, tmp_path: Path) -> None:
    def cast(found: Tensors) -> Tensors:
        return {name: t.to(torch.float8_e4m3fn) if quantizable(name, t) else t for name, t in found.items()}

    turned_away(variant(folders(V3), tmp_path / "cast", cast), Unsupported, FP8, "BF16, F16, F32")


def test_scales_of_what_is_not_scaled_are_left_over(folders: Folder, tmp_path: Path) -> None:
    extra = {SCALED + SCALE: torch.ones(1, 1)}
    folder = variant(folders(V3), tmp_path / "extra", lambda t: {**t, **extra})
    turned_away(folder, BadCheckpoint, "no place for", SCALED + SCALE)


def turned_away(folder: Path, error: type[EdgeError], *messages: str) -> None:
    """Opening is refused in one line."""
    with pytest.raises(EdgeError) as info:
        Checkpoint.open(folder)
    assert type(info.value) is error, info.value
    for message in messages:
        assert message in str(info.value)
    assert "\n" not in str(info.value)


def lookahead(layer: int) -> Callable[[Tensors], Tensors]:
    """A module for the token after next as published: a layer past the last, with an embedding and a head."""

    def change(found: Tensors) -> Tensors:
        start, end = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
        copied = {name.replace(start, end): t.clone() for name, t in found.items() if name.startswith(start)}
        own = {
            "embed_tokens.weight": found["model.embed_tokens.weight"],
            "shared_head.head.weight": found["lm_head.weight"],
            "shared_head.norm.weight": torch.ones(4),
            "enorm.weight": torch.ones(4),
            "hnorm.weight": torch.ones(4),
            "eh_proj.weight": torch.ones(4, 8),
        }
        return {**found, **copied, **{end + name: t.clone() for name, t in own.items()}}

    return change


def test_the_module_for_the_token_after_next_is_not_read(
    pair: Callable[[str], tuple[Path, Path]], opened: Open, tmp_path: Path
) -> None:
    source, _ = pair(V3)
    folder = variant(source, tmp_path / "more", lookahead(5))
    plain, more = opened(source), opened(folder)
    assert len(more.checkpoint.ignored) > 100
    assert all(".layers.5." in name for name in more.checkpoint.ignored)
    ids = prompt(plain.model.vocab, 12)
    assert np.array_equal(plain.logits(ids), more.logits(ids))


def test_a_last_layer_is_no_such_module(pair: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """A config that says one layer less, or that there is no module, would run, slightly wrong."""
    source, _ = pair(V3)
    folder = variant(source, tmp_path / "fewer", lookahead(5), num_hidden_layers=4)
    turned_away(folder, BadCheckpoint, "no place for", "model.layers.5.")
    folder = variant(source, tmp_path / "none", lambda t: t, num_hidden_layers=4, num_nextn_predict_layers=0)
    turned_away(folder, BadCheckpoint, "no place for", "model.layers.4.")
    set_config(folder, num_hidden_layers=6)
    turned_away(folder, BadCheckpoint, "model.layers.5.", "no such tensor")


# ----------------------------------------------------------------------------------------------------- what must matter


def test_the_bias_decides_who_is_chosen(folders: Folder, opened: Open, tmp_path: Path) -> None:
    """Without it other experts run; a constant added to it changes nothing: weights never see it."""
    for name in (V3, K2):
        source = folders(name)
        session = opened(source)
        ids = prompt(session.model.vocab, 24)
        logits = session.logits(ids)
        for change, moved in ((lambda t: t * 0.0, True), (lambda t: t + 4.0, False)):

            def changed(found: Tensors, change: Callable[[torch.Tensor], torch.Tensor] = change) -> Tensors:
                return {k: change(t) if k.endswith("correction_bias") else t for k, t in found.items()}

            other = opened(variant(source, tmp_path / f"{name}-{moved}", changed)).logits(ids)
            assert (distance(other, logits) > 1e-2) == moved


def test_norms_of_latents_have_an_epsilon_of_their_own(folders: Folder, opened: Open, tmp_path: Path) -> None:
    """With latents so small that it is seen: transformers' norms keep 1e-6 where the config says 1e-5."""

    def faint(found: Tensors) -> Tensors:
        return {name: t * 2e-3 if "kv_a_proj" in name else t for name, t in found.items()}

    folder = variant(folders(MOONLIGHT), tmp_path / "faint", faint)
    ids = prompt(parse(shrink(real(MOONLIGHT))).vocab, 24)
    wanted = expected(loaded(shrink(real(MOONLIGHT)), load_file(folder / "model.safetensors")), ids)
    assert_close(opened(folder).logits(ids), wanted)
    session = opened(folder, engine="torch")
    layers = tuple(replace(x, attention=replace(x.attention, eps=1e-5)) for x in session.model.layers)
    session.model = session.engine.model = replace(session.model, layers=layers)
    assert distance(session.logits(ids), wanted) > 1e-2


# ------------------------------------------------------------------------------------------------------------ full size


def published(model: Model, kind: str) -> Shards:
    """The headers of a published upload, without its bytes: fp8 projections with scales, the rest in bfloat16."""
    found: dict[str, Tensor] = {}
    for name, filed in files(family_of(kind, "").names, model).items():
        full, fp8 = ("model." if name != "lm_head.weight" else "") + name, name.endswith(("_proj.weight", "mqa.weight"))
        count = math.prod(filed.shape)
        found[full] = Tensor(full, FP8 if fp8 else "BF16", filed.shape, "shard", 0, count if fp8 else 2 * count)
        if fp8:
            shape = tuple(-(-n // BLOCK) for n in filed.shape)
            found[full + SCALE] = Tensor(full + SCALE, "F32", shape, "shard", 0, 4 * math.prod(shape))
    return Shards("folder", found, {})


def test_full_size_files_are_matched() -> None:
    """All 69,975 tensors of Kimi K2, and as many scales."""
    raw = real(K2)
    model = parse(raw)
    shards = published(model, "kimi_k2")
    where, ignored, skipped = match(family_of("kimi_k2", ""), model, shards, Path("config.json"))
    assert where.keys() == tensors(model).keys()
    assert (ignored, skipped) == ((), 0)
    assert sum(len(placed.pieces) for placed in where.values()) == 69_975 + 61 * (2 * 64 - 1)
    assert sum(placed.nbytes for placed in where.values()) == shards.total_bytes
