"""What every chart shares: its place on the page, the table of its numbers, and a frame in the page's own colours.

Colours are written as CSS variables; the page puts in their values when it draws, and again when light turns to dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edge.profile.report.markup import Markup, join, tag
from edge.profile.report.words import BLANK

INK, MUTED, GRID, SURFACE = "var(--ink)", "var(--muted)", "var(--grid)", "var(--surface)"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
NAMED = ("runtime", "tokenizer", "compiler", "staging", "weights", "ple", "kv", "activations")
SPARE = 4
# Ticks of a logarithmic axis that spans less than so many powers of ten.
STEPS = ((0.6, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)), (1.2, (1, 1.5, 2, 3, 5, 7)), (2.5, (1, 2, 5)), (99, (1,)))


@dataclass(frozen=True)
class Chart:
    """A figure for plotly as plain data. ``title`` is a sentence; ``alt`` is what one who cannot see it is told."""

    key: str
    title: str
    alt: str
    figure: dict[str, Any]
    legend: Markup | None = None
    height: int = 320
    picture: bool = False
    wide: bool = False
    note: str = ""


@dataclass
class Table:
    """Rows under a header; every cell knows its column, so that a phone can show a row as a card."""

    columns: Sequence[str]
    caption: str = ""
    rows: list[tuple[Sequence[object], str | None]] = field(default_factory=list)

    def add(self, *cells: object, kind: str | None = None) -> None:
        """A row; the first cell names it. ``kind`` is its class: what went wrong with it."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append((cells, kind))

    def html(self) -> Markup:
        """The table in a box that scrolls by itself, without the columns that say nothing; empty without rows."""
        if not self.rows:
            return Markup("")
        columns = [[row[i] for row, _ in self.rows] for i in range(len(self.columns))]
        kept = [i for i, cells in enumerate(columns) if i == 0 or any(cell != BLANK for cell in cells)]
        sides = ["words" if any(wordy(cell) for cell in cells) else None for cells in columns]
        heads = join(*(tag("th", self.columns[i], scope="col", class_=sides[i]) for i in kept))
        body = []
        for cells, kind in self.rows:
            rest = (tag("td", cells[i], data_label=self.columns[i], class_=sides[i]) for i in kept[1:])
            body.append(tag("tr", tag("th", cells[0], scope="row"), *rest, class_=kind))
        caption = tag("caption", self.caption) if self.caption else ""
        table = tag("table", caption, tag("thead", tag("tr", heads)), tag("tbody", *body))
        return tag("div", table, class_="scroll")


def wordy(cell: object) -> bool:
    """Whether a cell holds words rather than a number or a blank."""
    text = str(cell)
    return len(text) > 1 and not text.lstrip("+-").startswith(tuple("0123456789"))


def component_colour(name: str, unknown: Sequence[str]) -> str:
    """The CSS variable of a component, the same in every chart; ``unknown``: those without a colour of their own."""
    return f"var(--c-{name})" if name in NAMED else f"var(--c-other{unknown.index(name) % SPARE})"


def component_title(name: str) -> str:
    """A component as people call it."""
    return {"ple": "PLE", "kv": "keys and values"}.get(name, name)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a quiet grid and its unit in its title."""
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 13, "color": MUTED}},
        "tickfont": {"size": 12, "color": MUTED},
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "fixedrange": True,
        **more,
    }


def layout(x: dict[str, Any], y: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A frame without a title: the page has it above the chart, as text."""
    return {
        "xaxis": x,
        "yaxis": y,
        "margin": {"l": 58, "r": 18, "t": 14, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {
            "family": "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif",
            "size": 12,
            "color": INK,
        },
        "hoverlabel": {"bgcolor": SURFACE, "bordercolor": MUTED, "font": {"size": 13, "color": INK}, "align": "left"},
        "hovermode": "closest",
        "showlegend": False,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": INK},
        "dragmode": False,
        **more,
    }


def log_axis(title: str, values: Sequence[float], pad: float = 0.12, **more: Any) -> dict[str, Any]:
    """A logarithmic axis around values, with ticks at round numbers, as many as its length has room for."""
    low, high = math.log10(min(values)) - pad, math.log10(max(values)) + pad
    steps = next(steps for span, steps in STEPS if high - low < span)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    text = [f"{tick:,g}" for tick in ticks]
    return axis(title, type="log", range=[low, high], tickvals=ticks, ticktext=text, minor={"showgrid": False}, **more)


def swatch(text: str, colour: str) -> Markup:
    """An entry of a legend: a square of a colour."""
    return tag("span", tag("i", style=f"background:{colour}"), text, class_="key")


def stroke(text: str, dash: str = "solid", colour: str = INK, symbol: str = "") -> Markup:
    """An entry of a legend: a line, dashed or not, with a symbol on it or none."""
    lengths = {"solid": "", "dash": "6 4", "dot": "2 3", "dashdot": "7 3 2 3", "none": "0 99"}[dash]
    line = tag("line", x1=1, y1=7, x2=27, y2=7, stroke=colour, stroke_width=2, stroke_dasharray=lengths or None)
    shapes = {
        "circle": tag("circle", cx=14, cy=7, r=4, fill=colour),
        "square": tag("rect", x=10, y=3, width=8, height=8, fill=colour),
        "diamond": tag("path", d="M14 2l5 5-5 5-5-5z", fill=colour),
        "triangle-up": tag("path", d="M14 2l5 9h-10z", fill=colour),
        "cross": tag("path", d="M12 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z", fill=colour),
        "x": tag("path", d="M10 3l8 8m0-8l-8 8", stroke=colour, stroke_width=3),
        "star": tag("path", d="M14 1l2 4 4 1-3 3 1 4-4-2-4 2 1-4-3-3 4-1z", fill=colour),
        "hollow": tag("circle", cx=14, cy=7, r=4, fill="none", stroke=colour, stroke_width=2),
        "tick": tag("line", x1=14, y1=2, x2=14, y2=12, stroke=colour, stroke_width=2),
        "hollow-diamond": tag("path", d="M14 2l5 5-5 5-5-5z", fill="none", stroke=colour, stroke_width=2),
    }
    drawn = tag("svg", line, shapes.get(symbol, ""), width=28, height=14, viewBox="0 0 28 14", aria_hidden="true")
    return tag("span", drawn, text, class_="key")


def legend(*entries: Markup) -> Markup:
    """Entries in a row."""
    return tag("p", *entries, class_="legend") if entries else Markup("")
