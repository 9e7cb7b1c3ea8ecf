"""The parity gate: what a package computes beside what the model it was written from computes, on the same tokens.

Whoever asks hands in both as something that takes steps; nothing here knows how either computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from loaders.errors import BadCheckpoint, ParityFailed
from loaders.formats.quant import BITS
from loaders.formats.sharded import Notify
from loaders.network.spec import Model
from loaders.network.tensors import active

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
# Most that two logits may differ, as a share of the reference's largest. Of quantized packages where ONNX Runtime
# multiplies dequantized weights by the activations as they are; what its fast kernels add to that is measured. Of
# float16 half of all positions: a value just above a threshold may fall below it, and a token goes to another expert.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, **dict.fromkeys(BITS, 1e-3)}
LARGEST, LEAST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
# Tokens of the whole course, at most; those past a window's end, more than the slack of the buffer that holds it; those
# without a window to pass.
MOST, PAST, USUAL = 1100, 24, 64
# Positions that a median says something of.
MANY = 4
# A way in which the model differs from itself by a share of this of what a package does tells nothing.
LIKE = 30.0
# Parameters a token meets from which on a pass takes seconds where weights are dequantized in each.
HEAVY = 10**9


class Steps(Protocol):
    """A model that runs: see :class:`edge.engine.base.Engine`."""

    chunk: int

    def forward(self, ids: Ids, want: Literal["last"]) -> Floats:
        """Appends ids [t], at most ``chunk``; logits [1, vocab] of the last."""

    def logits(self, ids: Ids) -> Floats:
        """Logits [t, vocab] of all, in a cache of their own."""

    def reset(self) -> None:
        """Empties the cache."""


Opened = Callable[[], AbstractContextManager[Steps]]


@dataclass(frozen=True)
class Course:
    """The tokens a check runs over.

    ``ids`` int64 [t]: the first ``prompt`` are read at once, and in chunks of ``sizes`` again and again, the others one
    at a time; all logits of the first ``short`` are compared. ``spans``: windows and chunks of attention that end
    before the last token; ``beyond``: those that end within the context, but too late for a check.
    """

    ids: Ids
    prompt: int
    short: int
    sizes: tuple[int, ...]
    spans: tuple[int, ...]
    beyond: tuple[int, ...]

    @property
    def pieces(self) -> Iterator[Ids]:
        """The prompt in uneven chunks."""
        at = turn = 0
        while at < self.prompt:
            size = min(self.sizes[turn % len(self.sizes)], self.prompt - at)
            yield self.ids[at : at + size]
            at, turn = at + size, turn + 1

    def as_dict(self) -> dict[str, Any]:
        """What was covered, for a report."""
        return {
            "tokens": len(self.ids),
            "decoded": len(self.ids) - self.prompt,
            "past": list(self.spans),
            "not_past": list(self.beyond),
        }


def course(model: Model, context: int, *, seed: int = 0, most: int = MOST) -> Course:
    """Random tokens, as many as it takes to pass the end of every window that ends before ``most``."""
    heavy = active(model) > HEAVY
    limit = min(most, context)
    spans = sorted({layer.attention.span for layer in model.layers if layer.attention.span is not None})
    passed = tuple(span for span in spans if span < limit)
    count = min(limit, max(USUAL, max(passed, default=0) + PAST))
    decoded = min(8 if heavy else 32, count // 2)
    return Course(
        ids=np.random.default_rng(seed).integers(0, model.vocab, count, np.int64),
        prompt=count - decoded,
        short=min(4 if heavy else 16, count),
        sizes=(1, 100, 255) if heavy else (1, 7, 64, 3, 29, 50),
        spans=passed,
        beyond=tuple(span for span in spans if limit <= span < context),
    )


def reference(
    steps: Steps, course: Course, notify: Notify = lambda *_: None, *, otherwise: bool = False
) -> dict[str, Floats]:
    """What is right: logits float32 [n, vocab] by the way in which :func:`observe` comes by them.

    ``otherwise``: the same from passes over fewer tokens, which differs by how a model amplifies what is rounded.
    """
    tick = Ticks(notify, len(course.ids) + course.short)
    if otherwise:
        short = one_by_one(steps, course.ids[: course.short], tick)
    else:
        short = tick.after(course.short, steps.logits(course.ids[: course.short]))
    found = through(steps, course, tick, otherwise=otherwise)
    return {"prefill": found["chunked"][-1:], **found, "every": short, "stepwise": short}


def observe(steps: Steps, course: Course, notify: Notify = lambda *_: None) -> dict[str, Floats]:
    """Logits float32 [n, vocab] of a package: of a prompt read at once, of one read in chunks, of tokens decoded after
    it, and of a beginning, all at once and one by one.
    """
    tick = Ticks(notify, len(course.ids) + course.prompt + 2 * course.short)
    short = course.ids[: course.short]
    every = tick.after(course.short, steps.logits(short))
    steps.reset()
    stepwise = one_by_one(steps, short, tick)
    steps.reset()
    prefill = whole(steps, course.ids[: course.prompt], tick)
    return {"prefill": prefill, **through(steps, course, tick), "every": every, "stepwise": stepwise}


def through(steps: Steps, course: Course, tick: Ticks, *, otherwise: bool = False) -> dict[str, Floats]:
    """The course from its beginning: logits at the end of every chunk of the prompt, and of every token after it. A
    course of one token has none after it. ``otherwise``: chunks are read in two halves.
    """
    steps.reset()
    parts = 2 if otherwise else 1
    ends = [[whole(steps, half, tick) for half in halves(piece, parts)][-1] for piece in course.pieces]
    found = {"chunked": np.concatenate(ends)}
    if course.prompt < len(course.ids):
        found["decode"] = one_by_one(steps, course.ids[course.prompt :], tick)
    steps.reset()
    return found


def halves(ids: Ids, parts: int) -> list[Ids]:
    """ids in so many parts, none of them empty."""
    return [part for part in np.array_split(ids, parts) if len(part)]


def whole(steps: Steps, ids: Ids, tick: Ticks) -> Floats:
    """In as few passes as an engine takes; the last token's logits [1, vocab]."""
    out = np.empty((0, 0), np.float32)
    for start in range(0, len(ids), steps.chunk):
        part = ids[start : start + steps.chunk]
        out = tick.after(len(part), steps.forward(part, "last"))
    return out


