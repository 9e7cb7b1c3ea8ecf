"""Memory over time: what the ledger counts, stacked, under what the kernel counts, under the budget."""

from __future__ import annotations

from typing import Any

from edge.profile.report.book import Book
from edge.profile.report.case import Case, finite, mapping, ordered, sequence
from edge.profile.report.chart import (
    GRID,
    INK,
    MUTED,
    NAMED,
    SURFACE,
    Chart,
    Table,
    axis,
    component_colour,
    component_title,
    layout,
    legend,
    stroke,
    swatch,
)
from edge.profile.report.markup import Markup, label
from edge.profile.report.words import BLANK, seconds, share, size

GB = 1e9
POINTS = 1000


def series(values: Any, count: int) -> list[float | None]:
    """GB to 0.1 MB, as many as there are seconds; what is no number is a gap."""
    numbers = [finite(v) for v in sequence(values)[:count]]
    return [None if n is None or n < 0 else round(n / GB, 4) for n in numbers]


def times_of(case: Case) -> list[float]:
    """Seconds of the samples; empty when they are not numbers that rise."""
    numbers = [finite(v) for v in sequence(case.get("timeline", "seconds"))[:POINTS]]
    found = [n for n in numbers if n is not None]
    return found if len(found) == len(numbers) and len(found) > 1 and found == sorted(found) else []


def marks_of(case: Case) -> list[tuple[float, str]]:
    """(seconds, name) of what happened when, in order; of neighbours with one name the first."""
    found: list[tuple[float, str]] = []
    for mark in sequence(case.get("timeline", "marks")):
        at, name = (*sequence(mark), None, None)[:2]
        number = finite(at)
        if number is not None and isinstance(name, str):
            found.append((number, name))
    found.sort(key=lambda mark: mark[0])
    return [mark for i, mark in enumerate(found) if i == 0 or found[i - 1][1] != mark[1]]


def measured(
    name: str, x: list[float], y: list[float | None], colour: str, dash: str, more: list[str]
) -> dict[str, Any]:
    """A line of what was measured; ``more``: a word for every point's hover."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x[: len(y)],
        "y": y,
        "text": more or None,
        "line": {"color": colour, "width": 2, "dash": dash},
        "hovertemplate": "%{y:.3f} GB" + ("%{text}" if more else ""),
    }


def split(case: Case, count: int) -> list[str]:
    """Of every sample, what is the process's own and what is in files."""
    own = series(case.get("timeline", "anonymous"), count)
    file = series(case.get("timeline", "file"), count)
    return [f" ({a or 0:.2f} own, {f or 0:.2f} of files)" for a, f in zip(own, file, strict=False)]


def memory_figure(case: Case, unknown: list[str]) -> dict[str, Any] | None:
    """Areas by component, of what the budget counts; lines for RSS and the device, the budget dashed. None without a
    timeline.
    """
    x = times_of(case)
    stack = mapping(case.get("timeline", "components"))
    held = {name: series(stack[name], len(x)) for name in ordered(stack)}
    held = {name: values for name, values in held.items() if any(values) and case.counted(name)}
    rss, device = series(case.get("timeline", "rss"), len(x)), series(case.get("timeline", "device"), len(x))
    if not x or not (held or any(rss) or any(device)):
        return None
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": label(component_title(name)),
            "x": x[: len(values)],
            "y": values,
            "stackgroup": "held",
            "fillcolor": component_colour(name, unknown),
            "line": {"width": 0.6, "color": SURFACE},
            "hovertemplate": "%{y:.3f} GB",
        }
        for name, values in held.items()
    ]
    if any(rss):
        data.append(measured("resident", x, rss, INK, "solid", split(case, len(x))))
    if any(device):
        data.append(measured("on the device", x, device, "var(--device)", "dashdot", []))
    sums = [sum(v or 0 for v in values) for values in zip(*held.values(), strict=False)]
    budget = case.budget_bytes / GB if case.budget_bytes else 0.0
    top = max(budget, *(v for v in (*sums, *rss, *device) if v), 1e-3) * 1.12
    frame = layout(
        axis(
            "seconds since the process began",
            range=[0, x[-1] or 1],
            showgrid=False,
            unifiedhovertitle={"text": "%{x:.1f} s"},
        ),
        axis("memory, GB", range=[0, top], rangemode="tozero"),
        hovermode="x unified",
    )
    if budget:
        frame["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": budget,
                "y1": budget,
                "line": {"color": "var(--limit)", "width": 2, "dash": "dash"},
            }
        ]
        frame["annotations"] = [
            {
                "xref": "paper",
                "x": 1,
                "xanchor": "right",
                "y": budget,
                "yanchor": "bottom",
                "showarrow": False,
                "text": label(f"budget {case.budget}"),
                "font": {"color": "var(--limit)", "size": 12},
            }
        ]
    frame["meta"] = {"marks": [[at, label(name)] for at, name in marks_of(case)], "mark": {"line": MUTED, "grid": GRID}}
    return {"data": data, "layout": frame}


