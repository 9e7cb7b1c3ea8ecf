"""A model's layers, as data and as a table: equal layers are one row, wherever in the model they stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.table import Table

from edge.budget.units import format_bytes
from edge.cli.show import parameters
from loaders.network.spec import (
    AnyAttention,
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    Linear,
    Llama3Scaling,
    Model,
    Plain,
    Proportional,
    Rope,
    Router,
    Yarn,
)
from loaders.network.tensors import active, tensors, total

# More ranges than this are shortened: people count no further.
MOST_RANGES = 6
# Characters of a cell's later lines: with them a table stays within 120 columns.
CELL = 16
CACHES = ("full", "ring", "chunked", "latent", "shared")
SCALINGS = {Llama3Scaling: "llama3", Yarn: "yarn", Linear: "linear"}
QK_NORMS = {"head": "QK per head", "whole": "QK whole", "unweighted": "QK L2"}


@dataclass(frozen=True)
class Row:
    """Equal layers: their numbers, what each of them is, and what they hold together."""

    indices: tuple[int, ...]
    layer: Layer
    parameters: int
    active: int
    nbytes: int

    def as_dict(self, count: int) -> dict[str, Any]:
        """Plain data for JSON; ``count`` is the layers of the model."""
        a, ffn = self.layer.attention, self.layer.ffn
        return {
            "layers": list(self.indices),
            "where": ranges(self.indices, count),
            "attention": {"kind": kind(a), **asdict(a), "cached_values_per_token": a.cached},
            "ffn": {"kind": type(ffn).__name__.lower(), **asdict(ffn)},
            "norms": list(self.layer.norms),
            "parameters": self.parameters,
            "active_parameters": self.active,
            "bytes": self.nbytes,
        }


def layer_rows(model: Model, stored: Mapping[str, int]) -> list[Row]:
    """One row per kind of layer, by first layer; ``stored`` maps tensors to bytes."""
    alike: dict[Layer, list[int]] = {}
    for i, layer in enumerate(model.layers):
        alike.setdefault(layer, []).append(i)
    counts, held = [0] * len(model.layers), [0] * len(model.layers)
    for name, shape in tensors(model).items():
        if name.startswith("layers."):
            i = int(name.split(".", 2)[1])
            counts[i] += math.prod(shape)
            held[i] += stored[name]
    rows = []
    for layer, indices in alike.items():
        one = replace(model, layers=(layer,))
        count = sum(counts[i] for i in indices)
        idle = (total(one) - active(one)) * len(indices)
        rows.append(Row(tuple(indices), layer, count, count - idle, sum(held[i] for i in indices)))
    return rows


def layer_table(model: Model, rows: Sequence[Row]) -> Table:
    """For people; a second line in a cell holds what only some models have."""
    mixture = any(isinstance(row.layer.ffn, Experts) for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ["layers", "attention", "heads", "sees", "RoPE", "norms", "FFN", "experts", "parameters", "bytes"]
    if not mixture:
        names.remove("experts")
    for name in names:
        number = name in ("sees", "parameters", "bytes")
        # Cells of words wrap on a narrow terminal; numbers would be cut.
        justify: Literal["left", "right"] = "right" if number else "left"
        table.add_column(name, justify=justify, no_wrap=number or name == "RoPE", overflow="fold")
    for row in rows:
        a, ffn = row.layer.attention, row.layer.ffn
        table.add_row(
            ranges(row.indices, len(model.layers)),
            kind(a) if a.kv_from is None else lines(f"{kind(a)}, shared", f"from layer {a.kv_from}"),
            heads_text(a),
            "all" if a.span is None else f"{a.span:,}",
            rope_text(a),
            norm_text(model, row.layer),
            ffn_text(ffn),
            *((experts_text(ffn),) if mixture else ()),
            parameters(row.parameters / 1e9),
            format_bytes(row.nbytes),
        )
    return table


def lines(*texts: str) -> str:
    """A cell: what there is, and below it what else there is, several to a line where they are short."""
    first, *more = [text for text in texts if text]
    found = [first]
    for text in more:
        if len(found) > 1 and len(found[-1]) + len(text) + 2 <= CELL:
            found[-1] += f", {text}"
        else:
            found.append(text)
    return "\n".join(found)


def ranges(indices: Sequence[int], count: int) -> str:
    """Numbers of layers, of ``count``: 0-4,6 or, where that is shorter, every 6th from 5, 5 of every 6 from 0."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    said = ",".join(texts)
    pattern = periodic(runs, count) if len(runs) > 2 else None
    if pattern is not None and (len(texts) > MOST_RANGES or len(pattern) < len(said)):
        return pattern
    return said if len(texts) <= MOST_RANGES else ",".join([*texts[: MOST_RANGES - 2], "...", texts[-1]])


