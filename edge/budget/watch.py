"""The guard of the budget while something runs: samples the process tree, has caches give way, says when to stop.

A sample sees what is there at that moment. What comes and goes between two samples, or in a child that lives for less
than a second, is not seen; large buffers ask the ledger first for that reason.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from time import monotonic
from types import TracebackType
from typing import Self

import psutil

from edge.budget import memory
from edge.budget.cgroup import PROC
from edge.budget.units import format_bytes
from loaders.errors import OverBudget

__all__ = ["Request", "Tree", "Watch", "check"]

SLACK = 2 * 2**20
# Hundredths of the budget from which on caches give way.
RELIEF_FROM = 95
# Seconds: between two rounds of relief, between two searches for children, above the budget until "later" is too late.
RELIEF_EVERY = LOOK_EVERY = PATIENCE = 1.0


class Watch:
    """Samples memory every ``period`` seconds in a thread of its own and holds it against ``budget``, both in bytes.

    From 95% of the budget on, caches are asked to give way. ``over`` is set, for good, when use is above the budget
    by more than ``slack`` all the same. Without a budget (None) there is no thread, and nothing is ever over.

    ``read`` returns the bytes in use (None: RSS and swap of this process and its descendants). If it raises, the watch
    ends; nothing comes out of the thread, ``failure`` keeps what it or a relief raised last. ``timeline`` holds at most
    ``keep`` points, and ``option`` is what the user raises to get more.
    """

    def __init__(
        self,
        budget: int | None,
        *,
        period: float = 0.05,
        read: Callable[[], int] | None = None,
        slack: int = SLACK,
        keep: int = 0,
        option: str = "--budget",
    ) -> None:
        self.budget, self.period, self.slack, self.option = budget, period, slack, option
        self.failure: BaseException | None = None
        self._read = read
        self._reliefs: list[Callable[[], int]] = []
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._peak = 0
        self._over = False
        self._timeline = _Timeline(keep)
        self._relieved_at: float | None = None
        self._over_since: float | None = None
        self._promised = False

    @property
    def over(self) -> bool:
        """Use has been above the budget after the caches had given way. Stays True."""
        return self._over

    @property
    def peak(self) -> int:
        """The highest sample, in bytes; 0 before the first."""
        return self._peak

    def tree_peak(self) -> int:
        """The most the process tree is known to have held, in bytes: the highest sample, with children that have ended
        since, or the sum of the peaks of those that live, whichever is more."""
        return max(self._peak, memory.tree_peak())

    def timeline(self) -> list[tuple[float, int]]:
        """Seconds since the start and bytes, oldest first, over the whole run; each point the highest of
        equally many samples, but for the last."""
        return self._timeline.points()

    def add_relief(self, relief: Callable[[], int]) -> None:
        """``relief`` gives memory back when it is short, and returns how many bytes that were.

        It is called in the watch's thread, at most once a second, in the order of adding, until use is below 95%.
        A cache that only its owner may touch notes the request, returns False for "later", and gives way at the owner's
        next safe point: ``Request`` does that. One that raises is not asked again.
        """
        self._reliefs.append(relief)

    def start(self) -> Self:
        """Begins to sample; nothing happens if it samples already."""
        if self.budget is not None and self._thread is None:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._run, args=(self.budget,), name="edge-watch", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Takes a last sample, for the peak only, and ends the thread. May be called twice."""
        self._stopped.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _run(self, budget: int) -> None:
        try:
            reader: AbstractContextManager[Callable[[], int]] = (
                Tree() if self._read is None else nullcontext(self._read)
            )
            with reader as read:
                while not self._stopped.wait(self.period):
                    self._step(budget, read, monotonic())
                self._note(read(), monotonic())
        except BaseException as error:  # noqa: BLE001 - a guard that fails must not take down what it guards
            self.failure = error

    def _step(self, budget: int, read: Callable[[], int], now: float) -> None:
        used = self._note(read(), now)
        if used * 100 >= budget * RELIEF_FROM and (
            self._relieved_at is None or now - self._relieved_at >= RELIEF_EVERY
        ):
            self._relieved_at = now
            used = self._relieve(budget, read, used, now)
        if used <= budget + self.slack:
            self._over_since = None
            return
        if self._over_since is None:
            self._over_since = now
        if not self._promised or now - self._over_since >= PATIENCE:
            self._over = True

    def _relieve(self, budget: int, read: Callable[[], int], used: int, now: float) -> int:
        self._promised = False
        for relief in tuple(self._reliefs):
            try:
                freed = relief()
            except BaseException as error:  # noqa: BLE001 - see _run; the caches after this one can still give way
                self.failure = error
                self._reliefs.remove(relief)
                continue
            if freed is False:
                self._promised = True
                continue
            used = self._note(read(), now)
            if used * 100 < budget * RELIEF_FROM:
                break
        return used

    def _note(self, used: int, now: float) -> int:
        self._peak = max(self._peak, used)
        self._timeline.add(now, used)
        return used


