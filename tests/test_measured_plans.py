"""Measured losses in place of an estimate: which slice the planner prefers, and what it says of why."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from edge.budget.plan import Floor, Plan, Request, choose, enumerate_plans
from edge.budget.quality import KEEPS, MOST_UNNAMED, Losses, comparable, spelled
from edge.cli.show import plan_table
from edge.store.measured import save
from loaders.checkpoint import Checkpoint
from loaders.families import family_of
from loaders.formats.config import Config
from loaders.formats.measured import NAME, Measured, dump
from loaders.formats.recipe import PRECISIONS, Recipe, recipes
from loaders.formats.safetensors import Shards
from loaders.network.matformer import Slice, full, validate
from loaders.network.spec import Model
from loaders.sketch import sketch
from loaders.slices import candidates, named, resolve
from tests import small
from tests.command import ENOUGH, Cli, cli_fixture, floor_fixture  # noqa: F401
from tests.shrink import CONFIGS
from tests.small import gemma3n_fixture  # noqa: F401

CONFIG: dict[str, Any] = {**small.GEMMA3N, "num_hidden_layers": 6, "num_kv_shared_layers": 2}
CONFIG |= {key: small.GEMMA3N[key][:6] for key in ("layer_types", "intermediate_size", "activation_sparsity_pattern")}
TEXT, OTHER = "0f" * 32, "1e" * 32
FLOOR = Floor(1 << 20)
FLOAT, BF16, INT8, INT4, LOW = (recipe for precision in PRECISIONS for recipe in recipes(precision))


@cache
def source(config: str = "") -> Checkpoint:
    """Shapes without weights: of the small config above, or of a published one."""
    if config:
        return sketch(CONFIGS / f"{config}.json")
    family = family_of("gemma3n_text", "")
    model = family.parse(Config(CONFIG, ""))
    table = sketch(CONFIGS / "gemma-3n-E2B.json", "F32").where["ple.table"]
    return Checkpoint(Path("none"), CONFIG, family, model, Shards("", {}, {}), {"ple.table": table}, (), 0)


def model(config: str = "") -> Model:
    """What it is."""
    return source(config).model


def result(part: str, loss: float, recipe: Recipe = INT8, config: str = "", **more: Any) -> Measured:
    """Of a slice by name."""
    found = resolve(model(config), source(config).family, part)
    facts = {"bits_per_byte": loss / 3, "tokens": 4096, "context": 512, "text": TEXT, **more}
    return Measured(part, found.keep, found.widths, recipe.precision, recipe.head, loss, **facts)


def plans(*results: Measured, config: str = "", **pins: Any) -> list[Plan]:
    """Every plan, at one context."""
    return enumerate_plans(source(config), Request(context=64, **pins), FLOOR, results)


def order(found: list[Plan], recipe: Recipe = INT8) -> list[str]:
    """Slices as they are preferred, at a recipe."""
    return list(dict.fromkeys(plan.slice for plan in found if plan.recipe == recipe))


def score(found: list[Plan], name: str, recipe: Recipe = INT8) -> float:
    """Of a slice at a recipe."""
    (one,) = {plan.quality.score for plan in found if (plan.slice, plan.recipe) == (name, recipe)}
    return one


SIX = ["full", "half", "quarter", "skip-first-shared", "half+skip-first-shared", "quarter+skip-first-shared"]


def test_without_results_of_the_full_model_nothing_changes() -> None:
    estimated = plans()
    assert order(estimated) == SIX
    assert {plan.quality.origin for plan in estimated} == {"parameters"}
    assert plans(result("half", 1.0), result("quarter", 0.5)) == estimated
    assert plans(result("full", 3.0, text=OTHER), result("half", 1.0))[0].quality.origin == "measured"


def test_losses_decide_even_against_parameters() -> None:
    losses = dict(zip(SIX, (3.0, 2.9, 3.4, 3.3, 3.5, 3.1), strict=True))
    found = plans(*(result(name, loss) for name, loss in losses.items()))
    assert order(found) == sorted(losses, key=losses.__getitem__)
    assert found[0].slice == "half"
    assert {name: score(found, name) for name in losses} == {name: -loss for name, loss in losses.items()}
    assert {plan.quality.origin for plan in found} == {"measured"}
    assert all(plan.quality.exact == (plan.recipe == INT8) for plan in found)


def test_a_slice_that_was_not_measured_counts_as_the_best_inside_it() -> None:
    """No better: what was measured comes first, for it is smaller. What holds none comes last, by what it has."""
    found = plans(result("full", 3.0), result("half+skip-first-shared", 3.2), result("quarter", 3.3))
    assert order(found) == [
        "full", "half+skip-first-shared", "half", "skip-first-shared", "quarter", "quarter+skip-first-shared",
    ]  # fmt: skip
    assert score(found, "half") == score(found, "skip-first-shared") == -3.2
    assert not any(plan.quality.exact for plan in found if plan.slice == "half")
    rest = [plan for plan in found if plan.slice == "quarter+skip-first-shared"]
    assert {plan.quality.origin for plan in rest} == {"parameters"}
    assert max(plan.quality.rank for plan in rest) < min(p.quality.rank for p in found if p not in rest)
    # At any budget: the smaller of the two leaves more room for everything else.
    for budget in range(min(p.total_bytes for p in found), max(p.total_bytes for p in found), 20_000):
        assert choose(source(), Request(budget, context=64), FLOOR, found_of(found)).slice not in (
            "half", "skip-first-shared",
        )  # fmt: skip


def found_of(found: list[Plan]) -> list[Measured]:
    """The results that plans stand on."""
    return list(dict.fromkeys(plan.quality.basis for plan in found if plan.quality.basis is not None))


def test_what_holds_no_measured_slice_is_ordered_as_without() -> None:
    found = plans(result("full", 3.0, config="gemma-3n-E4B"), config="gemma-3n-E4B", precision="int8", ple="ssd")
    without = plans(config="gemma-3n-E4B", precision="int8", ple="ssd")
    assert [name for name in order(found) if name != "full"] == [name for name in order(without) if name != "full"]
    assert order(found)[0] == "full" != order(without)[0]
    assert {plan.quality.origin for plan in found} == {"measured", "MMLU"}


def test_another_precision_keeps_its_share_of_what_is_above_chance() -> None:
    chance = math.log(model().vocab)
    found = plans(result("full", 3.0), result("half", 3.2))
    for name, loss in (("full", 3.0), ("half", 3.2)):
        for recipe in (FLOAT, BF16, INT4, LOW):
            share = KEEPS[recipe.precision, recipe.head] / KEEPS["int8", "int8"]
            assert chance + score(found, name, recipe) == pytest.approx((chance - loss) * share)


def test_where_the_full_model_was_measured_at_both_its_share_counts() -> None:
    chance = math.log(model().vocab)
    found = plans(result("full", 3.0), result("full", 3.6, INT4), result("full", 2.9, BF16), result("half", 3.2))
    shares = {INT4: chance - 3.6, BF16: chance - 2.9, FLOAT: chance - 2.9, LOW: (chance - 3.6) * 0.95 / 0.96}
    for recipe, share in shares.items():
        assert chance + score(found, "full", recipe) == pytest.approx(share)
        assert chance + score(found, "half", recipe) == pytest.approx((chance - 3.2) * share / (chance - 3.0))
    assert score(found, "full", FLOAT) == score(found, "full", BF16) == -2.9
    nearest = plans(*found_of(found), result("half", 4.0, INT4))
    assert chance + score(nearest, "half", LOW) == pytest.approx((chance - 4.0) * 0.95 / 0.96)
    assert chance + score(nearest, "half", BF16) == pytest.approx((chance - 3.2) * shares[BF16] / (chance - 3.0))


def test_a_model_worse_than_chance_is_not_made_better_by_fewer_bits() -> None:
    found = plans(result("full", 9.0, BF16), result("half", 9.5), result("quarter", 2.0))
    assert {score(found, "full", r) for r in (FLOAT, BF16, INT8, INT4, LOW)} == {-9.0}
    assert {score(found, "half", r) for r in (FLOAT, BF16, INT8, INT4, LOW)} == {-9.5}
    assert score(found, "quarter", INT4) < score(found, "quarter") == -2.0


def test_measured_slices_become_candidates() -> None:
    odd, spare, unspelt = "ffn=64x3,32x3", "skip=5", "tuned"
    by_hand = named(model(), "ffn=128,9,8,7,6+skip=5")
    more = replace(result("full", 2.8), name=unspelt, keep=by_hand.keep, widths=by_hand.widths)
    lying = replace(result("full", 3.5), name="half", widths=(5,) * 6)
    found = plans(result("full", 3.0), result(odd, 2.9), result(spare, 3.05), more, lying)
    # Half contains the odd one, so it is no worse, and comes after it.
    assert order(found)[:5] == ["skip=5+ffn=128x1,9x1,8x1,7x1,6x1", odd, "half", "full", spare]
    assert {"ffn=5x6", *SIX} < set(order(found)), "a name that says something else is not believed"
    by_name = {plan.slice: plan.part for plan in found}
    for name, part in by_name.items():
        assert resolve(model(), source().family, name) == part
    pinned = plans(result("full", 3.0), result(odd, 2.9), slice="half")
    assert {plan.slice for plan in pinned} == {"half"}


def test_names_that_a_file_gives_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text('{"ffn_hidden_dims": [5, 5, 5, 5, 5, 5]}')
    found = plans(result("full", 3.0), replace(result("full", 3.5), name="x.json", widths=(5,) * 6))
    assert "ffn=5x6" in order(found)
    assert "x.json" not in order(found)


def test_of_thousands_some_are_candidates() -> None:
    many = [result(f"ffn={n},{n + 1}x5", 4 - n / 100) for n in range(1, 101)]
    found = plans(result("full", 3.0), *many, precision="int8")
    unnamed = [name for name in order(found) if name.startswith("ffn=")]
    assert MOST_UNNAMED // 2 <= len(unnamed) <= MOST_UNNAMED
    assert "ffn=100,101x5" in unnamed, "the best"


WIDTHS = st.lists(st.integers(1, 128), min_size=6, max_size=6)
DROPPED = st.sets(st.integers(4, 5), max_size=2)


@settings(max_examples=40, deadline=None)
@given(WIDTHS, DROPPED)
def test_a_slice_spelt_out_is_the_same_slice(widths: list[int], dropped: set[int]) -> None:
    keep = tuple(i for i in range(6) if i not in dropped)
    part = Slice("mine", keep, tuple(widths[i] for i in keep))
    validate(model(), part)
    name = spelled(model(), part)
    assert resolve(model(), source().family, name) == replace(part, name=name)


# Results that do not compare


def test_results_on_other_texts_and_contexts_do_not_mix() -> None:
    one = [result("full", 3.0), result("half", 3.4)]
    other = [result("full", 5.0, text=OTHER), result("half", 4.0, text=OTHER), result("quarter", 1.0, text=OTHER)]
    short = [result("quarter", 0.1, context=64)]
    assert order(plans(*one, *other, *short))[0] == "quarter", "most were measured on the other"
    assert score(plans(*one, *other, *short), "full") == -5.0
    assert score(plans(*one, *other[:2]), "full") in (-3.0, -5.0)
    more = [replace(m, tokens=9999) for m in one]
    assert score(plans(*other[:2], *more), "full") == -3.0, "of as many those over more tokens"
    assert score(plans(*one, *other[1:], *short), "full") == -3.0, "the full model is not among more"
    longer = [replace(m, context=600, loss=2.0) for m in one]
    assert score(plans(*one, *longer), "full") == -2.0


RESULTS = st.lists(
    st.builds(
        result,
        st.sampled_from([*SIX, "full", "skip=5", "ffn=64x3,32x3", "ffn=1x6"]),
        st.floats(0.5, 9.0),
        st.sampled_from([FLOAT, BF16, INT8, INT4, LOW]),
        text=st.sampled_from([TEXT, OTHER]),
        context=st.sampled_from([64, 512]),
    ),
    max_size=12,
    unique_by=lambda m: m.key,
)


@settings(max_examples=12, deadline=None)
@given(RESULTS, st.randoms(use_true_random=False), st.lists(st.integers(0, 1 << 20), min_size=2, max_size=6))
def test_more_budget_is_never_worse_and_order_does_not_matter(
    results: list[Measured], shuffle: random.Random, extra: list[int]
) -> None:
    found = plans(*results)
    shuffled = shuffle.sample(results, len(results))
    assert plans(*shuffled) == found
    least = min(plan.total_bytes for plan in found)
    ranks = []
    for budget in sorted(least + n for n in extra):
        plan = next(plan for plan in found if plan.total_bytes <= budget)
        assert plan == choose(source(), Request(budget, context=64), FLOOR, shuffled)
        ranks.append(plan.quality.rank)
        assert plan.quality.rank == max(p.quality.rank for p in found if p.total_bytes <= budget)
    assert ranks == sorted(ranks)


@settings(max_examples=40, deadline=None)
@given(RESULTS)
def test_the_results_that_count_are_of_one_text_and_context(results: list[Measured]) -> None:
    losses = comparable(model(), results)
    there = {(m.text, m.context) for m in results if (m.keep, m.widths) == (full(model()).keep, full(model()).widths)}
    assert isinstance(losses, Losses) == bool(there)
    if losses is not None:
        used = [m for of in losses.results.values() for m in of.values()]
        ((text, context),) = {(m.text, m.context) for m in used}
        counts = {key: sum((m.text, m.context) == key for m in results) for key in there}
        assert counts[text, context] == len(used) == max(counts.values())


# What is told


def test_plans_say_what_they_stand_on() -> None:
    found = plans(result("full", 3.0), result("half", 3.312, BF16))
    told = next(p.as_dict()["quality"] for p in found if (p.slice, p.recipe) == ("half", BF16))
    assert told == {
        "score": -3.312, "origin": "measured", "loss": 3.312, "exact": True, "tokens": 4096, "context": 512,
        "text": TEXT, "of": {"name": "half", "precision": "bf16", "head": "bf16", "loss": 3.312},
    }  # fmt: skip
    assert json.dumps(found[0].as_dict())
    estimated = next(p.as_dict()["quality"] for p in found if (p.slice, p.recipe) == ("half", INT4))
    assert estimated["exact"] is False
    assert estimated["loss"] > 3.312
    assert plans()[0].as_dict()["quality"].keys() == {"score", "origin"}


def table(found: list[Plan]) -> list[str]:
    """What ``edge plan`` prints of them."""
    out = io.StringIO()
    Console(file=out, width=160, no_color=True).print(plan_table(found, found[0], Request()))
    return out.getvalue().splitlines()


def test_the_table_shows_losses_and_what_of() -> None:
    wide = "ffn=" + ",".join(str(n) for n in range(40, 46)) + "+skip=" + ",".join("5" for _ in range(30))
    part = named(model(), "ffn=40,41,42,43,44+skip=5")
    long = replace(result("full", 3.1), name=wide, keep=part.keep, widths=part.widths)
    results = [result("full", 3.0), result("half", 3.312), result("half+skip-first-shared", 3.4), long]
    lines = table(plans(*results, precision="int8", ple="ssd"))
    assert "quality" in lines[0].split()
    assert any("half " in line and "loss 3.312" in line for line in lines)
    assert any("skip-first-shared " in line and "loss ~" in line for line in lines)
    assert any("quarter " in line and " ~" in line and "M " in line and "loss" not in line for line in lines)
    assert any("skip=5+ffn=40x1,41x1,42x1,43x1,44x1" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "measured on 4,096 tokens of text 0f0f0f0f, context 512" in text
    assert not any("loss" in line for line in table(plans(precision="int8")))


# The command line


@pytest.fixture
def folder(tmp_path: Path, gemma3n: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of which something was measured, and a cache of its own."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(gemma3n, tmp_path / "model")
    checkpoint = Checkpoint.open(gemma3n)
    parts = [resolve(checkpoint.model, checkpoint.family, name) for name in ("full", "half", "ffn=128x6,16x6")]
    found = [
        Measured(p.name, p.keep, p.widths, "int8", "int8", loss, loss / 3, 4096, 512, TEXT, 0.01, 0.9)
        for p, loss in zip(parts, (3.25, 3.125, 3.5), strict=True)
    ]
    (tmp_path / "model" / NAME).write_bytes(dump(found))
    checkpoint.close()
    return tmp_path / "model"


def test_plan_run_and_inspect_know(cli: Cli, folder: Path, floor: Floor) -> None:
    planned = cli("plan", folder, "--json", "--precision", "int8", *ENOUGH).json
    assert planned["plan"]["slice"] == "half"
    assert (planned["plan"]["quality"]["origin"], planned["plan"]["quality"]["loss"]) == ("measured", 3.125)
    assert "ffn=128x6,16x6" in {row["slice"] for row in planned["candidates"]}
    shown = cli("plan", folder, "--precision", "int8", *ENOUGH)
    assert "loss 3.125" in shown.out
    assert "0f0f0f0f" in shown.out
    ran = cli("run", folder, "hello", "-n", 1, "--json", "--precision", "int8", "-c", 64, *ENOUGH)
    assert ran.json["plan"]["slice"] == "half"
    inspected = cli("inspect", folder)
    assert all(text in inspected.out for text in ("3.125", "3.250", "ffn=128x6,16x6", "0f0f0f0f", "90.0%"))
    assert [m["loss"] for m in cli("inspect", folder, "--json").json["measured"]] == [3.25, 3.125, 3.5]


def test_results_kept_since_count_without_a_word(cli: Cli, folder: Path, floor: Floor) -> None:
    opened: Callable[[], Checkpoint] = lambda: Checkpoint.open(folder)  # noqa: E731
    checkpoint = opened()
    whole = full(checkpoint.model)
    best = Measured("full", whole.keep, whole.widths, "int8", "int8", 2.0, 1.0, 4096, 512, TEXT)
    pack = save(checkpoint, [best], lambda *_: None)
    checkpoint.close()
    for model_path in (folder, pack):
        found = [m["loss"] for m in cli("inspect", model_path, "--json").json["measured"]]
        assert sorted(found) == [2.0, 3.125, 3.5]
    assert cli("plan", folder, "--json", "--precision", "int8", *ENOUGH).json["plan"]["slice"] == "full"


def test_a_file_that_cannot_be_is_refused_by_name(cli: Cli, folder: Path, floor: Floor) -> None:
    (folder / NAME).write_text((folder / NAME).read_text().replace("3.125", "-3.125"))
    for verb in (("plan", folder), ("inspect", folder), ("pack", folder, "-q"), ("run", folder, "hello", "-n", 1)):
        done = cli(*verb)
        assert (done.code, done.out, done.err.count("\n")) == (65, "", 1)
        assert f"{NAME}: measured[1].loss" in done.err
        assert "Take edge-measured.json away" in done.err


def test_a_candidate_of_every_kind_is_there_once() -> None:
    names = [s.slice.name for s in candidates(model(), source().family)]
    assert names == [SIX[i] for i in (0, 3, 1, 4, 2, 5)]
