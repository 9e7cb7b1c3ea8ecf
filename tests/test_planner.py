"""From one number to a plan: never over it, never worse with more of it, and a refusal that says what is missing.

The planner reads headers only, so a full-size E4B is planned here from its config alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge.budget.plan as planner
from edge.budget.plan import Floor, Plan, Request, choose, enumerate_plans
from edge.budget.quality import KEEPS
from edge.budget.wanted import CONTEXTS
from loaders.checkpoint import Checkpoint
from loaders.errors import Usage, WontFit
from loaders.families import Family, family_of
from loaders.formats.config import Config
from loaders.formats.measured import Measured
from loaders.formats.recipe import usual_head
from loaders.network.matformer import sliced
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, core, total
from loaders.slices import resolve
from tests.shrink import real
from tests.small import GEMMA3N, LLAMA, built

MIB = 1 << 20
GB = 10**9
FLOOR = Floor(400 * MIB)
SMALL_FLOOR = Floor(256 * MIB)
GPU_FLOOR = Floor(900 * MIB, 500 * MIB)
E4B = {
    "model_type": "gemma3n_text",
    "hidden_size": 2048,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "intermediate_size": [16384] * 35,
    "num_kv_shared_layers": 15,
    "vocab_size": 262_400,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "max_position_embeddings": 32_768,
}


@dataclass(frozen=True)
class Stored:
    """What a header says of a tensor."""

    dtype: str
    itemsize: int


@dataclass(frozen=True, eq=False)
class Headers:
    """A checkpoint without weights: all that the planner may look at."""

    model: Model
    family: Family
    dtype: str
    where: dict[str, Stored]


def headers(config: dict[str, Any], dtype: str = "BF16") -> Checkpoint:
    family = family_of(config["model_type"], "config.json")
    model = family.parse(Config(config, "config.json"))
    found = Headers(model, family, dtype, {PLE_TABLE: Stored(dtype, 4 if dtype == "F32" else 2)})
    return cast(Checkpoint, found)


@cache
def known(name: str) -> Checkpoint:
    """Checkpoints that are planned for many times over."""
    small = {**GEMMA3N, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    small |= {key: GEMMA3N[key][1:5] for key in ("layer_types", "intermediate_size", "activation_sparsity_pattern")}
    return {
        "e4b": lambda: headers(E4B),
        "e2b": lambda: headers(real("gemma-3n-E2B")),
        "gemma": lambda: headers(small, "F32"),
        "measured": lambda: headers(small, "F32"),
        "llama": lambda: headers(LLAMA, "F32"),
        "llama16": lambda: headers({**LLAMA, "max_position_embeddings": 700}, "F16"),
    }[name]()


@cache
def results(name: str) -> tuple[Measured, ...]:
    """Losses by which half is better than full, int8 than bf16, and an odd slice the best small one."""
    if name != "measured":
        return ()
    model = known(name).model
    table = [("full", "bf16", 3.2), ("full", "int8", 3.19), ("half", "int8", 3.1), ("ffn=24,16,16,32", "int4", 3.3)]
    parts = [(resolve(model, known(name).family, text), precision, loss) for text, precision, loss in table]
    return tuple(
        Measured(p.name, p.keep, p.widths, precision, usual_head(precision), loss, 1.0, 1000, 512, "0" * 64)
        for p, precision, loss in parts
    )


@pytest.fixture(autouse=True, scope="module")
def enumerated_once() -> Iterator[None]:
    """What there is to choose from does not depend on the budget (shown below), so it is priced once per pin."""
    priced: dict[Any, list[Plan]] = {}

    def remembered(
        checkpoint: Checkpoint, request: Request, floor: Floor, measured: tuple[Measured, ...] = ()
    ) -> list[Plan]:
        key = (id(checkpoint), replace(request, budget=None, ram_budget=None), floor, measured)
        if key not in priced:
            priced[key] = enumerate_plans(checkpoint, request, floor, measured)
        return priced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "enumerate_plans", remembered)
        yield


def plan_for(name: str, budget: int | None, **pins: Any) -> Plan:
    return choose(known(name), Request(budget=budget, **pins), FLOOR, results(name))


def attempt(name: str, request: Request, floor: Floor = FLOOR) -> Plan | WontFit:
    """A plan, or the refusal as a value."""
    try:
        return choose(known(name), request, floor, results(name))
    except WontFit as refusal:
        return refusal


def every(name: str, **pins: Any) -> list[Plan]:
    return planner.enumerate_plans(known(name), Request(**pins), FLOOR, results(name))


def smallest(name: str, **pins: Any) -> int:
    return min(plan.total_bytes for plan in every(name, **pins))


def rank(plan: Plan) -> tuple[Any, ...]:
    """How good a plan is, written down anew: context, quality, precision, a chunk that is not short, the precision of
    the cache, nearness, chunk.
    """
    near = {"none": 1, "device": 1, "ram": 1, "ssd": 0}[plan.ple]
    precise = {"float32": 3, "bf16": 2, "int8": 1, "int4": 0}
    quality = plan.quality
    best = plan.context, quality.depth, quality.score, precise[plan.precision]
    return *best, plan.chunk >= min(64, plan.context), precise[plan.kv], near, plan.chunk


NAMES = st.sampled_from(["e4b", "e2b", "gemma", "measured", "llama", "llama16"])
# From far too little to more than anything needs, fine where the small models live.
EXTRA_BYTES = st.one_of(st.integers(-50 * MIB, 2 * MIB), st.integers(0, 80 * MIB), st.integers(0, 16 * GB))
PINS = st.fixed_dictionaries(
    {},
    optional={
        "precision": st.sampled_from(["float32", "bf16", "int8", "int4"]),
        "kv": st.sampled_from(["float32", "bf16"]),
        "context": st.sampled_from([1, 17, 512, 700]),
    },
)
quick = settings(max_examples=150, deadline=None)
# Where an example enumerates plans of a GPU several times over.
few = settings(max_examples=60, deadline=None)


@quick
@given(NAMES, EXTRA_BYTES, EXTRA_BYTES, PINS)
def test_never_over_budget_and_never_worse_with_more(name: str, one: int, other: int, pins: dict[str, Any]) -> None:
    least = smallest(name, **pins)
    low, high = sorted((max(1, least + one), max(1, least + other)))
    found = []
    for budget in (low, high):
        plan = attempt(name, Request(budget, **pins))
        if isinstance(plan, WontFit):
            assert budget < least == plan.needed
            assert (plan.exit_code, plan.budget) == (80, budget)
            continue
        assert plan.total_bytes == sum(plan.bytes.values()) <= budget
        assert plan == plan_for(name, budget, **pins), "the same input gives the same plan"
        assert all(getattr(plan, key) == value for key, value in pins.items())
        assert 0 < plan.chunk <= plan.context <= known(name).model.context
        found.append(rank(plan))
    assert found == sorted(found)
    assert len(found) == (low >= least) + (high >= least)


@quick
@given(NAMES, EXTRA_BYTES, PINS)
def test_nothing_better_would_have_fitted(name: str, extra: int, pins: dict[str, Any]) -> None:
    budget = smallest(name, **pins) + max(0, extra)
    chosen = plan_for(name, budget, **pins)
    fitting = [plan for plan in every(name, **pins) if plan.total_bytes <= budget]
    assert rank(chosen) == max(map(rank, fitting))
    equal = [plan.total_bytes for plan in fitting if rank(plan) == rank(chosen)]
    assert chosen.total_bytes == min(equal), "of equals the smallest"


@given(
    layers=st.integers(2, 6),
    shared=st.integers(0, 3),
    width=st.integers(1, 24).map(lambda n: 8 * n),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3)]),
    dim=st.integers(1, 40).map(lambda n: 4 * n),
    vocab=st.integers(1, 5000),
    longest=st.integers(1, 5000),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
)
@settings(max_examples=25, deadline=None)
def test_refusals_are_exact_for_any_shape(
    layers: int,
    shared: int,
    width: int,
    heads: tuple[int, int],
    dim: int,
    vocab: int,
    longest: int,
    dtype: str,
) -> None:
    full, sliding = "full_attention", "sliding_attention"
    kinds = [full if i % 2 else sliding for i in range(layers)]
    shared = min(shared, max(0, layers - 2))
    config = {
        "model_type": "gemma3n_text",
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 8,
        "intermediate_size": width,
        "layer_types": kinds,
        "activation_sparsity_pattern": 0.5,
        "num_kv_shared_layers": shared,
        "sliding_window": 16,
        "vocab_size": vocab,
        "vocab_size_per_layer_input": vocab,
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 2,
        "max_position_embeddings": longest,
    }
    checkpoint = headers(config, dtype)
    with pytest.raises(WontFit) as refused:
        choose(checkpoint, Request(budget=1, context=min(longest, 64)), FLOOR)
    needed = refused.value.needed
    request = Request(budget=needed, context=min(longest, 64))
    plan = choose(checkpoint, request, FLOOR)
    assert plan.total_bytes == needed
    assert f"{needed} bytes" in str(refused.value)
    assert plan.label() in str(refused.value)
    assert {plan.slice for plan in enumerate_plans(checkpoint, request, FLOOR)} >= {"full"}
    with pytest.raises(WontFit) as again:
        choose(checkpoint, replace(request, budget=needed - 1), FLOOR)
    assert again.value.needed == needed


def test_what_there_is_to_choose_from_does_not_depend_on_the_budget() -> None:
    for name in ("gemma", "llama"):
        all_plans = enumerate_plans(known(name), Request(), FLOOR)
        assert enumerate_plans(known(name), Request(budget=5, ram_budget=7), FLOOR) == all_plans
        assert len({(p.part, p.recipe, p.kv, p.ple, p.context, p.chunk) for p in all_plans}) == len(all_plans)


def test_without_a_budget_the_best_there_is() -> None:
    for name in ("e4b", "gemma", "llama"):
        plan = plan_for(name, None)
        assert plan == every(name)[0]
        assert rank(plan) == max(map(rank, every(name)))


# Pins


@pytest.mark.parametrize("name", ["E2B", "e2b", "full", "half", "E3.18B", "quarter+skip=3", "ffn=12345x35"])
def test_a_pinned_slice_is_kept_whatever_the_budget(name: str) -> None:
    for budget in (None, smallest("e4b", slice=name)):
        assert plan_for("e4b", budget, slice=name).slice.lower() == name.lower()


def test_a_slice_spelt_out_keeps_its_published_score() -> None:
    by_name, by_hand = plan_for("e4b", None, slice="E2B"), plan_for("e4b", None, slice="half+skip=20-24")
    assert (by_name.part.keep, by_name.part.widths) == (by_hand.part.keep, by_hand.part.widths)
    assert by_name.quality == by_hand.quality
    assert (by_hand.quality.score, by_hand.quality.origin) == (50.9, "MMLU")


@pytest.mark.parametrize("tier", ["ram", "ssd", "device"])
def test_a_pinned_tier_is_kept_and_priced(tier: str) -> None:
    plan = plan_for("e4b", None, ple=tier, slice="full")
    assert plan.ple == tier
    assert plan.bytes["ple"] == (16 * MIB if tier == "ssd" else 262_144 * 35 * 256 * 2)


def test_pinned_precisions_halve_and_double() -> None:
    exact, half = (plan_for("gemma", None, precision=p, context=512) for p in ("float32", "bf16"))
    mixed = plan_for("gemma", None, precision="float32", kv="bf16", context=512)
    assert (exact.precision, exact.kv, half.precision, half.kv) == ("float32", "float32", "bf16", "bf16")
    assert exact.bytes["kv"] == 2 * half.bytes["kv"] == 2 * mixed.bytes["kv"]
    assert mixed.bytes["weights"] == exact.bytes["weights"] < 2 * half.bytes["weights"]


def test_a_sixteen_bit_checkpoint_is_not_blown_up_unless_asked() -> None:
    assert {plan.precision for plan in every("e4b")} == {"bf16", "int8", "int4"}
    assert {plan.precision for plan in every("gemma")} == {"bf16", "float32", "int8", "int4"}
    assert plan_for("e4b", None).precision == "bf16"
    assert plan_for("e4b", None, precision="float32").bytes["weights"] > 1.99 * plan_for("e4b", None).bytes["weights"]


@pytest.mark.parametrize(
    ("pins", "flag"),
    [
        ({"context": 0}, "--context"),
        ({"context": -1}, "--context"),
        ({"precision": "int3"}, "--precision"),
        ({"precision": "int4, head int4"}, "--precision"),
        ({"kv": "fp8"}, "--kv"),
        ({"ple": "none"}, "--ple"),
        ({"slice": "E5B"}, "--slice"),
        ({"slice": ""}, "--slice"),
        ({"slice": "skip=18"}, "--slice"),
        ({"slice": "ffn=8192"}, "--slice"),
        ({"slice": "ffn=99999x35"}, "--slice"),
        ({"slice": "skip=35"}, "--slice"),
    ],
)
def test_pins_that_cannot_be_are_usage_errors_that_name_the_flag(pins: dict[str, Any], flag: str) -> None:
    with pytest.raises(Usage) as refused:
        plan_for("e4b", None, **pins)
    assert refused.value.exit_code == 2
    assert flag in str(refused.value)
    assert "expected" in str(refused.value)


def test_no_more_context_than_a_model_was_made_for() -> None:
    for asked in (32_768, 32_769, 10**12):
        assert plan_for("e4b", None, context=asked).context == 32_768


def test_contexts_to_fall_back_to_stay_below_the_models_own() -> None:
    assert tuple(dict.fromkeys(plan.context for plan in every("e4b"))) == CONTEXTS
    assert tuple(dict.fromkeys(plan.context for plan in every("llama16"))) == (700, 512)


@pytest.mark.parametrize("pins", [{"ple": "ram"}, {"ple": "ssd"}, {"slice": "half"}, {"slice": "skip=1"}])
def test_a_plain_model_has_neither_slices_nor_a_table(pins: dict[str, str]) -> None:
    with pytest.raises(Usage):
        plan_for("llama", None, **pins)
    assert {(plan.slice, plan.ple, plan.bytes["ple"]) for plan in every("llama")} == {("full", "none", 0)}


def test_a_refusal_says_what_to_unpin() -> None:
    with pytest.raises(WontFit) as refused:
        plan_for("e4b", 6 * GB, slice="full", context=32_768, precision="bf16")
    assert "--slice and --precision and --context" in str(refused.value)
    with pytest.raises(WontFit) as refused:
        plan_for("e4b", 2 * GB, slice="full", context=32_768)
    assert "--slice and --context" in str(refused.value)
    with pytest.raises(WontFit) as refused:
        plan_for("e4b", GB)
    assert "to the planner" not in str(refused.value)


# Full-size E4B


def test_the_smallest_plan_is_named_and_its_bytes_are_enough() -> None:
    for pins, precision in (({"precision": "bf16"}, "bf16"), ({"precision": "int8"}, "int8"), ({}, "int4, head int4")):
        with pytest.raises(WontFit) as refused:
            plan_for("e4b", 3 * GB // 2, **pins)
        text, needed = str(refused.value), refused.value.needed
        assert f"E2B in {precision}, PLE table on SSD, context 512" in text
        assert f"{needed} bytes" in text
        assert f"--budget {needed}" in text
        assert needed == smallest("e4b", **pins)
        assert plan_for("e4b", needed, **pins).slice == "E2B"


def test_where_losses_were_measured_they_decide() -> None:
    """Half was measured to be the better model; the slice that nobody named is offered, and spelt as it was saved."""
    best = plan_for("measured", None)
    assert (best.slice, best.precision, best.quality.origin) == ("half", "int8", "measured")
    assert plan_for("measured", smallest("measured")).quality.origin == "parameters", "smaller than all that were"
    assert "ffn=24,16,16,32" in {plan.slice for plan in every("measured")}
    assert plan_for("measured", None, slice="full", precision="int8").quality.score == -3.19


def test_where_nothing_is_published_narrowing_ranks_above_skipping() -> None:
    order = list(dict.fromkeys(plan.slice for plan in every("gemma")))
    narrowed = [name for name in order if "skip" not in name]
    assert narrowed == ["full", "half", "quarter"]
    assert order == narrowed + [name for name in order if "skip" in name]


def test_published_slices_rank_by_their_published_figures() -> None:
    order = list(dict.fromkeys(plan.slice for plan in every("e4b") if plan.context == 4096))
    assert order[:4] == ["E3.59B", "E3.79B", "E3.39B", "full"]
    assert order[-1] == "E2B"
    scores = [next(p.quality.score for p in every("e4b") if p.slice == name) for name in order]
    assert scores == sorted(scores, reverse=True)
    assert len(order) == 16


@pytest.mark.parametrize(
    ("budget", "slice", "tier"),
    [
        (5.45 * GB, "E2B", "ssd"),
        (5.7 * GB, "E1.96B", "ssd"),
        (7.0 * GB, "E2.69B", "ssd"),
        (8.0 * GB, "E3.18B", "ssd"),
        (10.0 * GB, "E3.59B", "ssd"),
        (14.0 * GB, "E3.59B", "ram"),
        (64.0 * GB, "E3.59B", "ram"),
    ],
)
def test_what_e4b_becomes_within_a_budget(budget: float, slice: str, tier: str) -> None:
    plan = plan_for("e4b", int(budget), precision="bf16")
    assert (plan.slice, plan.ple, plan.context, plan.precision) == (slice, tier, 4096, "bf16")


def test_quality_comes_before_nearness_and_nearness_before_bytes() -> None:
    near, far = plan_for("e4b", None, slice="E3.59B"), plan_for("e4b", None, slice="E3.59B", ple="ssd")
    assert near.ple == "ram"
    between = far.total_bytes + (near.total_bytes - far.total_bytes) // 2
    assert between > plan_for("e4b", None, slice="E2B").total_bytes, "E2B with its table in RAM would fit as well"
    chosen = plan_for("e4b", between)
    assert (chosen.slice, chosen.ple, chosen.precision) == ("E3.59B", "ssd", "bf16"), "int8 with it in RAM would fit"
    assert plan_for("e4b", None, precision="int8").total_bytes < between


def test_e4b_costs_what_its_tensors_weigh() -> None:
    for name in ("E2B", "E3.18B", "full"):
        plan = plan_for("e4b", None, slice=name, ple="ssd", context=4096)
        small = sliced(known("e4b").model, plan.part)
        without_table = total(small) - 262_144 * len(plan.part.keep) * 256
        assert 2 * without_table <= plan.bytes["weights"] < 2.002 * without_table
        # 16 sliding layers of 512 tokens and 4 full ones, 2048 bytes a token and layer.
        assert plan.bytes["kv"] == (16 * 512 + 4 * 4096) * 2048
        assert plan.bytes["runtime"] == FLOOR.host
        assert plan.bytes["activations"] < 400 * MIB
    # The published counts include keys and values of layers that share: 30 - 20 and 35 - 20 times 2,097,408.
    assert core(sliced(known("e4b").model, plan_for("e4b", None, slice="E2B").part)) == 1_905_495_648 - 10 * 2_097_408
    assert core(known("e4b").model) == 3_980_491_248 - 15 * 2_097_408


# Quantized: what the published models become on the machines this is for


@pytest.mark.parametrize(
    ("name", "budget", "slice", "precision", "score"),
    [
        ("e4b", 2.0, "E1.96B", "int4, head int4", 53.4),
        ("e4b", 2.5, "E3.18B", "int4, head int4", 61.8),
        ("e4b", 2.9, "E3.59B", "int4, head int4", 63.4),
        ("e4b", 3.0, "E3.59B", "int4", 63.4),
        ("e4b", 4.0, "E3.59B", "int4", 63.4),
        ("e4b", 5.0, "E3.59B", "int8", 63.4),
        ("e2b", 2.0, "full", "int4, head int4", None),
        ("e2b", 2.5, "full", "int4", None),
        ("e2b", 3.0, "full", "int8", None),
        ("e2b", 4.0, "full", "int8", None),
        ("e2b", 5.5, "full", "bf16", None),
    ],
)
def test_what_published_models_become_in_little_memory(
    name: str, budget: float, slice: str, precision: str, score: float | None
) -> None:
    plan = choose(known(name), Request(budget=int(budget * GB)), SMALL_FLOOR)
    assert (plan.slice, plan.recipe.label, plan.ple, plan.context) == (slice, precision, "ssd", 4096)
    # Where a few MB decide, keys and values give way before quality, and before chunks become short.
    assert plan.kv == ("int8" if (name, budget) in (("e4b", 2.5), ("e4b", 3.0)) else "bf16")
    if score is not None:
        keeps = KEEPS[plan.precision, plan.recipe.head]
        assert plan.quality.score == pytest.approx(25 + (score - 25) * keeps)


@pytest.mark.parametrize("name", ["e4b", "e2b"])
def test_what_does_not_fit_a_gigabyte_and_a_half_at_all(name: str) -> None:
    with pytest.raises(WontFit) as refused:
        choose(known(name), Request(budget=3 * GB // 2), SMALL_FLOOR)
    assert "in int4, head int4, PLE table on SSD, context 512" in str(refused.value)
    plans = planner.enumerate_plans(known(name), Request(), SMALL_FLOOR)
    assert refused.value.needed == min(plan.total_bytes for plan in plans)
    assert 1.70 * GB < refused.value.needed < 1.80 * GB


@pytest.mark.parametrize("name", ["E2B", "E3.18B", "full"])
def test_quantized_weights_cost_what_their_blocks_weigh(name: str) -> None:
    """A block of 32 values takes 34 bytes at int8 and 18 at int4; vectors and what steers stay float32."""
    bf16 = plan_for("e4b", None, slice=name, precision="bf16").bytes["weights"]
    int8 = plan_for("e4b", None, slice=name, precision="int8").bytes["weights"]
    assert 34 / 64 * bf16 <= int8 < 1.002 * 34 / 64 * bf16
    usual = plan_for("e4b", None, slice=name, precision="int4")
    forced = plan_for("e4b", smallest("e4b", slice=name, precision="int4"), slice=name, precision="int4")
    assert (usual.recipe.head, forced.recipe.head) == ("int8", "int4")
    assert usual.bytes["weights"] - forced.bytes["weights"] == 262_400 * 2048 // 32 * 16
    assert 18 / 64 * bf16 <= forced.bytes["weights"] < 1.06 * 18 / 64 * bf16, "gates and projections stay at int8"


def test_a_quantized_run_has_a_table_of_bytes_and_a_cache_of_sixteen_bits() -> None:
    """Its rows are a scale and a byte a value, whatever the core's precision."""
    for precision in ("int8", "int4"):
        plan = plan_for("e4b", None, slice="full", ple="ram", precision=precision)
        assert plan.bytes["ple"] == 262_144 * 35 * (256 + 2)
        assert plan.kv == "bf16"
        assert plan_for("e4b", None, precision=precision, kv="float32").kv == "float32"