def periodic(runs: Sequence[Sequence[int]], count: int) -> str | None:
    """What comes back at equal distances, in words; None for anything else. The model's end may cut the last run."""
    (start, last), (second, _) = runs[:2]
    width, period = last - start + 1, second - start
    stop = count if runs[-1][0] + period >= count else runs[-1][1] + 1
    firsts = range(start, stop, period)
    if [list(run) for run in runs] != [[first, min(first + width, stop) - 1] for first in firsts]:
        return None
    often = f"every {ordinal(period)}" if width == 1 else f"{width} of every {period}"
    return f"{often} from {start}" + ("" if stop == count else f" to {stop - 1}")


def ordinal(n: int) -> str:
    """2nd, 3rd, 4th, 11th, 21st."""
    ending = "th" if 10 < n % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def kind(a: AnyAttention) -> str:
    """full, sliding, chunked or latent."""
    if isinstance(a, LatentAttention):
        return "latent"
    return "sliding" if a.window is not None else "full" if a.chunk is None else "chunked"


def cache_kind(a: AnyAttention) -> str:
    """How keys and values are kept, one of CACHES: a window's in a ring, another layer's nowhere."""
    if a.kv_from is not None:
        return "shared"
    return {"sliding": "ring"}.get(kind(a), kind(a))


def heads_text(a: AnyAttention) -> str:
    """32/8 x 128: heads of queries, of keys and values, and their size."""
    if isinstance(a, LatentAttention):
        return lines(f"{a.heads} x ({a.nope_dim}+{a.rope.dim})", f"latent {a.kv_rank}+{a.rope.dim}")
    return lines(f"{a.heads}/{a.kv_heads} x {a.head_dim}", "bias" if a.bias else "")


def rope_text(a: AnyAttention) -> str:
    """Base, scaling, the share of a head that turns, the order of its pairs, what makes queries grow."""
    warm = f"temp. {a.temperature.scale:g}" if isinstance(a, Attention) and a.temperature else ""
    rope = a.rope
    if rope is None:
        return lines("none", warm)
    base = f"{rope.theta:,.0f}" if rope.theta == int(rope.theta) else f"{rope.theta:g}"
    share = turning(rope, rope.dim if isinstance(a, LatentAttention) else a.head_dim)
    return lines(
        base,
        scaling_text(rope),
        "" if share == 1.0 else f"{share:.0%} turns",
        "interleaved" if rope.interleaved else "",
        warm,
    )


def scaling_text(rope: Rope) -> str:
    """Its kind and factor; nothing where wavelengths are as they were, or where only fewer of them turn."""
    if rope.scaling is None or isinstance(rope.scaling, Proportional):
        return ""
    return f"{SCALINGS[type(rope.scaling)]} x{rope.scaling.factor:g}"


def turning(rope: Rope, head: int) -> float:
    """The share of a head's values that turn."""
    turned = 2 * rope.scaling.angles if isinstance(rope.scaling, Proportional) else rope.dim
    return turned / head


def norm_text(model: Model, layer: Layer) -> str:
    """Where the residual and its branches are normalised, and what else of attention is."""
    before, after = "attn_in" in layer.norms, "attn_out" in layer.norms
    place = "both" if before and after else "before" if before else "after" if after else "none"
    a = layer.attention
    inner = []
    if isinstance(a, Attention):
        inner = [QK_NORMS[a.qk_norm] if a.qk_norm else "", "V" if a.v_norm else ""]
    elif isinstance(a, LatentAttention):
        inner = ["kv latent" if a.q_rank is None else "q, kv latent"]
    return lines(place, "LayerNorm" if model.layer_norm else "", *inner, "scalar" if layer.scalar else "")


def ffn_text(ffn: FeedForward) -> str:
    """Width and activation of a dense feed-forward."""
    if isinstance(ffn, Experts):
        return "-"
    if isinstance(ffn, Plain):
        return lines(f"{ffn.width} {ffn.activation}", "ungated")
    return lines(f"{ffn.width} {ffn.activation}", f"{ffn.sparsity:.0%} sparse" if ffn.sparsity else "")


def experts_text(ffn: FeedForward) -> str:
    """How many of how many, and their width."""
    if not isinstance(ffn, Experts):
        return "-"
    shared = f"+ shared {ffn.shared.width}" if ffn.shared is not None else ""
    return lines(f"{ffn.active} of {ffn.experts} x {ffn.width}", ffn.activation, shared)


def router_text(router: Router) -> str:
    """How tokens choose experts, in words."""
    parts = [router.score]
    if router.groups > 1:
        parts.append(f"{router.active_groups} of {router.groups} groups")
    if router.bias:
        parts.append("a learned bias chooses")
    if router.normalized:
        parts.append("weights normalised")
    if router.scale != 1.0:
        parts.append(f"times {router.scale:g}")
    if router.on_input:
        parts.append("weights multiply what experts read")
    return ", ".join(parts)
