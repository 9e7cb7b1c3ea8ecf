"""How well a session predicts a text: loss, perplexity and bits per byte over sliding windows, and how far its
predictions are from another session's.

The logits of a whole window are never held: it is fed in pieces, and each is reduced to a few sums at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from edge.budget import watch
from edge.budget.price import FLOAT
from edge.budget.pricing import pass_bytes
from edge.corpus import Text, read_text
from edge.generate import rate
from edge.session import Session, quiet
from loaders.errors import BadCheckpoint, OverBudget, Usage
from loaders.formats.measured import Measured
from loaders.formats.sharded import Notify

__all__ = ["Score", "Text", "evaluate", "measured_of", "read_text"]

# The most context that is used unless more is asked for: losses at different contexts do not compare.
CONTEXT = 1024
# Bytes of logits held at once, and values that are widened to float64 at once.
SCORES, TILE = 32 << 20, 1 << 16


@dataclass(frozen=True)
class Score:
    """Of ``tokens`` scored, which stand for ``bytes`` of text. ``loss``: nats per token.

    ``kl``: nats per token from the reference's distribution to this one; ``top1``: the share of tokens at which both
    hold the same to be the likeliest. ``seconds`` are those of scoring, the reference's included.
    """

    tokens: int
    bytes: int
    loss: float
    kl: float | None
    top1: float | None
    seconds: float
    context: int
    stride: int

    @property
    def perplexity(self) -> float:
        """Infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as perplexity is not."""
        return self.loss * self.tokens / math.log(2) / max(1, self.bytes)

    @property
    def tps(self) -> float:
        """Scored tokens per second."""
        return rate(self.tokens, self.seconds)


def evaluate(
    session: Session,
    text: Text,
    *,
    context: int | None = None,
    stride: int | None = None,
    reference: Session | None = None,
    notify: Notify = quiet,
) -> Score:
    """Scores every token of ``text`` once, but for a first one that nothing goes before.

    Windows of ``context`` tokens, ``text.lead`` included, move on by ``stride``: all but the first window's tokens have
    at least context - stride before them. A ``reference``, a session of the same vocabulary, is fed the same. Empties
    the caches of both. Raises Usage, OverBudget, BadCheckpoint for logits that are not finite.
    """
    sessions = (session,) if reference is None or reference is session else (session, reference)
    if len({one.model.vocab for one in sessions}) > 1:
        raise Usage("another vocabulary", field="reference", expected="the same checkpoint")
    context, stride = span(min(one.plan.context for one in sessions), text, context, stride)
    size = min(piece_size(s, spare=s is session) for s in sessions)
    skipped, notify = int(not text.lead), session.guarded(notify)
    tokens, sums, started = len(text.ids) - skipped, Sums(), perf_counter()
    try:
        for start, first, end in windows(len(text.ids), context, stride, len(text.lead)):
            ids = session.checked(np.concatenate((text.lead, text.ids[start:end])).astype(np.int64), context)
            known = len(text.lead) + first - start
            for one in sessions:
                one.reset()
                prefill(one, ids[: known - 1], notify)
            for at in range(known - 1, len(ids) - 1, size):
                stop = min(at + size, len(ids) - 1)
                logits = [forward(s, ids[at:stop], ids[stop : stop + size]) for s in sessions]
                sums.add(ids[at + 1 : stop + 1], logits[0], None if reference is None else logits[-1])
                del logits
                notify("scoring", sums.tokens, tokens)
            for one in sessions:
                one.sample_device()
    finally:
        for one in sessions:
            one.reset()
    if not math.isfinite(sums.loss + sums.kl):
        raise BadCheckpoint("logits that are not finite", file=session.checkpoint.folder)
    seconds, nbytes = perf_counter() - started, int(text.sizes[skipped:].sum())
    kl, top1 = (None, None) if reference is None else (sums.kl / tokens, sums.same / tokens)
    return Score(tokens, nbytes, sums.loss / tokens, kl, top1, seconds, context, stride)


def span(most: int, text: Text, context: int | None, stride: int | None) -> tuple[int, int]:
    """(context, stride) as they are used where plans have ``most`` tokens of context. Raises Usage."""
    least = max(1, len(text.lead)) + 1
    if len(text.ids) < least - len(text.lead):
        raise Usage(f"{len(text.ids)} tokens", field="text", expected="two or more")
    context = min(most, CONTEXT) if context is None else context
    if not least <= context <= most:
        raise Usage(context, field="--context", expected=f"{least} or more, at most {most} here")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise Usage(stride, field="--stride", expected=f"1 to {context}, the context")
    return context, stride


def windows(count: int, context: int, stride: int, before: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end) of each window: it shows tokens start to end behind the ``before`` and scores first to end.

    A stride as long as the context is shortened, so that something goes before every token.
    """
    step = min(stride, context - max(1, before))
    start, first = 0, int(not before)
    while first < count:
        end = min(count, start + context - before)
        yield start, first, end
        start, first = start + step, end