def test_a_precision_keeps_its_share_of_what_is_above_chance() -> None:
    """At one slice the order is fixed; between slices a narrow one in more bits may lose to a wide one in fewer."""
    for name in ("e4b", "e2b", "gemma"):
        for part in {plan.part for plan in every(name)}:
            scores = {p.recipe: p.quality.score for p in every(name) if p.part == part}
            ordered = sorted(scores, key=lambda recipe: list(KEEPS).index((recipe.precision, recipe.head)))
            assert [scores[r] for r in ordered] == sorted(scores.values(), reverse=True)
            best = max(scores.values())
            chance = 25.0 if name == "e4b" else 0.0
            for recipe, score in scores.items():
                assert score - chance == pytest.approx((best - chance) * KEEPS[recipe.precision, recipe.head])
    wide, narrow = plan_for("e4b", None, slice="full", precision="int4"), plan_for("e4b", None, slice="E2B")
    assert wide.quality.score > narrow.quality.score
    assert wide.total_bytes < narrow.total_bytes


def test_the_tokenizer_is_held_against_the_budget_of_its_machine() -> None:
    floor = Floor(400 * MIB, 500 * MIB, 33 * MIB)
    bare, with_text = (choose(known("e4b"), Request(), f) for f in (replace(floor, tokenizer=0), floor))
    assert with_text.bytes == {**bare.bytes, "tokenizer": 33 * MIB}
    on_gpu = choose(known("e4b"), Request(device="cuda"), floor)
    assert on_gpu.host_bytes["tokenizer"] == 33 * MIB
    assert "tokenizer" not in on_gpu.bytes


