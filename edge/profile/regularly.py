"""A look at something again and again, in a thread of its own, while something else goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

HZ = 50


class Regularly:
    """Calls ``look`` HZ times a second while it is entered, and once more at the end, until it returns False."""

    def __init__(self, look: Callable[[], bool], name: str) -> None:
        self._look, self._stopped = look, threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while self._look():
            if self._stopped.wait(1 / HZ):
                self._look()
                return
