"""The roofline of reading, the wait for the first token, and the time between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge.profile.report.book import Book
from edge.profile.report.case import Case, figure_of, mapping, positive, test_of
from edge.profile.report.chart import (
    DASHES,
    INK,
    MUTED,
    SURFACE,
    Chart,
    Table,
    axis,
    layout,
    legend,
    log_axis,
    stroke,
    swatch,
)
from edge.profile.report.markup import Markup, label
from edge.profile.report.words import BLANK, digits, rate, seconds, share, size, whole

GB = 1e9


def budget_keys(book: Book, cases: Sequence[Case]) -> list[Markup]:
    """Swatches of the budgets among cases."""
    found = {case.budget: book.colour(case) for case in cases}
    return [swatch(name, colour) for name, colour in found.items()] if len(found) <= 12 else []


def once_a_budget(book: Book, cases: Sequence[Case]) -> list[Case]:
    """The longest context of every budget: what a chart has room to name."""
    best: dict[tuple[Any, ...], Case] = {}
    for case in sorted(cases, key=lambda case: case.asked_context or 0.0):
        best[(case.budget_bytes, case.engine, case.device)] = case
    return list(best.values())


def roofs(cases: Sequence[Case]) -> dict[str, tuple[float, float]]:
    """The least and the most that each device's memory was seen to read, GB/s."""
    found: dict[str, list[float]] = {}
    for case in cases:
        speed = case.above("bandwidth", "read_gbps")
        if speed:
            found.setdefault(case.device, []).append(speed)
    return {device: (min(speeds), max(speeds)) for device, speeds in found.items()}


def roof_traces(roof: dict[str, tuple[float, float]], ends: tuple[float, float]) -> list[dict[str, Any]]:
    """A line a device; a band where its memory was not always as fast. x is GB a token."""
    data: list[dict[str, Any]] = []
    for low, high in roof.values():
        common = {"type": "scatter", "mode": "lines", "x": list(ends), "hoverinfo": "skip"}
        if high > low * 1.02:
            data.append({**common, "y": [low / x for x in ends], "line": {"width": 0}})
            data.append(
                {
                    **common,
                    "y": [high / x for x in ends],
                    "line": {"width": 0},
                    "fill": "tonexty",
                    "fillcolor": "var(--band)",
                }
            )
        data.append({**common, "y": [high / x for x in ends], "line": {"color": INK, "width": 2}})
    return data


def roofline(book: Book) -> Chart | None:
    """Tokens per second against bytes a token, under the line of what memory can read."""
    cases = [case for case in book.ran if case.decode and case.bytes_per_token]
    if not cases:
        return None
    points = [((case.bytes_per_token or 1.0) / GB, case.decode.mean if case.decode else 1.0) for case in cases]
    roof = roofs(cases)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x = log_axis("read for a token, GB", xs, 0.15)
    ends = (10 ** x["range"][0], 10 ** x["range"][1])
    y = log_axis(
        "decoding, tokens/s",
        [*ys, *(high / ends[0] for _, high in roof.values()), *(low / max(xs) for low, _ in roof.values())],
        0.08,
    )
    shares = {case: f" · {share(case.reading_share)}" if case.reading_share else "" for case in cases}
    texts = [
        f"<b>{label(book.title(case))}</b><br>{rate(py)} tokens/s at {size(px * GB)} a token<br>"
        f"reads {digits(px * py)} GB/s{f', {share(case.reading_share)} of memory' if case.reading_share else ''}"
        for case, (px, py) in zip(cases, points, strict=True)
    ]
    marker = {"size": 12, "color": [book.colour(case) for case in cases], "line": {"color": SURFACE, "width": 1.5}}
    data = [
        *roof_traces(roof, ends),
        {"type": "scatter", "mode": "markers", "x": xs, "y": ys, "marker": marker, "text": texts, "hoverinfo": "text"},
    ]
    named = once_a_budget(book, cases)
    where = dict(zip(cases, points, strict=True))
    labels = [[*where[case], label(case.budget + shares[case]), book.colour(case)] for case in named]
    lines = [[ends[0], high / ends[0], ends[1], high / ends[1]] for _, high in roof.values()]
    for device, (_, high) in roof.items():
        memory = "memory" if device == "cpu" else f"{device}'s memory"
        at = (ends[0] ** 4 * ends[1]) ** 0.2
        labels.append([at, high / at, f"{memory} reads {digits(high)} GB/s", INK])
    frame = layout(x, y, meta={"labels": labels, "lines": lines})
    known = [case.reading_share * 100 for case in cases if case.reading_share]
    title = f"Decoding takes {span_of(known)}% of what memory can read" if known else "Decoding against bytes a token"
    return Chart(
        "roofline",
        title,
        f"{title}. Bytes read for a token against tokens per second, under the line of what memory can deliver.",
        {"data": data, "layout": frame},
        height=340,
        picture=True,
    )


