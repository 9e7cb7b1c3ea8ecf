"""Every family through the command line: what runs, in every form of its weights, and what is refused in one line."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edge
from edge import engine as engines
from edge.budget import machine
from edge.budget.plan import Floor
from loaders.checkpoint import Checkpoint
from loaders.errors import EdgeError
from loaders.network.rotary import frequencies
from loaders.network.spec import LatentAttention, Model
from loaders.network.tensors import active, tensors, total
from tests import makers
from tests.command import ENOUGH, PROMPT, Cli, Done, cli_fixture, refused  # noqa: F401
from tests.makers import Tensors, assert_close, expected, make, prompt, reference, variant
from tests.mutations_families import NASTY, Case, at_place, cases, places, replaced
from tests.shrink import DISTINCT, parse, real, shrink
from tests.test_cli_run import CONTRACT, conforms
from tests.test_families_deepseek import quantized

MIB = 1 << 20
TOKENS = 262  # of the tokenizer that makers writes
MOST_MEMORY, MOST_SECONDS = 64 * MIB, 1.0
Spoken = Callable[[str], Path]


@cache
def text_of(name: str) -> dict[str, Any]:
    """A shrunk text config whose vocabulary the tokenizer fits in, and whose end of text is the tokenizer's."""
    raw = shrink(real(name))
    text: dict[str, Any] = raw.get("text_config", raw)
    return {**text, "vocab_size": max(text["vocab_size"], TOKENS + 9), "eos_token_id": 1}


def only_text(found: Tensors) -> Tensors:
    """Ids without a text, and the special ones, have logits of 0: greedy always says something."""
    for name in ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"):
        if name in found:
            found[name][TOKENS:] = found[name][:2] = 0.0
    return found


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    """name -> a checkpoint with a tokenizer; shared, so read-only."""

    @cache
    def folder(name: str) -> Path:
        return makers.tokenizer(make(tmp_path_factory.mktemp(name), text_of(name), change=only_text))

    return folder


@pytest.fixture(scope="module", autouse=True)
def known_floor(spoken: Spoken) -> Iterator[None]:
    """The floor, measured once and remembered, so that a plan's bytes can be a budget."""
    with edge.load(spoken(DISTINCT[0]), context=16, precision="float32") as session:
        bare: Floor = replace(session.floor, tokenizer=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.Runtime, "floor", lambda self: bare)
        patch.setattr(machine, "known_floor", lambda engine, device: machine.Known(bare, "native", "cpu"))
        yield


def run(cli: Cli, model: Path, *more: object) -> dict[str, Any]:
    """The one object of a short greedy run that went well."""
    done = cli("run", model, PROMPT, "-n", 6, "-c", 64, "--temp", 0, "--json", *more)
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert set(found) == set(CONTRACT)
    plain = {**CONTRACT, "ple": type(None)} if found["ple"] is None else CONTRACT
    assert {key for key in plain if not conforms(found[key], plain[key])} == set()
    assert (len(found["tokens"]), found["finish"]) == (6, "length")
    assert found["text"]
    return found


def well(done: Done) -> Done:
    """A command that went well, and had nothing else to say."""
    assert (done.code, done.err) == (0, "")
    return done


# What runs


@pytest.mark.parametrize("name", DISTINCT)
def test_what_is_planned_is_what_runs(cli: Cli, spoken: Spoken, name: str) -> None:
    """With a small cache too: latent entries keep 16 bits, every other cache has a good quarter of its bytes left."""
    folder, model = spoken(name), parse(text_of(name))
    whole = run(cli, folder, "--precision", "float32", "--slice", "full")
    assert (whole["plan"]["precision"], whole["plan"]["slice"]) == ("float32", "full")
    assert (whole["ple"] is None) == (model.ple is None)
    planned = well(cli("plan", folder, "--json", "--kv", "int8", "-c", 64, *ENOUGH)).json["plan"]
    assert planned["precision"] == "float32"
    assert planned["bytes"] == run(cli, folder, "--kv", "int8", *ENOUGH)["plan"]["bytes"]
    narrow, wide = planned["bytes"]["kv"], whole["plan"]["bytes"]["kv"]
    if isinstance(model.layers[0].attention, LatentAttention):
        assert 2 * narrow == wide
    else:
        assert 0.25 * wide < narrow < 0.45 * wide


@pytest.mark.parametrize("name", DISTINCT)
def test_a_checkpoint_is_described(cli: Cli, spoken: Spoken, name: str) -> None:
    folder, model = spoken(name), parse(text_of(name))
    shown = well(cli("inspect", folder, "--json")).json
    assert (shown["family"], shown["weights"], shown["dtype"]) == (model.family, True, "F32")
    assert (shown["parameters"], shown["active_parameters"]) == (total(model), active(model))
    text = well(cli("inspect", folder)).out
    assert text.startswith("model ")
    assert f"{len(model.layers)} layers" in text


