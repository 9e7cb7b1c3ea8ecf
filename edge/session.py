"""A model, loaded under a plan: logits, steps, text and an account of its memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edge import engine as engines
from edge.budget import machine, watch
from edge.budget.memory import Ledger, read_process, read_pss, trim
from edge.budget.plan import Floor, Plan, Request, enumerate_plans, pick
from edge.budget.pricing import logits_bytes
from edge.budget.units import format_bytes, parse_bytes
from edge.demo import model_path
from edge.generate import Event, Timing, Wordless, encode, generate
from edge.sampling import Sampler, Sampling
from edge.store import packs
from edge.store.measured import measured
from edge.store.packages import Opened, engine_for, open_source
from edge.store.text import open_tokenizer, text_folder, tokenizer_bytes
from loaders.errors import OverBudget, Usage
from loaders.formats.pack import Pack, parts_for
from loaders.formats.package import Package
from loaders.formats.quant import BITS
from loaders.formats.sharded import Notify
from loaders.network.matformer import sliced
from loaders.text.generation import GenerationDefaults, read_generation
from loaders.text.template import ChatTemplate
from loaders.text.tokenizer import AnyTokenizer, StreamDecoder


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Ready:
    """All that comes before a run's plan: headers, text, libraries. Made by :func:`prepare`."""

    source: Opened
    tokenizer: AnyTokenizer | None
    template: ChatTemplate | None
    defaults: GenerationDefaults
    runtime: engines.Runtime
    request: Request
    floor: Floor


