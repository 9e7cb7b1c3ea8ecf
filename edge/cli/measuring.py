"""What `edge profile` says while it measures: a line for each case as it ends and, on a terminal, what it is at."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from edge.profile import results
from edge.profile.case import told
from edge.profile.run import Planned
from edge.profile.subject import Subject
from loaders.errors import EdgeError, printable


class Talk:
    """Silent unless ``loud``; one live line on a terminal while it is entered."""

    def __init__(self, console: Console, loud: bool, runs: int) -> None:
        self.console, self.loud = console, loud
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn())
        live = loud and console.is_terminal
        remaining = TimeRemainingColumn(elapsed_when_finished=True)
        self._bar = Progress(*columns, remaining, console=console, transient=True, disable=not live)
        self._task, self._done = self._bar.add_task("getting ready", total=runs), 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def at(self, what: str) -> None:
        """What is being done."""
        self._bar.update(self._task, description=printable(what))

    def done(self, runs: int) -> None:
        """So many more runs have ended."""
        self._bar.advance(self._task, runs)

    def notify(self, what: str, done: int, total: int) -> None:
        """Progress of what comes before measuring."""
        self.at(f"{what}: {done / total:.0%}" if total else what)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.loud:
            self.console.print(text, markup=False, soft_wrap=True)

    def introduce(self, subject: Subject, items: Sequence[Planned], output: Path | None) -> None:
        """What will be measured."""
        what = f"{subject.name}, random weights" if subject.random else subject.name
        self.line(f"profile: {printable(what)}: {len(items)} case{'s' * (len(items) > 1)}, {runs_of(items)} runs")
        for item in items:
            said = "does not fit" if item.plan is None else item.plan.label()
            self.line(f"  {item.case.name}: {printable(said)}")
        if output is None:
            self.line("nothing is kept: -o DIR keeps results.jsonl and report.html")


def runs_of(items: Sequence[Planned]) -> int:
    """Processes that cases take, those in a control group aside."""
    return sum(item.case.repeat + 1 for item in items if item.plan is not None)


class Keeper:
    """Lines as they come: each is on the disk before the next case begins.

    Raises CannotCreate, NotPermitted for a ``folder`` that cannot take them.
    """

    def __init__(self, folder: Path | None, talk: Talk) -> None:
        self._made = folder is not None and not folder.exists()
        self.file = None if folder is None else results.claim(folder)
        self.talk, self.lines = talk, list[dict[str, Any]]()
        self.report: Path | None = None

    def add(self, line: dict[str, Any]) -> None:
        """Keeps one. Raises ReadFailed for a full disk."""
        self.lines.append(line)
        if self.file is not None:
            results.append(self.file, line)
        self.talk.line(told(line))

    def finish(self) -> EdgeError | None:
        """The page, of what there is; why there is none, where it cannot be written."""
        if self.file is None:
            return None
        if not self.lines:
            self.file.unlink(missing_ok=True)
            if self._made:
                with suppress(OSError):
                    self.file.parent.rmdir()
            return None
        from edge.profile.report import write_report

        page = self.file.with_name(results.REPORT)
        try:
            write_report(self.lines, page)
        except EdgeError as error:
            return error
        self.report = page
        return None