def test_plans_are_told_as_they_are_kept() -> None:
    plan = plan_for("e4b", smallest("e4b"))
    told = plan.as_dict()
    assert (told["precision"], told["head"], plan.label().split(",")[0]) == ("int4", "int4", "E2B in int4")
    assert told["bytes_per_token"] == plan.bytes["weights"]
    assert plan.most_tps(told["bytes_per_token"] * 7.5) == pytest.approx(7.5)
    assert sum(plan.read_bytes.values()) == plan.bytes_per_token
    assert set(plan.read_bytes) == {"float32", "int8", "int4"}
    untied = plan_for("llama", None)
    assert untied.bytes_per_token == untied.bytes["weights"] - untied_embedding()


def untied_embedding() -> int:
    """Bytes of a table of which decoding reads one row."""
    return LLAMA["vocab_size"] * LLAMA["hidden_size"] * 4


def test_planning_e4b_is_fast() -> None:
    """A third of a second of processor time: nobody should feel that the number was thought about.

    Best of three: where other tests left many objects, one run in three pays for walking over them.
    """
    took = []
    for _ in range(3):
        started = time.process_time()
        found = enumerate_plans(known("e4b"), Request(budget=6 * GB), FLOOR)
        took.append(time.process_time() - started)
    assert min(took) < 0.33
    assert {(plan.precision, plan.recipe.head) for plan in found} == set(KEEPS) - {("float32", "float32")}
    assert len(found) == 16 * 7 * 2 * len(CONTEXTS) * 3, "slices, recipes and their keys, tiers, contexts, chunks"