def sentence(case: Case) -> str:
    """What a case's chart shows."""
    if case.peak is None:
        return "no peak was measured"
    if case.kept is False and case.budget_bytes:
        return f"the peak of {size(case.peak)} is over the budget by {size(case.peak - case.budget_bytes)}"
    if case.budget_bytes is None:
        return f"peak {size(case.peak)}"
    return f"peak {size(case.peak)}, {share(case.peak / case.budget_bytes)} of the budget"


def memory_charts(book: Book) -> list[Chart]:
    """A chart for every case of ours with a timeline, in the order of budgets."""
    unknown = [name for name in book.components if name not in NAMED]
    charts = []
    chosen = pictured(book)
    for case in book.ours:
        figure = memory_figure(case, unknown)
        if figure is None:
            continue
        kinds = ", ".join(component_title(trace) for trace in case.components)
        partial = {"ok": ""}.get(case.status, f" ({case.status}, partial)")
        charts.append(
            Chart(
                f"memory-{case.place}",
                f"{book.title(case)}: {sentence(case)}{partial}",
                f"Memory over time of {book.title(case)}, by component ({kinds}), with resident memory as a line "
                f"over them and the budget as a dashed line: {sentence(case)}.",
                figure,
                height=300,
                picture=case is chosen,
            )
        )
    return charts


def pictured(book: Book) -> Case | None:
    """The case whose chart stands for all: of those that ran well the middle budget at its longest context."""
    fit = [case for case in book.ours if case.status == "ok" and case.trouble == "" and times_of(case)]
    fit = [case for case in fit if case.context == max(c.context or 0 for c in fit)] or fit
    return fit[len(fit) // 2] if fit else None


def memory_legend(book: Book) -> Markup:
    """One legend for all charts of memory."""
    unknown = [name for name in book.components if name not in NAMED]
    keys = [swatch(component_title(name), component_colour(name, unknown)) for name in book.components]
    keys.append(stroke("resident memory, as the kernel counts", colour=INK))
    if any(any(series(case.get("timeline", "device"), POINTS)) for case in book.ours):
        keys.append(stroke("device memory", "dashdot", "var(--device)"))
    return legend(*keys, stroke("budget", "dash", "var(--limit)"))


def memory_table(book: Book) -> Markup:
    """Peaks of every case: planned, measured, by component; and when what happened."""
    unit = [component_title(name) for name in book.components]
    first = ["case", "budget", "planned", "peak", "of the budget", "of the process", "own", "of files", "shared fairly"]
    table = Table([*first, "on the device", *unit, "when what was done"])
    for case in (*book.ours, *book.peers):
        if case.peak is None and not case.components:
            continue
        part = case.peak / case.budget_bytes if case.peak and case.budget_bytes else None
        marks = ", ".join(f"{name} at {seconds(at)}" for at, name in marks_of(case))
        table.add(
            book.title(case),
            BLANK if case.peer else case.budget,
            size(case.above("memory", "planned_bytes")),
            size(case.peak),
            share(part),
            size(case.above("memory", "peak_bytes")) if case.on_device else BLANK,
            size(case.above("memory", "anonymous_bytes")),
            size(case.above("memory", "file_bytes")),
            size(case.above("memory", "pss_bytes")),
            size(case.above("memory", "device_peak_bytes")),
            *(size(case.components.get(name)) for name in book.components),
            marks or BLANK,
            kind=case.trouble.replace(" ", "-") or None,
        )
    return table.html()
