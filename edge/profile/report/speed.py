"""Tokens per second against the budget: decoding, and prompts, each with what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge.profile.report.book import PEER, Book
from edge.profile.report.case import Case, Figure, Test, positive
from edge.profile.report.chart import (
    DASHES,
    INK,
    MUTED,
    SURFACE,
    SYMBOLS,
    Chart,
    Table,
    axis,
    layout,
    legend,
    log_axis,
    stroke,
)
from edge.profile.report.markup import Markup, label
from edge.profile.report.words import BLANK, digits, rate, share, signed_share, size, span, whole

GB = 1e9
KINDS = {"decode": ("Decoding", "decoding, tokens/s"), "prefill": ("Reading a prompt", "prefill, tokens/s")}
Point = tuple[Case, Test, Figure]


def key_of(case: Case, test: Test) -> tuple[float, int, float, str, str]:
    """What makes two points of one line: depth or prompt, context, engine and device."""
    length = float(test.tokens) if test.kind == "prefill" else 0.0
    return (length, test.depth, case.asked_context or 0.0, case.engine, case.device)


def series_of(book: Book, kind: str) -> list[list[Point]]:
    """Points of ours with a budget, in lines, each in the order of budgets."""
    found: dict[tuple[Any, ...], list[Point]] = {}
    for case in book.ours:
        if case.budget_bytes:
            for test, figure in case.of_kind(kind):
                found.setdefault(key_of(case, test), []).append((case, test, figure))
    lines = [sorted(points, key=lambda p: p[0].budget_bytes or 0.0) for _, points in sorted(found.items())]
    return lines


def line_name(book: Book, case: Case, test: Test) -> str:
    """What tells a line from the others."""
    if test.kind == "decode":
        words = [f"after {whole(test.depth)} tokens" if test.depth else "from the start"]
    else:
        words = [f"{whole(test.tokens)} tokens"]
    if book.many_contexts and case.asked_context:
        words.append(f"context {whole(case.asked_context)}")
    return ", ".join(filter(None, [*words, book.where(case)]))


def hover(book: Book, case: Case, test: Test, figure: Figure, said: float | None) -> str:
    """A point in words."""
    lines = [
        f"<b>{label(book.title(case))}</b>",
        f"{label(test.name)}: {rate(figure.mean, figure.deviation)} tokens/s",
        f"predicted {rate(said)} tokens/s" if said else "",
        label(case.brief),
        label(case.trouble),
    ]
    return "<br>".join(filter(None, lines))


def predicted(case: Case, test: Test) -> float | None:
    """Tokens per second that the planner said."""
    tests = case.get("predicted", "tests")
    found = tests.get(test.name) if isinstance(tests, dict) else None
    return positive(found.get("tps")) if isinstance(found, dict) else None


def traces(book: Book, points: Sequence[Point], place: int, shift: float) -> list[dict[str, Any]]:
    """A line with markers and deviations, and the hollow markers of what was predicted."""
    xs = [(case.budget_bytes or 0.0) / GB + shift for case, _, _ in points]
    colours = [book.colour(case) for case, _, _ in points]
    symbol = SYMBOLS[place % len(SYMBOLS)]
    said = [predicted(case, test) for case, test, _ in points]
    texts = [hover(book, case, test, figure, s) for (case, test, figure), s in zip(points, said, strict=True)]
    ours: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": xs,
        "y": [figure.mean for _, _, figure in points],
        "error_y": {
            "type": "data",
            "array": [f.deviation for _, _, f in points],
            "color": MUTED,
            "thickness": 1.5,
            "width": 4,
        },
        "line": {"color": MUTED, "width": 1.5, "dash": DASHES[place % len(DASHES)]},
        "marker": {"color": colours, "size": 11, "symbol": symbol, "line": {"color": SURFACE, "width": 1}},
        "text": texts,
        "hoverinfo": "text",
    }
    hollow: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "hoverinfo": "skip",
        "x": [x for x, s in zip(xs, said, strict=True) if s],
        "y": [s for s in said if s],
        "marker": {
            "color": [c for c, s in zip(colours, said, strict=True) if s],
            "size": 9,
            "symbol": f"{symbol}-open",
        },
    }
    return [ours, hollow] if hollow["x"] else [ours]


def peer_trace(book: Book, kind: str) -> dict[str, Any] | None:
    """Other runtimes: they keep no budget, so each stands at the memory it took."""
    found = [(c, t, f) for c in book.peers for t, f in c.of_kind(kind) if c.peak]
    if not found:
        return None
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [(c.peak or 0.0) / GB for c, _, _ in found],
        "y": [f.mean for _, _, f in found],
        "hoverinfo": "text",
        "error_y": {
            "type": "data",
            "array": [f.deviation for _, _, f in found],
            "color": MUTED,
            "thickness": 1.5,
            "width": 4,
        },
        "marker": {"color": PEER, "size": 10, "symbol": "x", "line": {"color": SURFACE, "width": 1}},
        "text": [
            f"<b>{label(c.name)}</b><br>{label(t.name)}: {rate(f.mean, f.deviation)} tokens/s<br>peak {size(c.peak)}"
            for c, t, f in found
        ],
    }


def refusals(book: Book) -> list[Case]:
    """Refused cases, one a budget."""
    found = {case.budget_bytes: case for case in book.ours if case.status == "refused" and case.budget_bytes}
    ran = {case.budget_bytes for case in book.ran}
    return [case for budget, case in found.items() if budget not in ran]


def ticks(book: Book) -> dict[str, Any]:
    """The axis of budgets: a tick at each, thinned out where they are many."""
    sizes = [budget / GB for budget in book.budgets if budget]
    peaks = [case.peak / GB for case in book.peers if case.peak]
    low, high = min([*sizes, *peaks]), max([*sizes, *peaks])
    room = (high - low) * 0.08 or high * 0.3
    shown = [s for i, s in enumerate(sizes) if i % (1 + len(sizes) // 9) == 0]
    text = [f"{s:.4g}" for s in shown]
    return axis("budget, GB", tickvals=shown, ticktext=text, range=[low - room, high + room], showgrid=False)


def speed_chart(book: Book, kind: str) -> Chart | None:
    """Decoding or prefill. None when nothing of it was measured within a budget."""
    lines = series_of(book, kind)
    if not lines:
        return None
    x = ticks(book)
    step = (x["range"][1] - x["range"][0]) * 0.016
    shifts = [step * (i - (len(lines) - 1) / 2) for i in range(len(lines))]
    data = [t for i, points in enumerate(lines) for t in traces(book, points, i, shifts[i])]
    peer = peer_trace(book, kind)
    data += [peer] if peer else []
    highest = max(
        v + d for t in data for v, d in zip(t["y"], t.get("error_y", {}).get("array", [0.0] * 999), strict=False)
    )
    lowest = min(v for t in data for v in t["y"])
    title, unit = KINDS[kind]
    y = axis(unit, range=[0, highest * 1.14], rangemode="tozero")
    if highest > 8 * lowest:
        y = log_axis(unit, [lowest, highest])
    frame = layout(x, y)
    frame["annotations"] = [
        {
            "x": (case.budget_bytes or 0) / GB,
            "y": 0,
            "yref": "paper",
            "yanchor": "bottom",
            "textangle": -90,
            "showarrow": False,
            "text": "does not fit",
            "font": {"color": MUTED, "size": 12},
        }
        for case in refusals(book)
    ]
    keys = [
        stroke(line_name(book, case, test), DASHES[i % len(DASHES)], INK, SYMBOLS[i % len(SYMBOLS)])
        for i, points in enumerate(lines)
        for case, test, _ in points[:1]
    ]
    if any(predicted(c, t) for points in lines for c, t, _ in points):
        keys.append(stroke("predicted", "none", INK, "hollow"))
    keys += [stroke("another runtime, at its peak", "none", PEER, "x")] if peer else []
    figures = [figure.mean for points in lines for _, _, figure in points]
    return Chart(
        f"speed-{kind}",
        f"{title}: {span(figures)} tokens a second",
        f"{title} in tokens per second against the budget, {span(figures)}; deviations as bars, predictions hollow.",
        {"data": data, "layout": frame},
        legend=legend(*keys),
        height=340,
        picture=kind == "decode",
    )


def speed_table(book: Book) -> Markup:
    """Every test of every case: mean, deviation, what was predicted and how wrong that was; the reading of memory."""
    table = Table(
        ["case", "test", "tokens/s", "deviation", "predicted, tokens/s", "off by", "in a control group", "outcome"]
    )
    for case in (*book.ours, *book.peers):
        for name, figure in case.tests.items():
            said = predicted(case, Test(name, "", 0, 0))
            inside = Case(case.get("boxed") or {}).tests.get(name)
            deviation = digits(figure.deviation, 2) if figure.deviation else BLANK
            off = signed_share(said / figure.mean - 1 if said else None)
            row = [rate(figure.mean), deviation, rate(said), off, rate(inside.mean if inside else None)]
            table.add(book.title(case), name, *row, case.trouble or "ok", kind=case.trouble.replace(" ", "-") or None)
    return table.html()


def reading_table(book: Book) -> Markup:
    """Bytes a token moves, and how much of the memory's speed that takes."""
    table = Table(["case", "bytes a token", "reads, GB/s", "memory can, GB/s", "share", "before, GB/s", "after, GB/s"])
    for case in (*book.ours, *book.peers):
        if case.bytes_per_token is None and case.above("bandwidth", "read_gbps") is None:
            continue
        speeds = [case.above("bandwidth", n) for n in ("achieved_gbps", "read_gbps", "before_gbps", "after_gbps")]
        text = [digits(s) if s else BLANK for s in speeds]
        table.add(book.title(case), size(case.bytes_per_token), *text[:2], share(case.reading_share), *text[2:])
    return table.html()