@pytest.mark.parametrize("name", DISTINCT)
def test_a_pack_says_what_its_checkpoint_says(cli: Cli, spoken: Spoken, tmp_path: Path, name: str) -> None:
    """A run in int8 packs on its way; a pack that is written on purpose is the same."""
    folder, out = spoken(name), tmp_path / "pack"
    small = run(cli, folder, "--precision", "int8", *ENOUGH)
    assert small["plan"]["precision"] == "int8"
    assert str(folder) in [pack["source"] for pack in well(cli("pack", "--list", "--json")).json["packs"]]
    done = cli("pack", folder, "-o", out)
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith(f"{out}: ")
    again = run(cli, out, "--precision", "int8", *ENOUGH)
    assert again["tokens"] == small["tokens"]
    four = run(cli, out, "--precision", "int4", *ENOUGH)["plan"]
    assert four["precision"] == "int4"
    assert four["bytes"]["weights"] < again["plan"]["bytes"]["weights"]
    assert well(cli("inspect", out)).out


@pytest.mark.parametrize("name", [name for name in DISTINCT if parse(real(name)).nested is None])
def test_a_family_without_slices_says_so(cli: Cli, spoken: Spoken, tmp_path: Path, name: str) -> None:
    for part in ("half", "skip=0"):
        refused(cli("slice", spoken(name), "--slice", part, "-o", tmp_path / "new"), 2, "--slice")
    assert os.listdir(tmp_path) == []


# Nasty, but legal

