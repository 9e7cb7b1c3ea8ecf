"""Which widths within how many bytes: exact arithmetic over the planner's own prices and over measured losses.

A slice costs what its plan costs: feed-forward bytes add up layer by layer, all else depends on the layers kept and on
the widest of them. What layers cost in quality is whole numbers here: sums are exact, the same input gives the same
slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edge.budget.plan import Floor, Request, split, wanted_runs
from edge.budget.price import Prices
from edge.budget.pricing import prices_of
from loaders.errors import Unsupported, Usage
from loaders.formats.recipe import Recipe
from loaders.network.matformer import Slice, full, sliced
from loaders.network.spec import Model
from loaders.slices import ranges
from loaders.weights import Source

# Choices per layer: what is searched grows with their square.
MOST_WIDTHS = 32

Choices = Sequence[tuple[int, int]]
# What each source layer costs at each width, in units that add up.
Costs = Sequence[Mapping[int, int]]


def slice_of(model: Model, widths: Sequence[int], skip: Sequence[int] = ()) -> Slice:
    """The slice that gives source layer i ``widths[i]`` and leaves ``skip`` out, by a name that ``--slice`` takes."""
    keep = tuple(i for i in range(len(model.layers)) if i not in skip)
    found = Slice("", keep, tuple(widths[i] for i in keep))
    if found == replace(full(model), name=""):
        return full(model)
    name = "ffn=" + ",".join(f"{width}x{count}" if count > 1 else str(width) for width, count in found.runs)
    return replace(found, name=name + (f"+skip={ranges(skip)}" if skip else ""))


def widths_of(model: Model, step: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Per layer the widths to choose from, ascending: the trained ones, with ``step`` its multiples in between too.

    Raises Unsupported for a model without trained prefixes, Usage for a step that leaves too many.
    """
    if model.nested is None:
        raise Unsupported(f"{model.family} models are not MatFormers and have no slices", field="MODEL")
    most = max(layer.ffn.width for layer in model.layers)
    found = []
    for layer in model.layers:
        width = layer.ffn.width
        trained = {width} | {width * w // most for w in model.nested.widths if width * w % most == 0}
        between = range(0, width, step) if step else range(0)
        found.append(tuple(sorted(trained | {w for w in between if w > min(trained)})))
    if all(len(widths) == 1 for widths in found) and not model.nested.skippable:
        raise Unsupported(f"one trained width, {most}", field="MODEL", expected="widths to choose from")
    if max(map(len, found)) > MOST_WIDTHS:
        raise Usage(step, field="--step", expected=f"at most {MOST_WIDTHS} widths between {min(found[0])} and {most}")
    return tuple(found)


def knapsack(items: Sequence[Choices], room: int) -> tuple[int, ...] | None:
    """Of each item the index of one choice (bytes, cost): least cost within ``room`` bytes, fewest bytes on a tie.

    Exact: keeps every sum that no other beats in both. None where nothing fits.
    """
    rest = [0]
    for choices in reversed(items):
        rest.append(rest[-1] + min(size for size, _ in choices))
    front: list[tuple[int, int, Any]] = [(0, 0, None)]
    for choices, least in zip(items, rest[-2::-1], strict=True):
        sums = (
            (size + more, cost + extra, (index, trail))
            for size, cost, trail in front
            for index, (more, extra) in enumerate(choices)
            if size + more + least <= room
        )
        front = []
        for found in sorted(sums, key=lambda s: s[:2]):
            if not front or found[1] < front[-1][1]:
                front.append(found)
    if not front or room < 0:
        return None
    picked, trail = [], front[-1][2]
    while trail is not None:
        index, trail = trail
        picked.append(index)
    return tuple(reversed(picked))


def cost_of(costs: Costs, part: Slice) -> int:
    """What the layers of a slice add up to."""
    return sum(costs[i][w] for i, w in zip(part.keep, part.widths, strict=True))


class Space:
    """Every slice there is to choose from, priced at one recipe and context as the planner prices it.

    ``grid[i]``: widths of source layer i, ascending. ``skips``: what may be left out, nothing first.
    """

    def __init__(
        self, source: Source, recipe: Recipe, request: Request, floor: Floor, *, step: int | None = None
    ) -> None:
        assert request.context is not None
        self.source, self.recipe, self.request, self.floor = source, recipe, request, floor
        self.model = source.model
        self.trained, self.grid = widths_of(self.model), widths_of(self.model, step)
        skippable = self.model.nested.skippable if self.model.nested else ()
        self.skips: tuple[tuple[int, ...], ...] = ((), skippable) if skippable else ((),)
        self.runs = list(wanted_runs(source, request, recipe))
        self.ffn = self.layer_bytes()
        self.shapes = {skip: list(self.capped(skip)) for skip in self.skips}

    def prices(self, part: Slice) -> Prices:
        """What a slice costs."""
        return prices_of(self.source, part, sliced(self.model, part), self.request)

    def layer_bytes(self) -> tuple[dict[int, int], ...]:
        """Of each source layer: width -> bytes of all its tensors."""
        found: tuple[dict[int, int], ...] = tuple({} for _ in self.grid)
        for level in range(max(map(len, self.grid))):
            widths = [grid[min(level, len(grid) - 1)] for grid in self.grid]
            part = slice_of(self.model, widths)
            sizes, prices = [0] * len(widths), self.prices(part)
            for name, tensor in prices.tensors.items():
                if name.startswith("layers."):
                    sizes[int(name.split(".", 2)[1])] += prices.held(tensor, self.recipe)
            for held, width, size in zip(found, widths, sizes, strict=True):
                held[width] = size
        return found

    def capped(self, skip: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int]]:
        """(most widths, bytes beside the layers) for bounds on the widest layer: up to the last that writes keys, and
        past it, where a pass over a prompt runs one token. Widths in between the trained ones bound both alike.
        """
        keep = [i for i in range(len(self.grid)) if i not in skip]
        last = keep[sliced(self.model, self.uniform(0, skip)).last_writer]
        looser: dict[int, tuple[int, int]] = {}
        for early, late in self.bounds():
            most = [max(grid[0], early if i <= last else late) for i, grid in enumerate(self.grid)]
            widths = tuple(max(w for w in grid if w <= m) for grid, m in zip(self.grid, most, strict=True))
            beside = self.total(slice_of(self.model, widths, skip)) - sum(self.ffn[i][widths[i]] for i in keep)
            held = looser.setdefault(beside, (early, late))
            # A bound that saves nothing is no reason to search again.
            if held == (early, late) or not (held[0] >= early and held[1] >= late):
                yield widths, beside

    def bounds(self) -> list[tuple[int, int]]:
        """Pairs of trained widths, and every width with itself; the loosest first."""
        trained = {w for widths in self.trained for w in widths}
        pairs = {(a, b) for a in trained for b in trained} | {(w, w) for grid in self.grid for w in grid}
        return sorted(pairs, reverse=True)

    def layers_bytes(self, part: Slice) -> int:
        """Bytes of all tensors that belong to a layer."""
        return sum(self.ffn[i][w] for i, w in zip(part.keep, part.widths, strict=True))

    def skipped(self, part: Slice) -> tuple[int, ...]:
        """What a slice leaves out."""
        return tuple(i for i in range(len(self.grid)) if i not in part.keep)

    def bytes(self, part: Slice) -> int:
        """As :meth:`total`, by addition: exact where all widths are trained ones, otherwise no less."""
        pairs = list(zip(part.keep, part.widths, strict=True))
        bounds = (beside for most, beside in self.shapes[self.skipped(part)] if all(w <= most[i] for i, w in pairs))
        return self.layers_bytes(part) + min(bounds)

    def uniform(self, level: int, skip: Sequence[int] = ()) -> Slice:
        """All layers at their trained width number ``level`` from the narrowest; -1 is the full width."""
        widths = [w[-1] if level < 0 else w[min(level, len(w) - 1)] for w in self.trained]
        return slice_of(self.model, widths, skip)

    @property
    def narrowest(self) -> Slice:
        """The slice that needs the fewest bytes."""
        return min((self.uniform(0, skip) for skip in self.skips), key=self.total)

    def total(self, part: Slice) -> int:
        """Bytes of the smallest plan of a slice, all that ``--budget`` counts."""
        prices, found = self.prices(part), []
        for _, context, kv, tier, chunk in self.runs:
            priced = prices.components(self.recipe, kv, tier, context, chunk)
            found.append(sum(split(priced, self.floor, tier, self.request.device)[0].values()))
        return min(found)

    def solve(
        self, costs: Costs, budget: int, skip: tuple[int, ...] = (), forbidden: tuple[int, int] | None = None
    ) -> Slice | None:
        """The slice without ``skip`` of least cost within ``budget`` bytes, of the smallest on a tie; None where
        nothing fits. ``forbidden``: (layer, width) that it must not have.
        """
        best: tuple[tuple[int, int], Slice] | None = None
        for most, beside in self.shapes[skip]:
            keep = [i for i in range(len(most)) if i not in skip]
            allowed = [[w for w in self.grid[i] if w <= most[i] and (i, w) != forbidden] for i in keep]
            pairs = list(zip(keep, allowed, strict=True))
            items = [[(self.ffn[i][w], costs[i][w]) for w in widths] for i, widths in pairs]
            picked = knapsack(items, budget - beside) if all(allowed) else None
            if picked is None:
                continue
            chosen = {i: widths[k] for (i, widths), k in zip(pairs, picked, strict=True)}
            part = slice_of(self.model, [chosen.get(i, 0) for i in range(len(most))], skip)
            rank = (cost_of(costs, part), self.bytes(part))
            if best is None or rank < best[0]:
                best = rank, part
        return None if best is None else best[1]

    def alternatives(self, costs: Costs, best: Slice, budget: int) -> list[Slice]:
        """Slices that differ from ``best`` in at least one layer's width, the best predicted first."""
        skip, found = self.skipped(best), {}
        for layer, width in zip(best.keep, best.widths, strict=True):
            part = self.solve(costs, budget, skip, (layer, width))
            if part is not None:
                found[part.name] = part
        return sorted(found.values(), key=lambda part: (cost_of(costs, part), part.name))

    def neighbours(self, part: Slice, budget: int) -> Iterator[Slice]:
        """Slices within ``budget`` with one layer a width up, or one up and one down."""
        skip = self.skipped(part)
        widths = dict(zip(part.keep, part.widths, strict=True))

        def moved(*by: tuple[int, int]) -> Slice:
            new = {**widths, **dict(by)}
            return slice_of(self.model, [new.get(i, 0) for i in range(len(self.grid))], skip)

        ups = [(i, w) for i in part.keep for w in self.beside(i, widths[i], 1)]
        downs = [(i, w) for i in part.keep for w in self.beside(i, widths[i], -1)]
        changed = [moved(up) for up in ups]
        changed += [moved(up, down) for up in ups for down in downs if up[0] != down[0]]
        yield from (other for other in changed if self.bytes(other) <= budget)

    def beside(self, layer: int, width: int, by: int) -> tuple[int, ...]:
        """The next width up (1) or down (-1) of a layer; nothing at the end."""
        at = self.grid[layer].index(width) + by
        return (self.grid[layer][at],) if 0 <= at < len(self.grid[layer]) else ()

    def between(self, budget: int, skip: Sequence[int] = (), multiple: int = 32) -> Slice | None:
        """The largest slice of one width throughout that fits, trained or not: a multiple of 32, no narrower than any
        that was trained.
        """
        most = max(layer.ffn.width for layer in self.model.layers)

        def at(width: int) -> Slice:
            return slice_of(self.model, [min(width, layer.ffn.width) for layer in self.model.layers], skip)

        low, high = -(-min(map(min, self.trained)) // multiple), -(-most // multiple)
        if self.total(at(low * multiple)) > budget:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total(at(middle * multiple)) <= budget else (low, middle - 1)
        return at(low * multiple)
