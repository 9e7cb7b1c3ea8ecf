"""Measures slices of one model, and looks for the best of a size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from edge.calibrate.found import Calibration, Choice, Point, Sensitivity
from edge.calibrate.model import Ends, Prediction, filled
from edge.calibrate.space import Space, slice_of
from edge.corpus import Text
from edge.evaluate import CONTEXT, Score, evaluate, measured_of
from edge.session import Ready, Session, open_source
from loaders.formats.measured import Measured
from loaders.formats.sharded import Notify
from loaders.network.matformer import Slice

FINALISTS = 4
# Nats per token that a few thousand tokens cannot tell apart: on tale-3n differences of 0.0017 between slices that were
# chosen among many did not show on other text. Of slices closer than that the largest is the best.
NOISE = 0.002
# Predictions to take finalists from: by what layers cost the full model, the narrowest, and both.
WEIGHTS = (0.5, 1.0, 0.0)


class Bench:
    """Every slice is a run of its own in this process, and measured once. ``texts``: to choose by, and held out."""

    def __init__(self, path: Path, ready: Ready, texts: tuple[Text, Text], notify: Notify) -> None:
        self.path, self.ready, self.texts, self.notify = path, ready, texts, notify
        self.scores: dict[tuple[str, int], Score] = {}
        self.measured: dict[str, Measured] = {}
        self.expected = 0

    def loss(self, part: Slice, which: int = 0) -> float:
        """Nats per token of a slice on one of the texts."""
        key = (part.name, which)
        if key not in self.scores:
            self.notify("measuring slices", len(self.scores), max(self.expected, len(self.scores) + 1))
            self.scores[key] = self.run(part, which)
        return self.scores[key].loss

    def run(self, part: Slice, which: int) -> Score:
        """One evaluation; every token is scored in one window, so that none is computed twice."""
        request = replace(self.ready.request, slice=part.name)
        with Session(replace(self.ready, source=open_source(self.path), request=request)) as session:
            context = min(CONTEXT, session.plan.context)
            score = evaluate(session, self.texts[which], context=context, stride=context)
            if which == 0:
                self.measured[part.name] = measured_of(session, score, self.texts[0])
        return score


class Search:
    """The layers first, then slices for one budget after another."""

    def __init__(self, space: Space, bench: Bench) -> None:
        self.space, self.bench = space, bench
        self.points: dict[str, Point] = {}

    def run(self, budgets: Sequence[int], effort: int) -> Calibration:
        """Measures all there is to measure; ``effort``: slices for each budget, after the layers."""
        bench, space = self.bench, self.space
        layers = list(self.wanted())
        bench.expected = len(layers) + len(budgets) * (effort + 3 * 2 * len(space.skips))
        for part, kind in layers:
            self.measure(part, kind)
        predictions = [self.prediction(weight) for weight in WEIGHTS]
        choices = tuple(self.choice(budget, effort, predictions) for budget in budgets)
        bench.notify("measuring slices", 1, 1)
        points = tuple(sorted(self.points.values(), key=lambda point: (point.bytes, point.part.name)))
        score = bench.scores[space.uniform(-1).name, 0]
        return Calibration(
            recipe=space.recipe,
            context=space.runs[0][1],
            text_context=score.context,
            tokens=score.tokens,
            held_tokens=bench.scores[choices[0].winner.part.name, 1].tokens,
            evaluations=len(bench.scores),
            sensitivities=tuple(self.sensitivities()),
            choices=choices,
            points=points,
            measured=tuple(bench.measured[name] for name in self.worth_keeping(points)),
        )

    def measure(self, part: Slice, kind: str, predicted: float | None = None) -> Point:
        """The slice's loss on the text to choose by, and what it takes."""
        if part.name not in self.points:
            self.points[part.name] = Point(part, self.space.total(part), kind, self.bench.loss(part), None, predicted)
        return self.points[part.name]

    def held_out(self, point: Point) -> Point:
        """The same with its loss on the text held out."""
        found = replace(point, held=self.bench.loss(point.part, 1))
        self.points[point.part.name] = found
        return found

    def wanted(self) -> Iterator[tuple[Slice, str]]:
        """What is measured whatever the budget: slices of one width, and with one layer unlike the others."""
        trained, space = self.space.trained, self.space
        levels = max(map(len, trained))
        for skip in space.skips:
            for level in range(levels):
                kind = "full" if level == levels - 1 and not skip else "uniform"
                yield space.uniform(level, skip), kind
        for layer, widths in enumerate(trained):
            yield from ((self.one(layer, width, -1), "layer") for width in widths[:-1])
            yield from ((self.one(layer, width, 0), "layer") for width in widths[1:])

    def one(self, layer: int, width: int, level: int) -> Slice:
        """All layers at their full (-1) or narrowest (0) width, but for one."""
        widths = [w[level] for w in self.space.trained]
        widths[layer] = width
        return slice_of(self.space.model, widths)

    def loss(self, part: Slice) -> float:
        """Of a slice that was measured."""
        return self.points[part.name].loss

    def layer_losses(self, level: int) -> list[dict[int, float]]:
        """Per layer: width -> what it adds, all others full (-1) or narrowest (0), to what the full width loses."""
        return [
            {w: self.loss(self.one(i, w, level)) - self.loss(self.one(i, widths[-1], level)) for w in widths}
            for i, widths in enumerate(self.space.trained)
        ]

    def prediction(self, weight: float) -> Prediction:
        """From the layers' losses."""
        narrowed, widened = (
            [filled(losses, grid) for losses, grid in zip(self.layer_losses(level), self.space.grid, strict=True)]
            for level in (-1, 0)
        )
        uniform = self.space.uniform
        skipped = [(self.loss(uniform(-1, skip)), self.loss(uniform(0, skip))) for skip in self.space.skips if skip]
        ends = Ends(self.loss(uniform(-1)), self.loss(uniform(0)), skipped[0] if skipped else None)
        return Prediction(ends, narrowed, widened, weight)

    def sensitivities(self) -> Iterator[Sensitivity]:
        """What there is to show of the layers."""
        space = self.space
        pairs = zip(self.layer_losses(-1), self.layer_losses(0), strict=True)
        for i, (narrowed, widened) in enumerate(pairs):
            for width in space.trained[i][-2::-1]:
                saved = space.ffn[i][space.trained[i][-1]] - space.ffn[i][width]
                yield Sensitivity((i,), width, saved, narrowed[width], widened[width])
        for skip in filter(None, space.skips):
            full, least = space.uniform(-1), space.uniform(0)
            parts = space.uniform(-1, skip), space.uniform(0, skip)
            saved = space.total(full) - space.total(parts[0])
            yield Sensitivity(
                skip, 0, saved, self.loss(parts[0]) - self.loss(full), self.loss(parts[1]) - self.loss(least)
            )

    def choice(self, budget: int, effort: int, predictions: Sequence[Prediction]) -> Choice:
        """The best slice of a size, and what one width throughout would have given."""
        predict = predictions[0]
        for part in self.finalists(budget, predictions)[: min(effort, FINALISTS)]:
            self.measure(part, "mix", predict(part))
        uniforms = [self.measure(part, "uniform") for part in self.uniforms(budget)]
        self.climb(budget, effort - min(effort, FINALISTS), predict)
        winner = self.held_out(self.best(budget))
        if winner.predicted is None and self.in_grid(winner.part):
            winner = replace(winner, predicted=predict(winner.part))
        return Choice(budget, winner, tuple(self.held_out(self.points[point.part.name]) for point in uniforms))

    def finalists(self, budget: int, predictions: Sequence[Prediction]) -> list[Slice]:
        """Slices within a budget that one or another prediction takes for the best, unlike each other, best first."""
        predict, found = predictions[0], {}
        for prediction in predictions:
            for skip in self.space.skips:
                part = self.space.solve(prediction.costs, budget, skip)
                if part is not None:
                    found[part.name] = part
        first = min(found.values(), key=lambda part: (predict(part), part.name))
        if len(found) < FINALISTS:
            found |= {part.name: part for part in self.space.alternatives(predict.costs, first, budget)}
        return sorted(found.values(), key=lambda part: (predict(part), part.name))

    def uniforms(self, budget: int) -> list[Slice]:
        """The widest slices of one width that fit, a trained one and any, with and without what may be skipped."""
        space, found = self.space, dict[str, Slice]()
        for skip in space.skips:
            levels = reversed(range(max(map(len, space.trained))))
            fitting = (space.uniform(level, skip) for level in levels)
            parts = [next((part for part in fitting if space.total(part) <= budget), None), space.between(budget, skip)]
            found |= {part.name: part for part in parts if part is not None}
        return list(found.values())

    def in_grid(self, part: Slice) -> bool:
        """Whether all widths of a slice are among those to choose from."""
        return all(w in self.space.grid[i] for i, w in zip(part.keep, part.widths, strict=True))

    def fitting(self, budget: int, grid: bool = False) -> list[Point]:
        """Measured slices within a budget, those that lose least first; with ``grid`` only those to go on from."""
        found = (p for p in self.points.values() if p.bytes <= budget and (not grid or self.in_grid(p.part)))
        return sorted(found, key=lambda point: (point.loss, point.bytes, point.part.name))

    def best(self, budget: int) -> Point:
        """The largest of the measured slices within a budget that lose least, as far as can be told: what the text
        does not tell apart is told by what was kept, and bytes below a budget are worth nothing.
        """
        found = self.fitting(budget)
        close = (point for point in found if point.loss <= found[0].loss + NOISE)
        return min(close, key=lambda point: (-point.bytes, point.loss, point.part.name))

    def climb(self, budget: int, effort: int, predict: Prediction) -> None:
        """Measures neighbours of the best slice, those first that should gain most, and goes on from what is better."""
        for _ in range(effort):
            around = self.space.neighbours(self.fitting(budget, grid=True)[0].part, budget)
            new = [part for part in around if part.name not in self.points]
            if not new:
                return
            part = min(new, key=lambda part: (predict(part), part.name))
            self.measure(part, "mix", predict(part))

    def worth_keeping(self, points: Sequence[Point]) -> list[str]:
        """Of points in ascending bytes, the names of slices that no smaller one beats, of the full one, and of those
        with one trained width.
        """
        least, names = float("inf"), []
        uniform = {part.name for part, kind in self.wanted() if kind != "layer"}
        for point in points:
            if point.loss < least or point.part.name in uniform:
                names.append(point.part.name)
            least = min(least, point.loss)
        return names
