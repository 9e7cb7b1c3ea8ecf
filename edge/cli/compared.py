"""Two files of results beside each other, for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from edge.budget.units import format_bytes
from edge.profile.compare import Comparison, words
from edge.profile.compare_figures import Figure, Verdict

STYLES: dict[Verdict, str] = {"same": "", "better": "green", "worse": "red"}


def table(comparison: Comparison) -> Table:
    """Figures as rows below the cases they are of, in no more than 100 columns; warnings first."""
    warnings = Text("\n".join(f"WARNING: {text}" for text in comparison.warnings), "bold red")
    caption = [f"only in the old file: {name}" for name in comparison.only_old]
    caption += [f"only in the new file: {name}" for name in comparison.only_new]
    caption += [f"{case.case}: {note}" for case in comparison.cases for note in case.notes]
    found = Table(
        box=None, pad_edge=False, header_style="bold", title=warnings or None, title_justify="left",
        caption=Text("\n".join(caption)) if caption else None, caption_justify="left",
    )  # fmt: skip
    found.add_column("", overflow="fold", max_width=36)
    for name in ("old", "new", "ratio", "no difference", ""):
        found.add_column(name, justify="right" if name else "left", no_wrap=True)
    for case in comparison.cases:
        found.add_row(
            Text(case.case, STYLES[case.verdict] + " bold"), *[""] * 4, Text(case.verdict, STYLES[case.verdict])
        )
        for text, verdict in case.claims:
            found.add_row(Text(f"  {text}"), *[""] * 4, Text(verdict, STYLES[verdict]))
        for figure in case.figures:
            found.add_row(*(Text(cell, STYLES[figure.verdict]) for cell in cells(figure)))
    return found


def cells(figure: Figure) -> list[str]:
    """Of a figure's row."""
    shown = [amount(value, figure.unit) for value in (figure.old, figure.new)]
    ratio = "" if figure.ratio is None else times(figure.ratio)
    name = words(figure.name) + (f", {figure.unit}" if figure.unit != "bytes" else "")
    return [f"  {name}", *shown, ratio, f"{times(figure.low)} to {times(figure.high)}", figure.verdict]


def amount(value: float, unit: str) -> str:
    """Of a figure, in no more than ten characters."""
    return format_bytes(int(value)) if unit == "bytes" and value < 1e18 else f"{value:.4g}"


def times(ratio: float) -> str:
    """Of a ratio, in no more than eight characters."""
    return f"{ratio:.3f}" if 0.001 <= ratio < 1000 else f"{ratio:.1e}"
