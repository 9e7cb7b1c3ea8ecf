"""The loop from prompt to tokens: yields events that already carry text, timings, bytes and the reason to finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, Protocol

import numpy as np

from edge.sampling import Sampler
from loaders.text.tokenizer import AnyTokenizer

# Characters of a prompt that are encoded without asking, and tokens that a cut may add.
PIECE, AROUND = 1 << 16, 64

Finish = Literal["stop", "length", "interrupted"]


@dataclass
class Timing:
    """Seconds and tokens of one generation. ``bytes_per_token`` is what a decoded token makes the engine read."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    bytes_per_token: int = 0

    @property
    def ttft_s(self) -> float:
        """Until the first token was known."""
        return self.prefill_s

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second, those that were in the cache already not counted."""
        return rate(self.prompt_tokens - self.cached_tokens, self.prefill_s)

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first, which prefill paid for."""
        return rate(self.new_tokens - 1, self.decode_s)

    @property
    def read_gbps(self) -> float:
        """10^9 bytes per second read while decoding."""
        return self.decode_tps * self.bytes_per_token / 1e9


def encode(tokenizer: AnyTokenizer, prompt: str, most: int) -> list[int]:
    """The tokens of a prompt; of one that is longer than ``most``, only so many as show that it is.

    Encoding takes some 75 bytes for each character, and no plan knows how long a prompt will be.
    """
    size = PIECE
    while size < len(prompt):
        ids = tokenizer.encode(prompt[:size])
        if len(ids) > most + AROUND:  # where it is cut a few tokens may be others
            return ids
        size *= 2
    return tokenizer.encode(prompt)


def rate(count: int, seconds: float) -> float:
    """Per second; zero for nothing."""
    return count / seconds if count > 0 and seconds > 0 else 0.0


@dataclass(frozen=True)
class Event:
    """One token, or the end. ``text`` is what it adds, whole characters only; the last event has a ``finish``."""

    text: str
    token: int | None
    index: int
    finish: Finish | None = None
    timing: Timing = field(default_factory=Timing)


class Stepper(Protocol):
    """What the loop needs of a session."""

    def feed(self, ids: Sequence[int], cancelled: Callable[[], bool]) -> np.ndarray | None:
        """Appends ids; logits of the last, or None when it was cancelled on the way."""

    def prefetch(self, token: int) -> None:
        """The next token is known."""

    @property
    def room(self) -> int:
        """Tokens the context still holds."""


class Decoder(Protocol):
    """Tokens to text, without ever splitting a character."""

    def push(self, token_id: int) -> str:
        """The text a token completes."""

    def finish(self) -> str:
        """What was held back."""


class Wordless:
    """For checkpoints without a tokenizer: tokens have no text."""

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def generate(
    session: Stepper,
    prompt: Sequence[int],
    history: Sequence[int],
    sampler: Sampler,
    decoder: Decoder,
    *,
    stop_ids: frozenset[int],
    max_tokens: int,
    timing: Timing,
    cancelled: Callable[[], bool],
) -> Iterator[Event]:
    """Feeds ``prompt``, the end of ``history`` that is not in the cache yet, and yields one event per new token.

    The last event has no token, and says why it ended. The row of a sampled token is fetched while its text is on
    the way to the user.
    """
    recent, produced = list(history), 0
    start = perf_counter()
    logits = session.feed(prompt, cancelled)
    finish: Finish = "length"
    while produced < max_tokens:
        if logits is None or cancelled():
            finish = "interrupted"
            break
        token = sampler(logits, recent)
        now = perf_counter()
        if produced == 0:
            timing.prefill_s, start = now - start, now
        else:
            timing.decode_s = now - start
        if token in stop_ids:
            finish = "stop"
            break
        produced += 1
        timing.new_tokens = produced
        more = produced < max_tokens and session.room > 0
        if more:
            session.prefetch(token)
        recent.append(token)
        yield Event(decoder.push(token), token, produced - 1, None, timing)
        if not more:
            break
        logits = session.feed([token], cancelled)
    yield Event(decoder.finish(), None, produced, finish, timing)
