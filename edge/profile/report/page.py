"""The page as one file: everything in it, nothing fetched, and a policy that says so to the browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files

from edge.profile.report.book import DARK, LIGHT, Book
from edge.profile.report.cards import cards, warnings
from edge.profile.report.chart import Chart
from edge.profile.report.markup import Markup, join, json_text, tag
from edge.profile.report.memory import memory_charts, memory_legend, memory_table
from edge.profile.report.reading import (
    first_token_chart,
    first_token_table,
    latency_chart,
    latency_table,
    roofline,
    start_table,
)
from edge.profile.report.speed import reading_table, speed_chart, speed_table
from edge.profile.report.tables import (
    box_table,
    component_table,
    cost_table,
    facts,
    method,
    noise_table,
    peer_tables,
    plan_table,
)

NOSCRIPT = "Charts are drawn by a script, and scripts are off. Every number is in the tables below."


@lru_cache(1)
def plotly() -> tuple[str, str]:
    """plotly.js compressed, in base64, and the hash by which the page allows it to run."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs().encode()
    return base64.b64encode(gzip.compress(source, 9, mtime=0)).decode(), script_hash(source)


def script_hash(source: bytes) -> str:
    """A script's source expression in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'"


def own(name: str) -> str:
    """A file of this package."""
    return files("edge.profile.report").joinpath(name).read_text(encoding="utf-8")


def policy(*hashes: str) -> str:
    """Only these scripts run, nothing is loaded from anywhere, nothing is sent."""
    parts = (
        "default-src 'none'",
        f"script-src {' '.join(hashes)}",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(parts)


def drawn(chart: Chart | None, level: str = "h3") -> Markup:
    """A chart's place: its sentence, its legend, and the box it is drawn in."""
    if chart is None:
        return Markup("")
    box = tag(
        "div", id=chart.key, class_="chart", role="img", aria_label=chart.alt, style=f"min-height:{chart.height}px"
    )
    kind = " ".join(filter(None, ["panel", "wide" if chart.wide else "", "picture" if chart.picture else ""]))
    return tag("figure", tag("figcaption", tag(level, chart.title)), chart.legend, box, class_=kind)


def numbers(*tables: Markup, opened: bool = False) -> Markup:
    """Tables that open on demand."""
    full = [table for table in tables if table]
    return tag("details", tag("summary", "The numbers"), *full, open=opened) if full else Markup("")


def rows(*tables: Markup) -> Markup:
    """Tables that are open where there is room: the script closes them on a phone."""
    return numbers(*tables, opened=True)


def section(title: str, *children: Markup, key: str) -> Markup:
    """A part of the page under its heading; nothing where it has nothing to show."""
    if not any(children):
        return Markup("")
    return tag("section", tag("h2", title), *children, id=key)


def head(book: Book) -> Markup:
    """Model, machine, date, warnings, cards."""
    cores = book.cases[0].above("machine", "cores") if book.cases else None
    machine = [book.one("machine", "cpu"), f"{cores:.0f} cores" if cores else "", book.one("machine", "gpu")]
    about = " · ".join(filter(None, [", ".join(filter(None, machine)), book.one("machine", "system"), date(book)]))
    return tag("header", tag("h1", book.headline), tag("p", about, class_="about"), warnings(book))


def date(book: Book) -> str:
    """The day, or the first and the last."""
    days = sorted({case.text("time")[:10] for case in book.cases if case.text("time")})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""


def download(lines: Sequence[object]) -> Markup:
    """The lines themselves, compressed, inside the link. A browser that can unpack them saves them as they were."""
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
    packed = base64.b64encode(gzip.compress(text, 9, mtime=0)).decode()
    address = Markup(f"data:application/gzip;base64,{packed}")
    # Not through tag(): no attribute that people read is this long.
    return Markup(
        f'<p><a id="raw" download="results.jsonl.gz" href="{address}">The lines of results, as a file</a></p>'
    )


def sections(book: Book, charts: Sequence[Chart], named: dict[str, Chart | None]) -> Markup:
    """The page from the charts of memory down."""
    memory = tag("div", *(drawn(chart) for chart in charts), class_="grid") if charts else Markup("")
    speed = tag("div", drawn(named["decode"]), drawn(named["prefill"]), drawn(named["roofline"]), class_="grid")
    first, between = named["first"], named["latency"]
    if first and between and between.wide:
        first = replace(first, wide=True)
    waits = tag("div", drawn(first), drawn(between), class_="grid")
    some = any(named[name] for name in ("decode", "prefill", "roofline"))
    return join(
        section(
            book.memory_title,
            memory_legend(book) if charts else Markup(""),
            memory,
            numbers(memory_table(book)),
            key="memory",
        ),
        section(
            "How fast it reads and writes",
            speed if some else Markup(""),
            numbers(speed_table(book), reading_table(book)),
            key="speed",
        ),
        section(
            "How long one waits",
            waits if first or between else Markup(""),
            numbers(first_token_table(book), start_table(book), latency_table(book)),
            key="waiting",
        ),
        section("What was planned", rows(plan_table(book), component_table(book)), key="plans"),
        section("What a token costs", rows(cost_table(book)), key="costs"),
        section("Inside a control group with the budget as its hard limit", rows(box_table(book)), key="boxed"),
        section("Beside other runtimes", rows(peer_tables(book)), key="peers"),
        section(
            "The machine, and how this was measured",
            facts(book),
            method(),
            numbers(noise_table(book)),
            download(book.lines),
            key="machine",
        ),
    )


def page(book: Book) -> str:
    """The whole of report.html."""
    charts = memory_charts(book)
    named = {
        "decode": speed_chart(book, "decode"),
        "prefill": speed_chart(book, "prefill"),
        "roofline": roofline(book),
        "first": first_token_chart(book),
        "latency": latency_chart(book),
    }
    every = [*charts, *(chart for chart in named.values() if chart)]
    library, library_hash = plotly()
    script = own("page.js")
    colours = f":root{{{book.palette(LIGHT)}}}"
    dark = f"@media screen and (prefers-color-scheme:dark){{:root:not(.paper){{{book.palette(DARK)}}}}}"
    allowed = policy(script_hash(script.encode()), library_hash)
    top = join(
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{book.model}: what this machine can run"),
        tag("style", Markup(own("page.css") + colours + dark)),
    )
    body = join(
        tag("noscript", tag("p", NOSCRIPT, class_="notice")),
        tag("p", id="trouble", class_="notice", hidden=True),
        tag("main", head(book), cards(book), sections(book, charts, named)),
        tag("script", json_text({chart.key: chart.figure for chart in every}), type="application/json", id="figures"),
        tag("script", Markup(library), type="application/octet-stream", id="library"),
        tag("script", Markup(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', tag('head', top), tag('body', body), lang='en')}\n"
