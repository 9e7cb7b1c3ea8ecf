"""Draws the loss curves of runs: ``python -m benchmarks.demo_model.plot``. Needs matplotlib."""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
RUNS = {"adamw": "AdamW alone, nested", "nested": "Muon, nested, then settled", "dense": "Muon, dense"}
# Steps whose mean is one point of a curve, and where the picture begins: before that all curves are one wall.
SMOOTH, FIRST = 5, 200


def read(name: str) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(training loss by step, held-out loss by step) of a run's log."""
    lines = [json.loads(line) for line in (HERE / "runs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    heldout = [(line["step"], line["heldout"]) for line in lines if "heldout" in line]
    heldout += [(line["step"], line["final"]["full"]) for line in lines if "final" in line]
    return losses, sorted(heldout)


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means of SMOOTH neighbours."""
    parts = [points[i : i + SMOOTH] for i in range(0, len(points), SMOOTH)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def main() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.6), dpi=100)
    for (name, label), colour in zip(RUNS.items(), ("tab:red", "tab:blue", "tab:gray"), strict=True):
        losses, heldout = read(name)
        axes.plot(*zip(*[p for p in smooth(losses) if p[0] > FIRST], strict=True), color=colour, lw=1, alpha=0.55)
        axes.plot(*zip(*heldout, strict=True), color=colour, marker="o", ms=4, lw=1.8, label=f"{label}: held out")
    axes.plot([], [], color="black", lw=1, alpha=0.55, label="thin: training loss (sub-models mixed in)")
    axes.set(xlabel="steps of 32,768 tokens", ylabel="nats per token", ylim=(2.8, 4.2))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