def span_of(percents: Sequence[float]) -> str:
    """Whole percents: 88 to 95."""
    least, most = f"{min(percents):.0f}", f"{max(percents):.0f}"
    return least if least == most else f"{least} to {most}"


def first_token_chart(book: Book) -> Chart | None:
    """Seconds to the first token against the prompt's length, and cold starts with their loading."""
    cases = [case for case in book.ours if case.first_token]
    if not cases:
        return None
    contexts = sorted({case.asked_context or 0.0 for case in cases}, reverse=True)
    data: list[dict[str, Any]] = []
    for case in cases:
        dash = DASHES[contexts.index(case.asked_context or 0.0) % len(DASHES)]
        name = label(book.title(case))
        colour = book.colour(case)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [n for n, _ in case.first_token],
                "y": [s for _, s in case.first_token],
                "line": {"color": colour, "width": 2, "dash": dash},
                "marker": {"size": 7, "color": colour},
                "hoverinfo": "text",
                "text": [f"<b>{name}</b><br>{whole(n)} tokens of prompt: {seconds(s)}" for n, s in case.first_token],
            }
        )
    cold = [(case, case.wait_tokens, cold_start(case)) for case in cases]
    starts = [(case, n, s) for case, n, s in cold if n and s]
    if starts:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [n for _, n, _ in starts],
                "y": [s for _, _, s in starts],
                "marker": {"size": 11, "symbol": "diamond-open", "color": [book.colour(case) for case, _, _ in starts]},
                "text": [f"<b>{label(book.title(case))}</b><br>cold start: {seconds(s)}" for case, _, s in starts],
                "hoverinfo": "text",
            }
        )
    xs = [x for t in data for x in t["x"]]
    x = log_axis("tokens of the prompt", xs, 0.1)
    shown = sorted(set(xs))
    x |= {"tickvals": shown, "ticktext": [whole(v) for v in shown]} if len(shown) <= 8 else {}
    frame = layout(x, log_axis("first token, seconds", [y for t in data for y in t["y"]], 0.1))
    keys = budget_keys(book, cases)
    if len(contexts) > 1:
        keys += [stroke(f"context {whole(c)}", DASHES[i % len(DASHES)]) for i, c in enumerate(contexts)]
    keys += [stroke("cold start, loading included", "none", INK, "hollow-diamond")] if starts else []
    return Chart(
        "first-token",
        first_token_title(cases),
        "Seconds to the first token against the tokens in the prompt, a line a case; cold starts as hollow diamonds.",
        {"data": data, "layout": frame},
        legend=legend(*keys),
        height=340,
        picture=True,
    )


def cold_start(case: Case) -> float | None:
    """Seconds from the start of loading to the first token, the model's files not in memory."""
    load, wait = figure_of(case.get("cold", "load_s")), figure_of(case.get("cold", "ttft_s"))
    return load.mean + wait.mean if load and wait else None


def first_token_title(cases: Sequence[Case]) -> str:
    """The wait for a prompt that all have: of 512 tokens where there is one."""
    lengths = [{n for n, _ in case.first_token} for case in cases]
    common = set.intersection(*lengths)
    if not common:
        return "The wait for the first token grows with the prompt"
    length = max((n for n in common if n <= 512), default=min(common))
    waits = [s for case in cases for n, s in case.first_token if n == length]
    least, most = seconds(min(waits)), seconds(max(waits))
    return f"A prompt of {whole(length)} tokens is answered after {least if least == most else f'{least} to {most}'}"


def first_token_table(book: Book) -> Markup:
    """Every wait that was measured; loading, cold and warm."""
    cases = [case for case in book.cases if case.first_token]
    lengths = sorted({n for case in cases for n, _ in case.first_token})
    table = Table(
        ["case", *(f"{whole(n)} tokens" for n in lengths)], "Seconds to the first token, by the prompt's length"
    )
    for case in cases:
        waits = dict(case.first_token)
        table.add(book.title(case), *(seconds(waits.get(n)) for n in lengths))
    return table.html()


