"""What one decoded token reads: weights by the format they are kept in, keys and values, a row of a table on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from edge.budget.price import kv_token_bytes
from edge.budget.price_native import BLOCKS, essence
from loaders.network.spec import AnyAttention, Attention, LatentAttention, Model

# As formats of tensors are called, and as a plan calls them.
NAMES = {"F32": "float32", "BF16": "bf16", "F16": "float16"}
# What a step recorded for a GPU attends over: a power of two, from here on (edge/engine/static.py).
SHORTEST = 256


@dataclass(frozen=True)
class Reads:
    """``weights``: format -> bytes, idle experts and embeddings of which one row is used left out. ``layers``: the
    attention of each; ``steps``: operations of a pass; ``row``: bytes of the table's row of a token, 0 without one.
    """

    weights: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[AnyAttention, ...] = ()
    steps: int = 0
    row: int = 0

    @classmethod
    def of(cls, model: Model, weights: Mapping[str, int], row: int = 0, whole: Model | None = None) -> Reads:
        """Of a slice of ``whole``; formats as safetensors calls them, or as plans do."""
        named: Counter[str] = Counter()
        for name, count in weights.items():
            named[NAMES.get(name, name)] += count
        return cls(dict(named), tuple(layer.attention for layer in model.layers), steps_of(whole or model, model), row)

    @property
    def total(self) -> int:
        """Bytes of weights."""
        return sum(self.weights.values())

    def kv_bytes(self, depth: int, kind: str, context: int | None = None) -> int:
        """Bytes of keys and values, or latent entries, that a token at position ``depth`` attends over.

        A layer that shares another's reads them once more. ``context`` is that of a GPU: there a recorded step reads
        every slot that it might need.
        """
        return sum(count * kv_token_bytes(owned(a), kind) for a, count in self.seen(depth, context))

    def products(self, depth: int, context: int | None = None) -> int:
        """Multiply-adds of attention over them: some formats are widened faster than heads can use them."""
        return sum(count * heads_values(a) for a, count in self.seen(depth, context))

    def seen(self, depth: int, context: int | None) -> Iterator[tuple[AnyAttention, int]]:
        """(attention, tokens that it sees) of each layer."""
        for a in self.layers:
            if depth <= 0 and context is None:
                count = 0
            elif context is not None:
                count = min(slots(depth, context), a.span or context)
            elif isinstance(a, Attention) and a.window is None and a.chunk is not None:
                count = depth % a.chunk
            else:
                count = depth if a.span is None else min(a.span, depth)
            yield a, count


def owned(a: AnyAttention) -> AnyAttention:
    """The same with a cache of its own: that of the layer whose keys it reads is of the same shape."""
    return replace(a, kv_from=None) if isinstance(a, Attention) else a


def heads_values(a: AnyAttention) -> int:
    """Values of a token's keys and values, times the query heads that meet them."""
    return a.heads * (a.entry + a.kv_rank if isinstance(a, LatentAttention) else 2 * a.head_dim)


def slots(position: int, context: int) -> int:
    """Slots that a recorded step at ``position`` attends over."""
    size = SHORTEST
    while size <= position:
        size *= 2
    return min(size, context)


def steps_of(whole: Model, small: Model) -> int:
    """Operations of a pass, as the native engine counts them; in proportion to ``whole``, of which ``small`` is a part:
    layers are mostly alike, and plans ask for hundreds of slices.
    """
    return steps_of_whole(whole) * len(small.layers) // len(whole.layers)


@lru_cache(16)
def steps_of_whole(model: Model) -> int:
    """Of a model as it is."""
    return essence(model).size(lambda name: BLOCKS).steps