# Two budgets: a GPU and its host


def gpu(budget: int | None, ram: int | None = None, **pins: Any) -> Plan:
    return choose(known("e4b"), Request(budget, ram, device="cuda", **pins), GPU_FLOOR)


@pytest.mark.parametrize("tier", ["ram", "ssd"])
def test_on_a_gpu_the_table_counts_on_the_host(tier: str) -> None:
    plan = gpu(None, ple=tier)
    assert set(plan.bytes) == {"runtime", "weights", "kv", "activations"}
    assert plan.bytes["runtime"] == GPU_FLOOR.device + planner.DEVICE_SLACK
    assert plan.host_bytes["runtime"] == GPU_FLOOR.host
    assert plan.host_bytes["ple"] == (16 * MIB if tier == "ssd" else 262_144 * len(plan.part.keep) * 512)
    assert plan.host_total_bytes == sum(plan.host_bytes.values())
    assert plan.as_dict()["host_total_bytes"] == plan.host_total_bytes


def test_on_a_gpu_the_table_may_be_pinned_to_the_device() -> None:
    plan = gpu(None, ple="device", slice="full")
    assert plan.bytes["ple"] == 262_144 * 35 * 512
    assert "ple" not in plan.host_bytes
    assert {p.ple for p in planner.enumerate_plans(known("e4b"), Request(device="cuda"), GPU_FLOOR)} == {"ram", "ssd"}


