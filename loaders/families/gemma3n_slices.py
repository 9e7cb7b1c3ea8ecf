"""The published slices of Gemma 3n E4B, and the relative ones any nested model has.

Sources: google/gemma3n-slicing-configs for the names, widths and MMLU figures of the pre-trained model.
"""

from __future__ import annotations

from itertools import chain

from loaders.families import NamedSlice
from loaders.network.matformer import Slice, full
from loaders.network.spec import Layer, Model, Nested

WIDE, NARROW = 16384, 8192
E4B = (35, 2048, WIDE)
E2B = (30, 2048, NARROW)

# name -> (MMLU, layers that keep the full width); two names had one figure each by block and by layer.
PUBLISHED: dict[str, tuple[float, tuple[range, ...]]] = {
    "E2.49B": (54.5, (range(20, 25),)),
    "E2.54B": (55.4, (range(4, 5), range(20, 25))),
    "E2.69B": (57.7, (range(4, 20, 5), range(20, 25))),
    "E2.73B": (57.1, (range(15, 25),)),
    "E2.98B-block": (59.5, (range(10, 25),)),
    "E2.98B": (59.5, (range(15, 25), range(30, 35))),
    "E3.18B": (61.8, (range(4, 5), range(9, 25), range(29, 30), range(34, 35))),
    "E3.24B": (60.7, (range(10, 30),)),
    "E3.39B": (63.0, (range(4, 5), range(9, 30), range(34, 35))),
    "E3.49B": (61.4, (range(5, 30),)),
    "E3.59B": (63.4, (range(4, 30), range(34, 35))),
    "E3.79B-block": (62.0, (range(5, 35),)),
    "E3.79B": (63.4, (range(4, 35),)),
}
SKIPPED = range(20, 25)


def slices(model: Model) -> tuple[NamedSlice, ...]:
    """The slices that have been published for exactly this model; none for other sizes."""
    if shape(model) != E4B:
        return ()
    kept = tuple(i for i in range(35) if i not in SKIPPED)
    named = [NamedSlice(full(model), 62.3)]
    named.append(NamedSlice(Slice("E2B", kept, (NARROW,) * 30), 50.9))
    named.append(NamedSlice(Slice("E1.96B", kept, tuple(WIDE if i == 4 else NARROW for i in kept)), 53.4))
    for name, (mmlu, ranges) in PUBLISHED.items():
        wide = set(chain.from_iterable(ranges))
        widths = tuple(WIDE if i in wide else NARROW for i in range(35))
        named.append(NamedSlice(Slice(name, tuple(range(35)), widths), mmlu))
    return tuple(named)


def shape(model: Model) -> tuple[int, int, int]:
    """(layers, dim, width), by which the published models are recognised."""
    return len(model.layers), model.dim, model.layers[0].ffn.width


def nested(dim: int, layers: tuple[Layer, ...]) -> Nested:
    """The widths that were trained: of the published models the published ones, else halves and quarters.

    The block a slice may skip is the first run of sharing layers up to and including a full-attention one.
    """
    most = max(layer.ffn.width for layer in layers)
    trained = {E4B: (WIDE, NARROW), E2B: (NARROW,)}.get((len(layers), dim, most))
    widths = trained or tuple(w for w in (most, most // 2, most // 4) if w)
    shared = [i for i, layer in enumerate(layers) if layer.attention.kv_from is not None]
    skippable = []
    for i in shared:
        skippable.append(i)
        if layers[i].attention.window is None:
            break
    # E2B is E4B without that block already.
    return Nested(widths, () if (len(layers), dim, most) == E2B else tuple(skippable))