def start_table(book: Book) -> Markup:
    """Cold and warm starts."""
    columns = [
        "case",
        "cold: load",
        "first token",
        "both",
        "read from storage",
        "warm: load",
        "first token, warm",
        "in the page cache",
    ]
    table = Table(columns, "Starting with the model's files out of the page cache, and in it")
    for case in book.cases:
        both = [figure_of(case.get(kind, name)) for kind in ("cold", "warm") for name in ("load_s", "ttft_s")]
        if not any(both):
            continue
        text = [f"{seconds(f.mean)}{f' ± {seconds(f.deviation)}' if f.deviation else ''}" if f else BLANK for f in both]
        read = size(case.above("cold", "bytes_read"))
        cached = share(case.number("warm", "cached_share"))
        table.add(book.title(case), text[0], text[1], seconds(cold_start(case)), read, text[2], text[3], cached)
    return table.html()


def latencies(case: Case) -> list[tuple[str, tuple[float, float, float]]]:
    """(test, (p50, p95, p99)) in ms, those that are whole, shallow first."""
    found = []
    for name, value in mapping(case.get("latency_ms")).items():
        ms = [positive(mapping(value).get(p)) for p in ("p50", "p95", "p99")]
        if ms[0] and ms[1] and ms[2]:
            found.append((name, (ms[0], ms[1], ms[2])))
    return sorted(found, key=lambda pair: test_of(pair[0]).depth)


def latency_chart(book: Book) -> Chart | None:
    """A row a case and depth: median, 95th and 99th of a hundred."""
    rows = [(case, name, ms) for case in (*book.ours, *book.peers) for name, ms in latencies(case)]
    if not rows:
        return None
    names = [label(f"{book.title(case)} · {name}") for case, name, _ in rows]
    places = list(range(len(rows)))
    colours = [book.colour(case) for case, _, _ in rows]
    gaps: dict[str, Any] = {"x": [], "y": []}
    for place, (_, _, ms) in enumerate(rows):
        gaps["x"] += [ms[0], max(ms), None]
        gaps["y"] += [place, place, None]
    data: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", **gaps, "line": {"color": MUTED, "width": 1.5}, "hoverinfo": "skip"}
    ]
    for i, (symbol, dot) in enumerate((("circle", 12), ("circle-open", 10), ("line-ns-open", 12))):
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [ms[i] for _, _, ms in rows],
                "y": places,
                "hoverinfo": "text",
                "marker": {"symbol": symbol, "size": dot, "color": colours, "line": {"width": 2, "color": colours}},
                "text": [
                    f"<b>{n}</b><br>p50 {digits(ms[0])} ms<br>p95 {digits(ms[1])} ms<br>p99 {digits(ms[2])} ms"
                    for n, (_, _, ms) in zip(names, rows, strict=True)
                ],
            }
        )
    every = [v for _, _, row in rows for v in row]
    wide = max(every) > 30 * min(every)
    x = log_axis("between tokens, ms", every) if wide else axis("between tokens, ms", range=[0, max(every) * 1.06])
    y = axis("", range=[len(rows) - 0.4, -0.6], tickvals=places, ticktext=names, showgrid=False)
    frame = layout(x, y, meta={"rows": names})
    worst = max(row[2] / row[0] for _, _, row in rows)
    return Chart(
        "latency",
        f"One token in a hundred takes up to {digits(worst, 2)} times as long as the median",
        "Milliseconds between tokens for every case: the median a dot, the 95th percentile hollow, the 99th a tick.",
        {"data": data, "layout": frame},
        legend=legend(*(stroke(n, "none", INK, s) for n, s in (("p50", "circle"), ("p95", "hollow"), ("p99", "tick")))),
        height=max(340, 76 + 26 * len(rows)),
        wide=len(rows) > 16,
    )


def latency_table(book: Book) -> Markup:
    """Milliseconds between tokens."""
    table = Table(["case", "test", "p50, ms", "p95, ms", "p99, ms", "p99 to p50"])
    for case in (*book.ours, *book.peers):
        for name, ms in latencies(case):
            table.add(book.title(case), name, *(digits(v) for v in ms), digits(ms[2] / ms[0]) + "x")
    return table.html()