class Session:
    """Made by :func:`load`. Not thread-safe; ``cancel()`` may be called from a signal handler or another thread.

    ``checkpoint`` is what was opened, a checkpoint, a pack or a package; ``source`` where weights come from, the
    checkpoint's pack when the plan is quantized. ``template`` is its chat template or None; ``defaults`` its stop
    tokens and recommended sampling; ``best`` the plan that would run without a budget.
    """

    def __init__(self, ready: Ready, *, notify: Notify = quiet, started: float | None = None) -> None:
        begun = perf_counter() if started is None else started
        self.checkpoint, self.runtime, self.request = ready.source, ready.runtime, ready.request
        self._tokenizer, self.template, self.defaults = ready.tokenizer, ready.template, ready.defaults
        self.floor, self._cancelled = ready.floor, False
        plans = enumerate_plans(ready.source, ready.request, ready.floor, measured(ready.source))
        self.plan: Plan = pick(plans, ready.request)
        self.best = plans[0]
        on_host = ready.runtime.device == "cpu"
        option, limit = ("--budget", ready.request.budget) if on_host else ("--ram-budget", ready.request.ram_budget)
        self.watch = watch.Watch(limit, option=option).start()
        self.notify = self.guarded(notify)
        try:
            self.load(limit)
        except BaseException:
            self.watch.stop()
            if getattr(self, "source", ready.source) is not ready.source:
                self.source.close()
            ready.source.close()
            raise
        self.load_s = perf_counter() - begun

    def load(self, limit: int | None) -> None:
        """Realises the plan; ``limit`` is what the host's memory is held against."""
        planned = {**self.plan.host_bytes, **self.plan.bytes}
        self.ledger = Ledger(self.request.budget, planned)
        for component in ("runtime", "tokenizer"):
            self.ledger.take(component, planned[component])
        self.source = self.packed(limit)
        self.model = sliced(self.source.model, self.plan.part)
        self.engine, self.ple = engines.load(
            self.runtime, self.source, self.model, self.plan, self.ledger, self.notify, room_left(limit),
            self.request.lock, self.request.mmap,
        )  # fmt: skip
        self.relief = watch.Request(self.engine.relieve)
        self.watch.add_relief(self.relief)
        self.tokens: list[int] = []
        self._device_peak = self.runtime.device_delta()

    def packed(self, limit: int | None) -> Opened:
        """Where the plan's weights are: what was opened, or its pack, made now where there is none."""
        if isinstance(self.checkpoint, Pack | Package) or self.plan.precision not in BITS:
            return self.checkpoint
        parts = parts_for(self.checkpoint.model, (self.plan.precision,))
        pack = packs.ensure(self.checkpoint, parts, notify=self.notify, room=room_left(limit))
        trim()
        return pack

    def guarded(self, notify: Notify) -> Notify:
        """Progress that also looks whether the budget still holds."""

        def checked(what: str, done: int, total: int) -> None:
            watch.check(self.watch)
            notify(what, done, total)

        return checked

    @property
    def tokenizer(self) -> AnyTokenizer:
        """The checkpoint's tokenizer. Raises MissingFile where there is none: such a model speaks in token ids only."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.checkpoint, None, True)
            assert self._tokenizer is not None
        return self._tokenizer

    @property
    def room(self) -> int:
        """Tokens the context still holds."""
        return self.plan.context - self.engine.position

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [t, vocab]: every position of ids [t], in a fresh cache; the session's own is left alone.

        Raises Usage for ids outside the vocabulary or more than the context; OverBudget when the answer itself,
        t * vocab * 4 bytes, would break the budget.
        """
        found = self.checked(ids, self.plan.context)
        self.afford(logits_bytes(self.source, self.model, self.plan, len(found)), "the logits")
        out = self.engine.logits(found)
        self.sample_device()
        return out

    def step(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [vocab]: appends ids to the cache, chunk by chunk, and gives the logits of the last.

        Raises Usage for ids outside the vocabulary or more than the context still holds.
        """
        out = self.feed(ids, lambda: False)
        assert out is not None
        return out

    def feed(self, ids: Sequence[int] | np.ndarray, cancelled: Callable[[], bool]) -> np.ndarray | None:
        """As ``step``, but asks between chunks whether to go on, and gives None when not."""
        found = self.checked(ids, self.room)
        starts = range(0, len(found), self.engine.chunk)
        out = np.empty((0, 0), np.float32)
        for start in starts:
            watch.check(self.watch)
            self.relief.honour()
            part, following = found[start : start + self.engine.chunk], found[start + self.engine.chunk :]
            ahead = following[: self.engine.chunk].tolist()
            try:
                out = self.engine.forward(part, "last" if start == starts[-1] else "none", ahead)
            except BaseException:
                self.reset()  # half a pass may have overwritten what a window still shows
                raise
            self.tokens.extend(part.tolist())
            if len(starts) > 1:
                self.notify("prefill", start + len(part), len(found))
            if start != starts[-1] and cancelled():
                return None
        self.sample_device()
        return out[0]

    def prefetch(self, token: int) -> None:
        """The next token is known: its row may be fetched."""
        self.engine.prefetch([token])

    def reset(self) -> None:
        """Empties the cache."""
        self.engine.reset()
        self.tokens = []

    def cancel(self) -> None:
        """Ends a running generation after the current token, or a prefill after the current chunk."""
        self._cancelled = True

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = 0,
    ) -> Iterator[Event]:
        """Yields an :class:`edge.generate.Event` per token. Text is completed as it is; see edge.chat for turns.

        Greedy unless ``temperature`` is above zero. Without a tokenizer, ids go in and tokens come out. The cache is
        kept when ``prompt`` goes on where it ended.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if max_tokens < 1:
            raise Usage(max_tokens, field="max_tokens", expected="1 or more")
        encoded = encode(self.tokenizer, prompt, self.plan.context) if isinstance(prompt, str) else prompt
        ids: list[int] = self.checked(encoded, self.plan.context).tolist()
        known = len(self.tokens)
        if not 0 < known < len(ids) or ids[:known] != self.tokens:
            self.reset()
            known = 0
        self._cancelled = False
        timing = Timing(len(ids), known, bytes_per_token=self.bytes_per_token)
        return generate(
            self,
            ids[known:],
            ids,
            Sampler(sampling, seed),
            Wordless() if self._tokenizer is None else StreamDecoder(self._tokenizer),
            stop_ids=frozenset(self.defaults.stop_ids),
            max_tokens=max_tokens,
            timing=timing,
            cancelled=lambda: self._cancelled,
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights one decoded token reads: all but embeddings of which one row is used."""
        return self.plan.bytes_per_token

    def memory(self) -> dict[str, Any]:
        """Planned and measured bytes; ``components`` maps each to {'planned', 'peak'}.

        ``peak_bytes`` is the process tree's, from its start; ``device_peak_bytes`` the GPU's, context included.
        """
        self.sample_device()
        now = read_process()
        return {
            "budget_bytes": self.request.budget,
            "planned_bytes": self.plan.total_bytes,
            "peak_bytes": self.watch.tree_peak(),
            "device_peak_bytes": self._device_peak,
            "rss_bytes": now.rss,
            "anonymous_bytes": now.anonymous,
            "file_backed_bytes": now.file_backed,
            "pss_bytes": read_pss(),
            "components": self.ledger.report(),
        }

    def sample_device(self) -> None:
        """Keeps the highest device-wide figure seen; there is no high-water mark to ask for."""
        delta = self.runtime.device_delta()
        if delta is not None:
            self._device_peak = max(self._device_peak or 0, delta)

    def afford(self, nbytes: int, what: str) -> None:
        """Raises OverBudget when ``nbytes`` on top of what is resident would pass the budget of a CPU run."""
        if self.request.budget is None or self.engine.device != "cpu":
            return
        need = read_process().rss + nbytes
        if need > self.request.budget:
            raise OverBudget(
                f"{what} would take {format_bytes(nbytes)}, {format_bytes(need)} in all",
                expected=f"at most the budget of {format_bytes(self.request.budget)}",
                hint="Ask for fewer positions at a time",
            )

    def checked(self, ids: Sequence[int] | np.ndarray, room: int) -> np.ndarray:
        """ids as int64 [t], at least one, all in the vocabulary, no more than ``room``."""
        found = np.asarray(ids)
        if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer):
            raise Usage(f"shape {list(found.shape)}, {found.dtype}", field="ids", expected="one or more whole numbers")
        if found.min() < 0 or found.max() >= self.model.vocab:
            bad = int(found[(found < 0) | (found >= self.model.vocab)][0])
            raise Usage(f"token {bad}", field="ids", expected=f"0 to {self.model.vocab - 1}")
        if len(found) > room:
            raise Usage(
                f"{len(found)} tokens",
                field="context",
                expected=f"at most {room}",
                hint="Raise --context or shorten the prompt",
            )
        return np.ascontiguousarray(found, np.int64)

    def close(self) -> None:
        """Releases memory, threads and descriptors."""
        self.watch.stop()
        self.engine.close()
        self.checkpoint.close()
        self.source.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def room_left(limit: int | None) -> int | None:
    """Bytes of a budget that this process has not taken yet; None without one."""
    return None if limit is None else max(0, limit - read_process().rss - watch.SLACK)


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    budget: str | int | None = None,
    ram_budget: str | int | None = None,
    device: str = "cpu",
    engine: str = "auto",
    precision: str = "auto",
    slice: str = "auto",
    context: int | None = None,
    ple: str = "auto",
    kv: str = "auto",
    threads: int | None = None,
    lock: bool = False,
    mmap: bool | None = None,
    notify: Notify = quiet,
) -> Session:
    """Opens a checkpoint, a pack or a package, plans for ``budget`` (bytes, or text as '2GB'; None is without limit)
    and loads the plan.

    Without ``path`` it is the demo model that ships with edge. ``threads``: how many compute on a CPU from now on,
    in sessions that are open too, one a core unless said. ``lock``: weights may not be paged out. ``mmap``: they are
    used where a pack's file is mapped, which processes share; unless said, only where that is as fast.

    ``precision="float32", budget=None`` runs a checkpoint exactly. Raises the errors of :mod:`loaders.errors`; WontFit
    before anything is loaded.
    """
    started = perf_counter()
    request = Request(
        budget=None if budget is None else parse_bytes(budget),
        ram_budget=None if ram_budget is None else parse_bytes(ram_budget, "--ram-budget"),
        slice=slice, precision=precision, ple=ple, kv=kv, context=context,
        threads=threads, lock=lock, mmap=mmap,
    )  # fmt: skip
    return open_session(
        model_path() if path is None else Path(path), request, device, engine, notify=notify, started=started
    )


def open_session(
    path: Path,
    request: Request,
    device: str,
    engine: str,
    *,
    text: bool = False,
    fresh: bool = False,
    notify: Notify = quiet,
    started: float | None = None,
) -> Session:
    """Prepares, plans and loads. With ``text`` a checkpoint without a tokenizer is refused before it is loaded.

    ``fresh``: the process has done nothing else, so the floor it sees is worth remembering.
    """
    return Session(prepare(path, request, device, engine, text=text, fresh=fresh), notify=notify, started=started)


def prepare(
    path: Path, request: Request, device: str, engine: str, *, text: bool = False, fresh: bool = False
) -> Ready:
    """Checkpoint, text and libraries first, so that the floor a plan stands on is measured with them in it."""
    source = open_source(path)
    # A template or a default that cannot be read is better known before gigabytes are.
    template, defaults = ChatTemplate.open(path), read_generation(path, source.raw_config)
    engine, folder = engine_for(source, engine), text_folder(source)
    runtime = engines.start(engine, device, request.threads, request.lock)
    if request.ram_budget is not None and runtime.device == "cpu":
        raise Usage("--ram-budget on a CPU", field="--ram-budget", expected="--budget, which counts all of it there")
    bare = runtime.floor()
    tokenizer = open_tokenizer(source, folder, text)
    request = replace(request, device=runtime.device, engine=runtime.engine)
    floor = settled(source, bare, runtime, engine, device)
    known = machine.known_floor(engine, device)
    if fresh and (known is None or known.floor.host < floor.host or known.floor.device < floor.device):
        # The same input must give the same plan: a floor a few pages lower than last time is not planned on.
        seen = machine.Known(Floor(floor.host, floor.device), runtime.engine, runtime.device)
        machine.remember_floor(engine, device, seen)
    return Ready(source, tokenizer, template, defaults, runtime, request, floor)


def settled(source: Opened, bare: Floor, runtime: engines.Runtime, engine: str, device: str) -> Floor:
    """The floor a run plans on: what `edge plan` was told, or what this process holds already where that is more."""
    known = machine.known_floor(engine, device)
    remembered = known.floor if known is not None else bare
    text = tokenizer_bytes(source)
    now = runtime.floor()
    return Floor(max(remembered.host, now.host - text), max(remembered.device, now.device), text)


def plan_floor(source: Opened, request: Request, device: str, engine: str) -> tuple[Floor, Request]:
    """The floor for a plan that loads nothing, and the request with what 'auto' comes to here."""
    known = machine.floor_for(engine_for(source, engine), device)
    if request.ram_budget is not None and known.device == "cpu":
        raise Usage("--ram-budget on a CPU", field="--ram-budget", expected="--budget, which counts all of it there")
    floor = replace(known.floor, tokenizer=tokenizer_bytes(source))
    return floor, replace(request, device=known.device, engine=known.engine)