def test_on_a_cpu_everything_counts_against_one_budget() -> None:
    plan = plan_for("e4b", None)
    assert set(plan.bytes) == {"runtime", "tokenizer", "weights", "ple", "kv", "activations"}
    assert (plan.host_bytes, plan.host_total_bytes) == ({}, 0)
    assert "host_bytes" not in plan.as_dict()


def test_the_table_in_ram_costs_the_device_nothing() -> None:
    device = gpu(None, slice="full").total_bytes
    assert gpu(device, slice="full").ple == "ram"
    assert gpu(device, slice="full").precision == "bf16"
    with pytest.raises(WontFit):
        plan_for("e4b", device, slice="full", ple="ram", precision="bf16")


def test_the_ram_budget_sends_the_table_to_storage() -> None:
    roomy, tight = gpu(20 * GB, 8 * GB), gpu(20 * GB, 3 * GB)
    assert roomy.precision == tight.precision == "bf16", "near in int8 would fit as well"
    assert (roomy.ple, tight.ple) == ("ram", "ssd")
    assert roomy.slice == tight.slice == "E3.59B"
    with pytest.raises(WontFit, match="--ram-budget") as refused:
        gpu(20 * GB, 500 * MIB)
    assert gpu(20 * GB, refused.value.needed).host_total_bytes == refused.value.needed
    with pytest.raises(WontFit):
        gpu(20 * GB, refused.value.needed - 1)