class Request:
    """Relief for a cache that only its owner may touch: the watch asks, ``drop`` runs when the owner honours it."""

    def __init__(self, drop: Callable[[], int]) -> None:
        self._drop = drop
        self._wanted = threading.Event()

    def __call__(self) -> int:
        """Notes the request. False: later."""
        self._wanted.set()
        return False

    def honour(self) -> int:
        """Drops if that was asked for since the last time; the bytes freed."""
        if not self._wanted.is_set():
            return 0
        self._wanted.clear()
        return self._drop()


def check(watch: Watch) -> None:
    """Raises ``OverBudget`` if ``watch`` has seen use above the budget that did not give way."""
    if watch.over and watch.budget is not None:
        raise OverBudget(
            f"{format_bytes(watch.peak)} of memory in use, {format_bytes(watch.peak - watch.budget)} too much",
            expected=f"at most the budget of {format_bytes(watch.budget)}",
            hint=f"Raise {watch.option} or lower --context",
        )


class Tree:
    """RSS and swap of this process and its descendants, in bytes, each time it is called; a context manager.

    Children are looked for once a second. Pages that processes share are counted in each of them.
    """

    def __init__(self) -> None:
        self._files: dict[int, int] = {}
        self._looked_at: float | None = None
        self._by_kernel = os.path.exists(f"{PROC}/self/status")

    def __call__(self) -> int:
        now = monotonic()
        if self._looked_at is None or now - self._looked_at >= LOOK_EVERY:
            self._looked_at = now
            self._look()
        if not self._by_kernel:
            return sum(map(_from_psutil, self._files))
        # Without this process's own figure there is none; a child may have ended.
        own = os.getpid()
        return _resident(self._files[own]) + sum(_if_alive(file) for pid, file in self._files.items() if pid != own)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pid in list(self._files):
            self._forget(pid)

    def _look(self) -> None:
        """Files stay open: that works when the process has run out of them, and a pid may come to name another."""
        own = os.getpid()
        pids = {own, *_descendants(own)}
        for pid in self._files.keys() - pids:
            self._forget(pid)
        for pid in pids - self._files.keys():
            try:
                self._files[pid] = os.open(f"{PROC}/{pid}/status", os.O_RDONLY) if self._by_kernel else -1
            except OSError:
                if pid == own:
                    raise

    def _forget(self, pid: int) -> None:
        file = self._files.pop(pid)
        if file >= 0:
            os.close(file)


def _resident(file: int) -> int:
    """VmRSS + VmSwap of an open /proc/PID/status. Raises OSError when the process is gone."""
    text = os.pread(file, 1 << 14, 0)
    return _field(text, b"\nVmRSS:") + _field(text, b"\nVmSwap:")


def _field(text: bytes, name: bytes) -> int:
    """The kB after ``name``, in bytes; 0 without one, as for a zombie. A newline in a process's name comes escaped."""
    at = text.find(name)
    return int(text[at + len(name) : text.index(b"k", at + len(name))]) * 1024 if at >= 0 else 0


def _if_alive(file: int) -> int:
    try:
        return _resident(file)
    except OSError:
        return 0


def _from_psutil(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _descendants(pid: int) -> Iterator[int]:
    if not os.path.exists(f"{PROC}/thread-self/children"):
        # Reads every process there is: milliseconds.
        yield from (child.pid for child in psutil.Process(pid).children(recursive=True))
        return
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _children(pid: int) -> list[int]:
    """The kernel lists children by the thread that made them."""
    found: list[int] = []
    for thread in _listed(f"{PROC}/{pid}/task"):
        # One that has just ended has none; its children are another's by now, or will be found a second later.
        with suppress(OSError), open(f"{PROC}/{pid}/task/{thread}/children", "rb", buffering=0) as file:
            found += map(int, file.readall().split())
    return found


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


class _Timeline:
    """At most ``keep`` points, an even number: when full, every two become one, and new ones stand for twice as many
    samples."""

    def __init__(self, keep: int) -> None:
        self._keep = keep - keep % 2
        self._points: list[tuple[float, int]] = []
        self._lock = threading.Lock()
        self._start: float | None = None
        self._each, self._count, self._latest = 1, 0, (0.0, 0)

    def add(self, now: float, used: int) -> None:
        if not self._keep:
            return
        self._start = now if self._start is None else self._start
        with self._lock:
            first = self._count == 0
            self._latest = (now - self._start, used if first else max(self._latest[1], used))
            self._count += 1
            if self._count == self._each:
                self._points.append(self._latest)
                self._count = 0
            if len(self._points) == self._keep:
                pairs = zip(self._points[::2], self._points[1::2], strict=True)
                self._points = [(late, max(one, two)) for (_, one), (late, two) in pairs]
                self._each *= 2

    def points(self) -> list[tuple[float, int]]:
        with self._lock:
            return [*self._points, self._latest] if self._count else list(self._points)