def prefill(session: Session, ids: np.ndarray, notify: Notify) -> None:
    """Appends ids [t] to the cache; nothing is asked of them."""
    chunk = session.engine.chunk
    for at in range(0, len(ids), chunk):
        forward(session, ids[at : at + chunk], ids[at + chunk : at + 2 * chunk], all=False)


def forward(session: Session, ids: np.ndarray, ahead: np.ndarray, *, all: bool = True) -> np.ndarray:
    """Appends one piece to the cache; float32 logits [t, vocab], or of none. Raises OverBudget."""
    watch.check(session.watch)
    session.relief.honour()
    return session.engine.forward(ids, "all" if all else "none", ahead.tolist())


def piece_size(session: Session, *, spare: bool) -> int:
    """Tokens whose logits fit where a chunk's values are planned; with ``spare`` also into what the budget has left.

    One token's always do: every run holds them.
    """
    plan, model, budget = session.plan, session.model, session.request.budget
    size = min(session.engine.chunk, max(1, SCORES // (model.vocab * FLOAT)))
    planned = pass_bytes(session.source, model, plan, plan.chunk, every=False)
    room = max(0, budget - plan.total_bytes) if spare and budget is not None else 0
    while size > 1 and budget is not None:
        more = pass_bytes(session.source, model, plan, size, every=True) - planned
        if more <= 0 or (more <= room and affordable(session, more)):
            break
        size //= 2
    return size


def affordable(session: Session, nbytes: int) -> bool:
    """Whether so much may come on top of what is resident."""
    try:
        session.afford(nbytes, "scores")
    except OverBudget:
        return False
    return True


class Sums:
    """What is kept of the logits: sums over tokens in float64."""

    def __init__(self) -> None:
        self.tokens = self.same = 0
        self.loss = self.kl = 0.0

    @np.errstate(invalid="ignore")
    def add(self, targets: np.ndarray, logits: np.ndarray, wanted: np.ndarray | None = None) -> None:
        """``targets`` int64 [t] come after what gave ``logits`` [t, vocab]; ``wanted`` are the reference's."""
        total = log_partition(logits)
        self.tokens += len(targets)
        self.loss += float((total - logits[np.arange(len(targets)), targets]).sum())
        if wanted is not None:
            self.kl += divergence(wanted, log_partition(wanted), logits, total)
            self.same += int((logits.argmax(1) == wanted.argmax(1)).sum())


def log_partition(logits: np.ndarray) -> np.ndarray:
    """float64 [t]: the logarithm of the sum of exponentials of each row."""
    peak, out = np.asarray(logits.max(1), np.float64), np.zeros(len(logits))
    for rows, cols in tiles(*logits.shape):
        out[rows] += np.exp(logits[rows, cols] - peak[rows, None]).sum(1)
    out = np.log(out) + peak
    return out


def divergence(wanted: np.ndarray, wanted_total: np.ndarray, logits: np.ndarray, total: np.ndarray) -> float:
    """The sum over rows of KL(wanted || logits), in nats."""
    found = 0.0
    for rows, cols in tiles(*logits.shape):
        p = wanted[rows, cols] - wanted_total[rows, None]
        q = logits[rows, cols] - total[rows, None]
        found += float((np.exp(p) * (p - q)).sum())
    return found


def tiles(count: int, vocab: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks of at most TILE values."""
    deep, wide = max(1, TILE // vocab), min(vocab, TILE)
    for row in range(0, count, deep):
        for col in range(0, vocab, wide):
            yield slice(row, row + deep), slice(col, col + wide)


def measured_of(session: Session, score: Score, text: Text) -> Measured:
    """A score as it is kept beside the model."""
    part, recipe = session.plan.part, session.plan.recipe
    return Measured(
        name=part.name, keep=part.keep, widths=part.widths, precision=recipe.precision, head=recipe.head,
        loss=score.loss, bits_per_byte=score.bits_per_byte, tokens=score.tokens,
        context=score.context, text=text.sha256, kl=score.kl, top1=score.top1, stride=score.stride,
    )  # fmt: skip