@few
@given(st.integers(1, 20 * GB), st.integers(1, 8 * GB), st.integers(0, 4 * GB), st.integers(0, 4 * GB))
def test_neither_budget_is_passed_and_more_of_either_is_never_worse(dev: int, ram: int, more: int, host: int) -> None:
    found = []
    for budget, ram_budget in ((dev, ram), (dev + more, ram + host)):
        plan = attempt("e4b", Request(budget, ram_budget, device="cuda"), GPU_FLOOR)
        if isinstance(plan, WontFit):
            assert plan.needed > plan.budget in (budget, ram_budget)
            assert not found
            continue
        assert plan.total_bytes <= budget
        assert plan.host_total_bytes <= ram_budget
        found.append(rank(plan))
    assert found == sorted(found)


@few
@given(st.integers(1, 9 * GB), st.integers(1, 3 * GB))
def test_doing_what_the_refusals_say_ends_with_a_plan(budget: int, ram: int) -> None:
    for _ in range(4):
        plan = attempt("e4b", Request(budget, ram, device="cuda"), GPU_FLOOR)
        if isinstance(plan, Plan):
            break
        if "--ram-budget" in str(plan):
            assert plan.budget == ram < plan.needed
            ram = plan.needed
        else:
            assert plan.budget == budget < plan.needed
            budget = plan.needed
    assert isinstance(plan, Plan), "four times more was given, and it still does not fit"
    assert plan.total_bytes <= budget
    assert plan.host_total_bytes <= ram


def test_a_real_checkpoint_plans_like_its_headers() -> None:
    with_weights = Checkpoint.open(built("gemma3n"))
    try:
        real = enumerate_plans(with_weights, Request(), FLOOR)
    finally:
        with_weights.close()
    assert [plan.as_dict() for plan in real] == [
        plan.as_dict() for plan in enumerate_plans(headers(GEMMA3N, "F32"), Request(), FLOOR)
    ]