def one_by_one(steps: Steps, ids: Ids, tick: Ticks) -> Floats:
    """A pass for each token; logits [t, vocab]."""
    return np.concatenate([whole(steps, ids[i : i + 1], tick) for i in range(len(ids))])


class Ticks:
    """Tokens as progress."""

    def __init__(self, notify: Notify, total: int) -> None:
        self.notify, self.total, self.done = notify, total, 0

    def after(self, count: int, out: Floats) -> Floats:
        """Counts what was needed for ``out``."""
        self.done += count
        self.notify("checking", self.done, self.total)
        return np.array(out, np.float32)  # an engine may answer in a buffer of its own


def scale(right: dict[str, Floats]) -> float:
    """The largest logit of all; where all are zero the smallest number: nothing else is like them."""
    return max(LEAST, *(float(np.abs(x).max()) for x in right.values()))


def differences(right: dict[str, Floats], found: dict[str, Floats]) -> dict[str, float]:
    """The largest difference of each way, as a share of the largest logit of all; infinite for what is no number."""
    most, largest = scale(right), {}
    for way, expected in right.items():
        with np.errstate(invalid="ignore", over="ignore"):
            share = float(np.abs(found[way] - expected).max()) / most if expected.shape == found[way].shape else np.inf
        largest[way] = share if np.isfinite(share) else float("inf")
    return largest


def typical(right: dict[str, Floats], found: dict[str, Floats]) -> dict[str, float]:
    """As :func:`differences`, of half of a way's positions at most; not of ways with a handful of positions, unless no
    way has more.
    """
    most = scale(right)
    enough = min(MANY, max(len(x) for x in right.values()))
    ways = [way for way, expected in right.items() if len(expected) >= enough]
    return {way: float(np.median(np.abs(found[way] - right[way]).max(axis=1))) / most for way in ways}


