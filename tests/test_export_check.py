"""The parity gate, on models whose every way to be wrong is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from export.check import MOST, PAST, TOLERANCE, USUAL, Course, agreement, check, course, differences
from loaders.errors import BadCheckpoint, ParityFailed
from loaders.families import family_of
from loaders.formats.config import Config
from loaders.network.spec import Attention, Model
from tests.shrink import real, shrink
from tests.small import GEMMA3N, LLAMA, VOCAB

WINDOW = 40


@dataclass
class Toy:
    """Logits are a sum over the last ``window`` tokens of what each stands for, by how long ago it was.

    ``wrong`` is what a package may get wrong: (tokens in the cache before, tokens of the pass) -> added to logits.
    """

    window: int = WINDOW
    chunk: int = 16
    noise: float = 0.0
    wrong: Any = None
    longest: int = 0

    def __post_init__(self) -> None:
        self.table = np.random.default_rng(3).standard_normal((VOCAB, VOCAB)).astype(np.float32)
        self.buffer = np.empty((1, VOCAB), np.float32)
        self.seen: list[int] = []

    def one(self) -> np.ndarray:
        recent = self.seen[-self.window :]
        return self.table[recent].T @ (1.0 / np.arange(len(recent), 0, -1, dtype=np.float32))

    def forward(self, ids: np.ndarray, want: str) -> np.ndarray:
        assert want == "last"
        assert 0 < len(ids) <= self.chunk
        assert ids.min() >= 0
        assert ids.max() < VOCAB
        before = len(self.seen)
        self.seen += ids.tolist()
        self.longest = max(self.longest, len(self.seen))
        self.buffer[0] = self.one()
        self.buffer += self.noise * np.abs(self.buffer).max()
        if self.wrong is not None:
            self.buffer += self.wrong(before, len(ids))
        return self.buffer

    def logits(self, ids: np.ndarray) -> np.ndarray:
        held, self.seen = self.seen, []
        out = []
        for token in ids.tolist():
            self.seen.append(token)
            out.append(self.one())
        self.seen = held
        return np.stack(out)

    def reset(self) -> None:
        self.seen = []


MODEL = family_of("gemma3n_text", "config.json").parse(Config({**GEMMA3N, "sliding_window": WINDOW}, "config.json"))


def run(package: Toy, precision: str = "float32", shipped: Toy | None = None) -> dict[str, Any]:
    """The gate, with one model open at a time."""
    now = {"exact": shipped is None, "open": 0}

    @contextmanager
    def opened(toy: Toy) -> Iterator[Toy]:
        assert now["open"] == 0
        now["open"] = 1
        yield toy
        now["open"] = 0

    def exact(wanted: bool) -> None:
        now["exact"] = wanted

    def current() -> Any:
        return opened(package if now["exact"] or shipped is None else shipped)

    ticks: list[tuple[int, int]] = []
    report = check(
        course(MODEL, 512), precision, lambda: opened(Toy(chunk=33)), current, exact,
        lambda what, done, total: ticks.append((done, total)),
    )  # fmt: skip
    assert all(done <= total for done, total in ticks)
    assert ticks[-1][0] == ticks[-1][1]
    assert now["exact"] is (shipped is None), "what is shipped is what was left behind"
    return report


def test_a_package_that_computes_the_same_passes() -> None:
    package = Toy(chunk=16)
    report = run(package)
    assert report["largest"] < 1e-6
    assert report["top1"] == 1.0
    assert report["kl"] < 1e-9
    assert (report["tokens"], report["past"], report["not_past"]) == (USUAL, [WINDOW], [])
    assert package.longest == USUAL
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def restless(before: int, t: int) -> float:
    """What random weights make of rounding: far into a text an answer depends on how it was read."""
    return 0.05 * (t % 5) if before > 6 and t > 1 else 0.0


def test_where_a_model_differs_from_itself_a_package_is_not_judged() -> None:
    model = Toy(chunk=33, wrong=restless)

    def report(package: Toy) -> dict[str, Any]:
        return check(
            course(MODEL, 512), "float32", lambda: nullcontext(model), lambda: nullcontext(package), lambda _: None
        )

    found = report(Toy(chunk=33, wrong=lambda before, t: 2 * restless(before, t)))
    assert found["noise"]["chunked"] > 1e-3
    assert "chunked" not in found["difference"]
    assert {"every", "stepwise", "decode"} <= found["difference"].keys()
    assert found["judged"] < 1e-6
    assert found["largest"] > 1e-3
    with pytest.raises(ParityFailed, match="chunked"):
        report(Toy(chunk=33, wrong=lambda before, t: 100.0 * restless(before, t)))
    with pytest.raises(ParityFailed, match="stepwise"):
        report(Toy(chunk=33, wrong=lambda before, t: 0.1 if t == 1 and 0 < before < 8 else restless(before, t)))


@pytest.mark.parametrize(
    ("fault", "way"),
    [
        (Toy(window=WINDOW - 1), "decode"),
        (Toy(window=WINDOW + 1), "decode"),
        (Toy(window=1 << 20), "decode"),
        (Toy(wrong=lambda before, t: 0.1 if t == 7 and before else 0.0), "chunked"),
        (Toy(wrong=lambda before, t: 0.1 if t == 16 else 0.0), "prefill"),
        (Toy(wrong=lambda before, t: 0.1 if t == 1 and 0 < before < 8 else 0.0), "stepwise"),
        (Toy(wrong=lambda before, t: np.nan if before == 50 else 0.0), "decode"),
        (Toy(wrong=lambda before, t: np.inf if before == 0 and t == 1 else 0.0), "chunked"),
    ],
)
def test_a_package_that_is_wrong_in_one_way_is_refused(fault: Toy, way: str) -> None:
    with pytest.raises(ParityFailed, match=way) as error:
        run(fault)
    assert error.value.exit_code == 70
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_each_precision_has_a_tolerance(precision: str) -> None:
    allowed = TOLERANCE[precision]
    fast = Toy(noise=0.05) if precision.startswith("int") else None
    report = run(Toy(noise=allowed / 2), precision, fast)
    assert report["tolerance"] == allowed
    assert allowed / 20 < report["judged"] <= allowed
    assert report["judged"] <= report["largest"]
    with pytest.raises(ParityFailed, match=f"at most {allowed:g}"):
        run(Toy(noise=allowed * 20), precision, fast)


def test_in_float16_a_few_tokens_may_take_another_turn() -> None:
    """Half of all positions count; but a window that is wrong is wrong in more."""
    flipped = Toy(wrong=lambda before, t: 5.0 if before % 3 == 0 else 0.0)
    report = run(flipped, "float16")
    assert report["judged"] < 1e-6
    assert report["largest"] > 0.1
    assert set(report["difference"]) == {"decode", "every", "stepwise"}
    with pytest.raises(ParityFailed):
        run(flipped)
    with pytest.raises(ParityFailed, match="decode"):
        run(Toy(window=WINDOW // 2), "float16")
    with pytest.raises(ParityFailed):
        run(Toy(wrong=lambda before, t: np.nan if before == 50 else 0.0), "float16")


def test_what_a_fast_kernel_adds_is_told_and_not_refused() -> None:
    rough = Toy(wrong=lambda before, t: np.where(np.arange(VOCAB) == 5, 30.0, 0.0).astype(np.float32))
    report = run(Toy(), "int4", rough)
    assert report["largest"] < 1e-6
    assert report["shipped"]["largest"] > 0.1
    assert report["shipped"]["top1"] < 0.5
    assert report["shipped"]["kl"] > 0.1
    with pytest.raises(ParityFailed):
        run(Toy(), "int4", Toy(wrong=lambda before, t: np.nan))


def config(name: str) -> Model:
    raw = shrink(real(name))
    raw = raw.get("text_config", raw)
    return family_of(raw["model_type"], name).parse(Config(raw, name))


@pytest.mark.parametrize(
    "name", ["gemma-3n-E2B", "gemma-3-1B", "llama-4-scout-17B-16E", "llama-3.2-1B", "mistral-7B-v0.1"]
)
@pytest.mark.parametrize("context", [20, 130, 4096])
def test_a_course_goes_past_every_window_that_ends_within_it(name: str, context: int) -> None:
    model = config(name)
    found = course(model, context)
    spans = {layer.attention.span for layer in model.layers} - {None}
    assert len(found.ids) <= min(MOST, context)
    assert sum(len(piece) for piece in found.pieces) == found.prompt < len(found.ids)
    assert set(found.spans) == {s for s in spans if s is not None and s < min(MOST, context)}
    assert all(s < len(found.ids) for s in found.spans)
    assert all(s >= context for s in spans - {*found.spans, *found.beyond} if s is not None)
    assert len(found.ids) == min(context, max(USUAL, max(found.spans, default=0) + PAST))


@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_context_of_hardly_a_token_has_a_course_too(context: int, precision: str) -> None:
    def report(package: Toy) -> dict[str, Any]:
        return check(
            course(MODEL, context), precision, lambda: nullcontext(Toy()), lambda: nullcontext(package), lambda _: None
        )

    found = report(Toy())
    assert (found["tokens"], found["decoded"]) == (context, context // 2)
    assert found["difference"].keys() & {"every", "stepwise"} == {"every", "stepwise"}
    assert ("decode" in found["difference"]) == (context > 1 and precision != "float16")
    assert found["largest"] == 0.0
    with pytest.raises(ParityFailed):
        report(Toy(wrong=lambda before, t: 5.0))


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_a_model_whose_logits_are_all_zero_is_like_itself_alone(precision: str) -> None:
    def report(package: Toy) -> dict[str, Any]:
        silent = Toy()
        silent.table[:] = 0
        return check(
            course(MODEL, 64), precision, lambda: nullcontext(silent), lambda: nullcontext(package), lambda _: None
        )

    same = Toy()
    same.table[:] = 0
    assert report(same)["largest"] == 0.0
    with pytest.raises(ParityFailed):
        report(Toy(noise=1e-3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_model_that_computes_no_numbers_is_the_models_fault(value: float, precision: str) -> None:
    def broken() -> Any:
        return nullcontext(Toy(wrong=lambda before, t: value if before == 50 else 0.0))

    with pytest.raises(BadCheckpoint, match=r"check, decode: .*not finite") as error:
        check(course(MODEL, 64), precision, broken, broken, lambda _: None)
    assert error.value.exit_code == 65


def test_a_long_chunk_of_attention_is_too_far_and_said_so() -> None:
    model = config("llama-3.2-1B")
    first = model.layers[0]
    assert isinstance(first.attention, Attention)
    wide = replace(model, layers=(replace(first, attention=replace(first.attention, chunk=2048)), *model.layers[1:]))
    found = course(wide, 4096)
    assert (found.spans, found.beyond, len(found.ids)) == ((), (2048,), USUAL)
    assert course(wide, 2048).beyond == (), "in a context that ends there, it never ends"
    assert found.as_dict()["not_past"] == [2048]


def test_large_models_take_a_shorter_way() -> None:
    raw = {**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336}
    model = family_of("llama", "config.json").parse(Config(raw, "config.json"))
    found, usual = course(model, 4096), course(config("llama-3.2-1B"), 4096)

    def passes(c: Course) -> int:
        return len(list(c.pieces)) + len(c.ids) - c.prompt + c.short

    assert passes(found) < passes(usual) / 3


def test_differences_and_agreement_are_what_they_say() -> None:
    a = {way: np.array([[4.0, 0.0, -8.0]], np.float32) for way in ("chunked", "decode", "every")}
    b = {**a, "decode": np.array([[4.0, 6.0, -8.0]], np.float32)}
    assert differences(a, b) == {"chunked": 0.0, "decode": 0.75, "every": 0.0}
    assert differences(a, {**a, "decode": np.zeros((2, 3), np.float32)})["decode"] == float("inf")
    found = agreement(a, b)
    p = np.exp([4.0, 0, -8]) / np.exp([4.0, 0, -8]).sum()
    q = np.exp([4.0, 6, -8]) / np.exp([4.0, 6, -8]).sum()
    assert found["kl"] == pytest.approx(float((p * np.log(p / q)).sum()) / 3)
    assert found["top1"] == pytest.approx(2 / 3)