LEGAL: dict[str, tuple[str, dict[str, Any]]] = {
    "every-expert-active": ("qwen3-30B-A3B", {"num_experts_per_tok": 8}),
    "one-expert": ("qwen3-30B-A3B", {"num_experts": 1, "num_experts_per_tok": 1}),
    "no-mixture": ("qwen3-30B-A3B", {"mlp_only_layers": [0, 1, 2]}),
    "unnormalized": ("qwen3-30B-A3B", {"norm_topk_prob": False, "num_key_value_heads": 1}),
    "groups-of-two": ("deepseek-v3", {"n_group": 16, "topk_group": 2}),
    "every-group-active": ("deepseek-v3", {"topk_group": 8, "num_experts_per_tok": 32}),
    "no-dense-layer": ("deepseek-v3", {"first_k_dense_replace": 0}),
    "nothing-but-dense-layers": ("deepseek-v3", {"first_k_dense_replace": 5}),
    "one-latent-head": ("moonlight-16B-A3B", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "one-of-two-experts": (
        "moonlight-16B-A3B", {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 3},
    ),
    "window-past-the-context": ("mistral-7B-v0.1", {"sliding_window": 100_000}),
    "window-of-one": ("mistral-7B-v0.1", {"sliding_window": 1}),
    "window-of-two": ("gemma-3-1B", {"sliding_window": 2}),
    "all-full": ("gemma-3-4B", {"sliding_window_pattern": 1}),
    "all-sliding": ("gemma-3-4B", {"sliding_window_pattern": 9}),
    "no-sharing-no-table": ("gemma-4-E2B", {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
    "one-full-layer-first": (
        "gemma-4-E2B", {"layer_types": ["full_attention", *["sliding_attention"] * 13, "full_attention"]},
    ),
    "chunk-past-the-context": ("llama-4-scout-17B-16E", {"attention_chunk_size": 1 << 20}),
    "chunk-of-one": ("llama-4-scout-17B-16E", {"attention_chunk_size": 1}),
    "two-of-two-experts": ("llama-4-scout-17B-16E", {"num_local_experts": 2, "num_experts_per_tok": 2}),
    "one-of-one-expert": ("llama-4-maverick-17B-128E", {"num_local_experts": 1}),
    "positions-nowhere-in-chunks": ("llama-4-maverick-17B-128E", {"no_rope_layers": [0] * 6}),
    "positions-everywhere-in-chunks": ("llama-4-maverick-17B-128E", {"no_rope_layers": [1] * 6}),
    "positions-nowhere": ("smollm3-3B", {"no_rope_layers": [0] * 8}),
    "positions-everywhere": ("smollm3-3B", {"no_rope_layers": [1] * 8}),
    "heads-wider-than-the-model": ("mistral-small-3.1-24B", {"head_dim": 46, "num_key_value_heads": 1}),
    "heads-narrower": ("qwen3-8B", {"head_dim": 6, "num_key_value_heads": 1}),
    "one-key-for-all": ("olmo2-7B", {"num_key_value_heads": 1}),
    "one-key-for-all-scaled": ("llama-3.2-1B", {"num_key_value_heads": 1, "head_dim": 18}),
    "one-head": ("gpt2", {"n_head": 1}),
    "odd-heads": ("gpt2", {"n_embd": 45, "n_head": 3, "n_inner": 7, "n_layer": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGAL)
def test_what_is_strange_and_sound_is_what_transformers_makes_of_it(case: str, tmp_path: Path) -> None:
    name, keys = LEGAL[case]
    raw = shrink(real(name))
    folder = make(tmp_path / "model", {**raw.get("text_config", raw), **keys})
    model = reference(folder)
    ids = prompt(model.config.vocab_size, 40)
    logits = expected(model, ids)
    with edge.load(folder, precision="float32", context=64) as session:
        assert_close(session.logits(ids), logits)
        session.reset()
        found = [session.step(part) for part in (ids[:19], *ids[19:].reshape(-1, 1))]
        assert_close(np.stack(found), logits[18:])


# Configurations that cannot be


@pytest.mark.parametrize("name", DISTINCT)
def test_bad_configs_are_refused_by_name(name: str) -> None:
    text, tried = text_of(name), 0
    for case in cases(text):
        tried += 1
        with pytest.raises(EdgeError) as info:
            parse({**text, **case.keys}, "some/config.json")
        line = str(info.value)
        assert info.value.exit_code == case.code, (case, line)
        assert line.startswith("some/config.json: "), case
        assert case.field in line, (case, line)
        assert "\n" not in line
    assert tried > 50


def chosen(text: dict[str, Any]) -> Iterator[Case]:
    """One case of every kind, for what a person meets: the first of each field and exit code."""
    seen: set[tuple[str, int]] = set()
    for case in cases(text):
        if (case.field, case.code) not in seen:
            seen.add((case.field, case.code))
            yield case


@pytest.mark.parametrize("name", DISTINCT)
def test_bad_configs_are_one_line_and_an_exit_code(cli: Cli, tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.json"
    for case in chosen(text_of(name)):
        path.write_text(json.dumps({**text_of(name), **case.keys}))
        said = refused(cli("inspect", path), case.code, f"edge: error: {path}: ", case.field)
        assert refused(cli("plan", path, *ENOUGH), case.code) == said
        assert refused(cli("run", tmp_path, PROMPT, *ENOUGH), case.code) == said
    assert os.listdir(tmp_path) == ["config.json"]


JSON = st.recursive(
    st.sampled_from(NASTY), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@pytest.mark.parametrize("name", DISTINCT)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_key_is_a_model_or_one_line(name: str, data: st.DataObject) -> None:
    raw = shrunk(name)
    place = data.draw(st.sampled_from([*places(raw)]))
    was, value = at_place(raw, place), data.draw(JSON)
    if isinstance(was, list) and was and data.draw(st.booleans()):
        value = [*was[:-1], value]
    started = time.process_time()
    found = model_or_error(replaced(raw, place, value))
    if isinstance(found, EdgeError):
        assert found.exit_code in (65, 78)
        assert str(found).startswith("config.json: ")
        assert str(found).isprintable()
    else:
        assert all(type(n) is int and n > 0 for shape in tensors(found).values() for n in shape)
        ropes = {layer.attention.rope for layer in found.layers} - {None}
        assert all(np.isfinite(frequencies(rope)).all() for rope in ropes if rope is not None)
    assert time.process_time() - started < MOST_SECONDS


def model_or_error(raw: dict[str, Any]) -> Model | EdgeError:
    """What comes of a config; any other error escapes."""
    try:
        return parse(raw)
    except EdgeError as error:
        return error


@cache
def shrunk(name: str) -> dict[str, Any]:
    """A shrunk config, its outer part included."""
    return shrink(real(name))


@pytest.mark.parametrize("name", DISTINCT)
def test_huge_sizes_take_no_memory(name: str) -> None:
    """Nothing is made in the size that a config names, be it within bounds or beyond them."""
    tracemalloc.start()
    try:
        for place in places(shrunk(name)):
            if type(at_place(shrunk(name), place)) in (int, list):
                for size in (1 << 12, 1 << 20, 2**31 - 1):
                    model_or_error(replaced(shrunk(name), place, size))
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


# Weights that are not what the config says


def without(name: str) -> Callable[[Tensors], Tensors]:
    """All but one tensor."""
    return lambda found: {key: t for key, t in found.items() if key != name}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """One tensor is another."""
    return lambda found: {**found, name: change(found[name])}


def turned(t: torch.Tensor) -> torch.Tensor:
    """The last two axes exchanged."""
    return t.mT.contiguous()


def fewer(t: torch.Tensor) -> torch.Tensor:
    """Without its last row, or expert."""
    return t[:-1]


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
LATENT_EXPERT = "model.layers.4.mlp.experts.3.up_proj.weight"
FUSED = "model.layers.1.feed_forward.experts."
SCALE = f"{LATENT_EXPERT}_scale_inv"
Weights = Callable[[Tensors], Tensors]
WEIGHTS: dict[str, tuple[str, Weights, str, tuple[str, ...]]] = {
    "moe-expert-missing": ("qwen3-30B-A3B", without(EXPERT), EXPERT, ("no such tensor", "shape [24, 64]")),
    "moe-expert-turned": ("qwen3-30B-A3B", changed(EXPERT, turned), EXPERT, ("[64, 24]", "[24, 64]")),
    "moe-expert-short": ("qwen3-30B-A3B", changed(EXPERT, fewer), EXPERT, ("[23, 64]", "[24, 64]")),
    "moe-integers": ("qwen3-30B-A3B", changed(EXPERT, lambda t: t.to(torch.int8)), EXPERT, ("I8", "BF16")),
    "moe-router": (
        "qwen3-30B-A3B", changed("model.layers.0.mlp.gate.weight", fewer), "layers.0.mlp.gate.weight", ("[7, 64]",),
    ),
    "latent-expert-missing": ("kimi-k2", without(LATENT_EXPERT.replace(".4.", ".3.")), "experts.3.up_proj", ()),
    "latent-bias-missing": (
        "deepseek-v3", without("model.layers.3.mlp.gate.e_score_correction_bias"), "e_score_correction_bias", (),
    ),
    "latent-expansion": (
        "moonlight-16B-A3B", changed("model.layers.0.self_attn.kv_b_proj.weight", turned), "kv_b_proj.weight", (),
    ),
    "fp8-scale-missing": (
        "deepseek-v3", lambda found: without(SCALE)(quantized(found)), SCALE, ("no such tensor", "F32"),
    ),
    "fp8-scale-shape": (
        "deepseek-v3", lambda found: changed(SCALE, lambda t: torch.cat((t, t)))(quantized(found)), SCALE, ("[2, 1]",),
    ),
    "fused-turned": (
        "llama-4-scout-17B-16E", changed(f"{FUSED}gate_up_proj", turned), "up_proj", ("[8, 96, 64]", "[8, 64, 96]"),
    ),
    "fused-down-turned": (
        "llama-4-maverick-17B-128E", changed(f"{FUSED}down_proj", turned), "down_proj", ("[8, 64, 48]", "[8, 48, 64]"),
    ),
    "fused-fewer": ("llama-4-scout-17B-16E", changed(f"{FUSED}down_proj", fewer), "down_proj", ("[7, 48, 64]",)),
    "fused-missing": ("llama-4-maverick-17B-128E", without(f"{FUSED}gate_up_proj"), "gate_up_proj", ()),
    "scalar-missing": (
        "gemma-4-E2B", without("model.layers.7.layer_scalar"), "layers.7.layer_scalar", ("shape [1]", "num_hidden"),
    ),
    "scalar-longer": (
        "gemma-4-E2B", changed("model.layers.7.layer_scalar", lambda t: t.repeat(2)), "layer_scalar", ("[2]", "[1]"),
    ),
    "norm-flat": ("olmo2-7B", changed("model.layers.0.self_attn.q_norm.weight", fewer), "q_norm", ("[127]", "[128]")),
    "gpt2-turned": ("gpt2", changed("transformer.h.0.attn.c_attn.weight", turned), "c_attn.weight", ("[144, 48]",)),
    "gpt2-bias-missing": ("gpt2", without("transformer.h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias", ()),
    "gpt2-positions": ("gpt2", changed("transformer.wpe.weight", fewer), "wpe.weight", ("[255, 48]", "[256, 48]")),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_bad_weights_are_one_line_that_names_the_tensor(cli: Cli, spoken: Spoken, tmp_path: Path, case: str) -> None:
    name, change, tensor, words = WEIGHTS[case]
    folder = variant(spoken(name), tmp_path / "bad", change)
    said = refused(cli("inspect", folder), 65, str(folder), tensor, *words)
    assert refused(cli("run", folder, PROMPT, *ENOUGH), 65) == said
    assert refused(cli("pack", folder, "-o", tmp_path / "pack"), 65) == said
    assert os.listdir(tmp_path) == ["bad"]


@pytest.mark.parametrize("name", DISTINCT)
def test_a_tensor_too_few_and_one_too_many(cli: Cli, spoken: Spoken, tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(spoken(name))
    checkpoint.close()
    last = max(tensor for tensor in checkpoint.shards.tensors if "layers." in tensor or ".h." in tensor)
    folder = variant(spoken(name), tmp_path / "few", without(last))
    refused(cli("inspect", folder), 65, last, "no such tensor", "num_hidden_layers")
    extra = last.rpartition(".")[0] + ".mystery"
    folder = variant(spoken(name), tmp_path / "many", lambda found: {**found, extra: torch.ones(3)})
    refused(cli("inspect", folder), 65, "no place for", extra)