def agreement(right: dict[str, Floats], found: dict[str, Floats]) -> dict[str, float]:
    """Mean Kullback-Leibler divergence in nats, and how often the likeliest token is the same."""
    ways = [way for way in ("chunked", "decode", "every") if way in right]
    a, b = (np.concatenate([x[way] for way in ways]) for x in (right, found))
    p, q = log_softmax(a), log_softmax(b)
    divergence = float(np.mean(np.sum(np.exp(p) * (p - q), axis=1)))
    return {"kl": max(0.0, divergence), "top1": float(np.mean(a.argmax(axis=1) == b.argmax(axis=1)))}


def log_softmax(x: Floats) -> npt.NDArray[np.float64]:
    """[n, vocab], in double precision."""
    wide = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return found


def check(
    course: Course,
    precision: str,
    open_reference: Opened,
    open_package: Opened,
    exact: Callable[[bool], None],
    notify: Notify = lambda *_: None,
) -> dict[str, Any]:
    """The report of a package that passes, plain data for its manifest. Raises ParityFailed for one that does not,
    BadCheckpoint for a model that computes no numbers itself.

    ``exact(True)`` makes the package compute with activations as they are, ``exact(False)`` makes it again what is to
    be shipped; only called for quantized ones. Of the two models only one is open at a time.
    """
    tolerance = TOLERANCE[precision]
    with open_reference() as steps:
        right = reference(steps, course, notify)
    refuse_model(right)
    quantized = precision in BITS
    if quantized:
        exact(True)
    with open_package() as steps:
        found = observe(steps, course, notify)
    largest = differences(right, found)
    refuse(largest, LARGEST)
    judged = typical(right, found) if precision == "float16" else largest
    noise: dict[str, float] = {}
    if max(judged.values()) > tolerance:
        with open_reference() as steps:
            noise = differences(right, reference(steps, course, notify, otherwise=True))
        judged = steady(judged, noise, tolerance)
    refuse(judged, tolerance)
    report = {
        **course.as_dict(),
        **({"noise": noise} if noise else {}),
        "tolerance": tolerance,
        "difference": judged,
        "judged": max(judged.values()),
        "largest": max(largest.values()),
    }
    if not quantized:
        return {**report, **agreement(right, found)}
    exact(False)
    with open_package() as steps:
        found = observe(steps, course, notify)
    shipped = differences(right, found)
    refuse(shipped, LARGEST)
    return {**report, "shipped": {"largest": max(shipped.values()), **agreement(right, found)}}


def steady(judged: dict[str, float], noise: dict[str, float], tolerance: float) -> dict[str, float]:
    """The differences by which a package is judged: not of ways in which the model is as far from itself.

    Random weights amplify what is rounded, from token to token: past some tokens nothing compares with anything. A
    model that is so from its first tokens on is judged by all of them.
    """
    kept = {way: found for way, found in judged.items() if found <= tolerance or noise[way] * LIKE < found}
    return kept or judged


def refuse_model(right: dict[str, Floats]) -> None:
    """Raises BadCheckpoint for a model that gives no answers a package could be compared with."""
    way = next((way for way, logits in right.items() if not np.isfinite(logits).all()), None)
    if way is not None:
        raise BadCheckpoint(
            "the model's own logits are not finite",
            field=f"check, {way}",
            expected="numbers",
            hint="Weights are damaged, or too large for float32. --no-check writes them down all the same",
        )


def refuse(largest: dict[str, float], tolerance: float) -> None:
    """Raises ParityFailed for a difference that is too large, or no number."""
    way = max(largest, key=largest.__getitem__)
    if not largest[way] <= tolerance:
        raise ParityFailed(
            f"logits differ by {largest[way]:.2g} of the largest",
            field=f"check, {way}",
            expected=f"at most {tolerance:g}",
            hint="Nothing was written: edge, or this ONNX Runtime, has a bug. --no-check writes it all the same",
        )
