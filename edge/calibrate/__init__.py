"""Mix'n'Match, measured: what each layer's width is worth in loss, and the widths that fit a budget with the least.

Layers are narrowed one at a time from the full model and widened one at a time from the narrowest; a knapsack over
what that changed proposes slices; the best of them are measured, and then neighbours of the best. Three quarters of
the text choose. The rest compares the winner with slices of one width, and decides nothing.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from edge.budget.plan import Floor, Request, choose, wanted_contexts, wanted_recipes
from edge.budget.units import format_bytes, parse_bytes
from edge.calibrate.bench import Bench, Search
from edge.calibrate.found import Calibration, Choice, Point, Sensitivity
from edge.calibrate.space import Space, widths_of
from edge.corpus import Text, read_text
from edge.session import open_source, plan_floor, prepare, quiet
from edge.store.measured import measured
from loaders.errors import BadCheckpoint, Usage, WontFit
from loaders.formats.pack import Pack
from loaders.formats.sharded import Notify
from loaders.text.tokenizer import AnyTokenizer
from loaders.weights import Source

__all__ = ["Calibration", "Choice", "Point", "Sensitivity", "calibrate"]

TOKENS, LEAST_TOKENS = 8192, 64
POINTS, MOST_POINTS = 6, 64
# Slices that are measured for a budget once the layers are known: for one, and for each point of a curve.
EFFORT, CURVE_EFFORT = 16, 4


def calibrate(
    path: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    budget: str | int | None = None,
    points: int = POINTS,
    precision: str | None = None,
    context: int | None = None,
    device: str = "cpu",
    engine: str = "auto",
    tokens: int = TOKENS,
    effort: int | None = None,
    step: int | None = None,
    notify: Notify = quiet,
) -> Calibration:
    """Measures a MatFormer on ``tokens`` tokens of a text and finds the best slice for ``budget``, or for ``points``
    sizes from the narrowest to the full model.

    ``precision``: bf16 unless given, of a pack the best it has; 'auto' is what a run in the budget would take.
    ``context``: the run's, in tokens. ``effort``: slices measured for each budget, after the layers. ``step``: its
    multiples in between the trained widths may be chosen too. Raises Unsupported for a model without nested widths,
    BadCheckpoint for a text that is too short, WontFit for a budget that no slice fits, Usage.
    """
    path, size = Path(path), None if budget is None else parse_bytes(budget)
    check(points, tokens, effort, step)
    source = open_source(path)
    try:
        widths_of(source.model, step)
        # The tokenizer first: it is counted once its mapped form is there.
        pinned = Request(precision=precision or usual_precision(source))
        ready = prepare(path, pinned, device, engine, text=True)
        ready.source.close()
        assert ready.tokenizer is not None
        texts = read_parts(Path(text), ready.tokenizer, tokens)
        floor, request = plan_floor(source, replace(pinned, budget=size, context=context), device, engine)
        space = frame(source, request, floor, step)
        ready = replace(ready, request=replace(ready.request, precision=space.recipe.precision))
        found = Search(space, Bench(path, ready, texts, notify))
        return found.run(
            budgets(space, points), (CURVE_EFFORT if size is None else EFFORT) if effort is None else effort
        )
    finally:
        source.close()


def check(points: int, tokens: int, effort: int | None, step: int | None) -> None:
    """Raises Usage for numbers that make no sense."""
    least = (("--points", points, 2), ("--tokens", tokens, LEAST_TOKENS), ("--effort", effort, 1), ("--step", step, 1))
    for field, found, low in least:
        if found is not None and found < low:
            raise Usage(found, field=field, expected=f"{low} or more")
    if points > MOST_POINTS:
        raise Usage(points, field="--points", expected=f"at most {MOST_POINTS}")


def usual_precision(source: Source) -> str:
    """16 bits, in which slices differ as they do in any; what a pack has."""
    return source.precisions[0] if isinstance(source, Pack) and source.precisions else "bf16"


def read_parts(path: Path, tokenizer: AnyTokenizer, tokens: int) -> tuple[Text, Text]:
    """The first three quarters of a text, to choose by, and the rest. Raises BadCheckpoint for too short a text."""
    whole = read_text(path, tokenizer, tokens)
    count = len(whole.ids)
    if count < LEAST_TOKENS:
        raise BadCheckpoint(f"{count} tokens", file=path, expected=f"a text of {LEAST_TOKENS} tokens or more")
    cut = count * 3 // 4
    return part_of(whole, 0, cut), part_of(whole, cut, count)


def part_of(text: Text, start: int, stop: int) -> Text:
    """Some tokens of a text, as a text of its own: its results compare with no other's."""
    mark = hashlib.sha256(f"{text.sha256} tokens {start} to {stop}, windows apart".encode()).hexdigest()
    return replace(text, ids=text.ids[start:stop], sizes=text.sizes[start:stop], sha256=mark)


def frame(source: Source, request: Request, floor: Floor, step: int | None) -> Space:
    """The slices to choose from at the precision and the context that a run in the budget would have.

    Contexts are those of a plan: the longest at which any slice fits. Raises WontFit.
    """
    if request.precision == "auto":
        plan = choose(source, request, floor, measured(source))
        request = replace(request, precision=plan.precision, context=plan.context)
    smallest: tuple[int, Space] | None = None
    for context in wanted_contexts(source.model.context, request.context):
        for recipe in wanted_recipes(source, request.precision):
            space = Space(source, recipe, replace(request, context=context), floor, step=step)
            needed = space.total(space.narrowest)
            if request.budget is None or needed <= request.budget:
                return space
            if smallest is None or needed < smallest[0]:
                smallest = needed, space
    assert smallest is not None
    assert request.budget is not None
    needed, space = smallest
    raise WontFit(
        f"nothing fits --budget {format_bytes(request.budget)}; the narrowest slice, {space.narrowest.name} in "
        f"{space.recipe.label}, needs {format_bytes(needed)} ({needed} bytes)",
        needed=needed,
        budget=request.budget,
        hint=f"Give at least --budget {needed}",
    )


def budgets(space: Space, points: int) -> list[int]:
    """The one that was asked for, or sizes from the narrowest slice to the full model."""
    if space.request.budget is not None:
        return [space.request.budget]
    low, high = space.total(space.narrowest), space.total(space.uniform(-1))
    return [low + (high - low) * k // (points - 1) for k in range(points)]
