"""Pictures of results. Needs matplotlib, which only drawing imports: ``pip install -e '.[plots]'``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
COLOURS = {"bf16": "#1f5fa8", "int8": "#2f8f4e", "int4": "#c8571b"}
CALIBRATED, INK = "#8a3ab9", "#333333"
MB = 1e6
# Inches at DPI points each: as wide as a README is shown.
SIZE, DPI = (9.0, 5.2), 100


def point(line: Line) -> tuple[float, float]:
    """(resident megabytes of weights, nats per token)."""
    return line["weights_bytes"] / MB, line["loss"]


def series(lines: Sequence[Line], precision: str) -> tuple[list[Line], list[Line]]:
    """The slices with all layers, and those without some, at a precision and its usual head, smallest first."""
    head = "int8" if precision == "int4" else precision
    found = [
        line for line in lines if line["case"] == "slice" and (line["precision"], line["head"]) == (precision, head)
    ]
    found.sort(key=point)
    layers = max((len(line["keep"]) for line in found), default=0)
    whole = [line for line in found if len(line["keep"]) == layers]
    return whole, [line for line in found if len(line["keep"]) < layers]


def quality(lines: Sequence[Line], path: Path) -> None:
    """Loss over resident weights: slices of one width at three precisions, and calibrated ones."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, dpi=DPI)
    for precision, colour in COLOURS.items():
        draw(axes, *series(lines, precision), precision, colour)
    between = sorted(point(line) for line in lines if line["case"] == "uniform")
    if between:
        axes.plot(
            *zip(*between, strict=True), ls="", marker="x", ms=6, color=COLOURS["bf16"], label="bf16, widths between"
        )
    calibrated = sorted(point(line) for line in lines if line["case"] == "calibrated")
    if calibrated:
        style = {"ls": "--", "lw": 1.4, "marker": "D", "ms": 4.5, "color": CALIBRATED, "zorder": 4}
        axes.plot(*zip(*calibrated, strict=True), label="bf16, calibrated layer by layer", **style)
    axes.plot([], [], ls="", marker="o", ms=6, mfc="white", color=INK, label="hollow: some layers skipped")
    axes.set_xlabel("weights resident in memory, MB", color=INK)
    axes.set_ylabel("loss on held-out text, nats per token", color=INK)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=9)
    axes.margins(x=0.06, y=0.1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def draw(axes: Any, whole: Sequence[Line], skipped: Sequence[Line], precision: str, colour: str) -> None:
    """One precision: a line through the slices with all layers, hollow markers for the others."""
    if whole:
        axes.plot(
            *zip(*map(point, whole), strict=True), marker="o", ms=6, lw=1.8, color=colour, label=precision, zorder=3
        )
    if skipped:
        axes.plot(*zip(*map(point, skipped), strict=True), ls="", marker="o", ms=6, mfc="white", color=colour, zorder=3)
    # To the side where no other series lies.
    side = {"xytext": (-6, 4), "ha": "right"} if precision == "int4" else {"xytext": (6, 4), "ha": "left"}
    for line in whole:
        axes.annotate(line["slice"], point(line), textcoords="offset points", fontsize=8.5, color=colour, **side)
