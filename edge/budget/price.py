"""What each part of a run costs in bytes, from shapes alone: no weights are touched, no torch is imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from loaders.formats.quant import BITS, BLOCK, SCALE_BYTES, record_bytes
from loaders.formats.recipe import PLAIN, Recipe
from loaders.formats.safetensors import ITEMSIZE
from loaders.network.matformer import Slice
from loaders.network.spec import AnyAttention, Attention, Experts, FeedForward, Gated, LatentAttention, Model, Plain
from loaders.weights import Kept, Source, table_kind

# The row cache of the ssd tier: enough for the words a text keeps coming back to.
ROW_CACHE = 16 << 20
# Measured on a model of 27 million parameters and on one of E2B's shapes: benchmarks/run.py repeats it.
SCRATCH = 8 << 20
# The widened rows, and the copy of them in its own order that the matrix library makes, at most.
TILES = 2
TILE_BYTES = 8 << 20
# On a GPU: what torch's allocator keeps between sizes, and rows that are widened to 16 bits at a time for a prefill.
CUDA_SCRATCH = 60 << 20
CUDA_TILE = 32 << 20
FLOAT = 4
# int8 keys and values on a CPU: what is widened at a time, the scores of a pass, float copies while they are quantized.
KV_TILE = 1 << 20
KV_SCORES = 8 << 20
# Queries that attend at once: so many that their mask over all keys has this many bytes in float32.
MASK_BYTES = 8 << 20
QUANTIZING = 3
STACKS = ("experts.gate", "experts.up", "experts.down")


def itemsize(precision: str) -> int:
    """Bytes per value."""
    return ITEMSIZE[PLAIN.get(precision, "F16")]


def kv_capacity(a: AnyAttention, context: int) -> int:
    """Tokens of which one layer keeps something: all of them, or as many as a window or a chunk shows."""
    return context if a.span is None else min(a.span, context)


def kv_group(head_dim: int) -> int:
    """Values of a head that share one scale in int8: a block, or the head where blocks would not fill it."""
    return BLOCK if head_dim % BLOCK == 0 else head_dim


def kv_token_bytes(a: AnyAttention, precision: str) -> int:
    """What one layer keeps per token. Latent entries stay in 16 bits where keys and values have 8."""
    if precision != "int8":
        return a.cached * itemsize(precision)
    if isinstance(a, LatentAttention):
        return a.cached * itemsize("bf16")
    return a.cached + a.cached // kv_group(a.head_dim) * SCALE_BYTES


def kv_bytes(model: Model, context: int, precision: str) -> int:
    """Keys and values, or latent entries, of every layer that owns some, for ``context`` tokens."""
    layers = (layer.attention for layer in model.layers)
    return sum(kv_token_bytes(a, precision) * kv_capacity(a, context) for a in layers)


def kv_scratch_bytes(model: Model, chunk: int, context: int, precision: str, device: str = "cpu") -> int:
    """What a pass over ``chunk`` tokens holds beside the caches, to attend over them.

    A ring that wraps, or a pass past a chunk's end, makes an ordered copy of what is still seen; that of a layer whose
    keys others read lives on. int8 is quantized from float copies, and widened to scratch of its own.
    """
    most = held = 0
    for first, last, layer in model.runs:
        a = layer.attention
        if a.span is not None and a.span < context:
            copy = kv_token_bytes(a, precision) * (a.span + chunk)
            held += copy * sum(i in model.donors for i in range(first, last))
            most = max(most, held + copy)
            held += copy if last in model.donors else 0
    if precision != "int8":
        return most
    layers = {layer.attention for _, _, layer in model.runs if not isinstance(layer.attention, LatentAttention)}
    copies = QUANTIZING * chunk * FLOAT * max((a.cached for a in layers), default=0)
    return most + copies + max((int8_scratch_bytes(a, chunk, context, device) for a in layers), default=0)


def int8_scratch_bytes(a: Attention, chunk: int, context: int, device: str) -> int:
    """What attention over int8 keys and values of a layer widens at a time, and on a CPU its scores."""
    seen = context if a.span is None else min(context, a.span + chunk)
    if device != "cpu":
        head = 2 * 2 * seen * a.head_dim
        return min(a.kv_heads * head, max(CUDA_TILE, head))
    return KV_TILE + max(min(KV_SCORES, FLOAT * chunk * a.heads * seen), FLOAT * seen * a.heads // a.kv_heads)


def row_bytes(small: Model, kind: str) -> int:
    """Of the per-layer-embedding table, what a token has of it in the format ``kind``."""
    assert small.ple is not None
    dim = small.ple.dim
    return len(small.layers) * (record_bytes(dim, kind) if kind in BITS else dim * ITEMSIZE[kind])


def ple_bytes(small: Model, kind: str, tier: str) -> int:
    """What a tier of the per-layer-embedding table keeps in memory, its rows in the format ``kind``."""
    assert small.ple is not None
    table = small.ple.rows * row_bytes(small, kind)
    # A row cache as large as the table would make the ssd tier a slow way of holding it in memory.
    return min(ROW_CACHE, table // 8) if tier == "ssd" else table


def logits_bytes(model: Model, tokens: int, chunk: int, precision: str) -> int:
    """What computing the logits of all of ``tokens`` takes: themselves, a cache, and a pass with every layer run for
    all of a chunk, whose own logits are held a few times over where they are capped.
    """
    values = min(chunk, tokens) * model.vocab * FLOAT * (1 if model.softcap is None else 3)
    every = activation_bytes(model, chunk, tokens, precision, every=True)
    return tokens * model.vocab * FLOAT + kv_bytes(model, tokens, precision) + values + every


def activation_bytes(
    model: Model, chunk: int, context: int, precision: str, device: str = "cpu", *, every: bool = False
) -> int:
    """What one pass over ``chunk`` tokens holds at once: its values in float32, the logits of one token, scratch.

    Layers past the last that writes keys run for one token alone, unless ``every`` token's logits are wanted.
    """
    layers = [layer for first, _, layer in model.runs if every or first <= model.last_writer]
    attending = chunk * FLOAT * max(attention_values(layer.attention) for layer in layers)
    attending += max(latent_step_bytes(layer.attention, chunk) for layer in layers)
    feeding = chunk * FLOAT * max(ffn_values(model.dim, layer.ffn) for layer in layers)
    caching = kv_scratch_bytes(model, chunk, context, precision, device)
    # Copies of a ring outlive attention; what int8 is made of and widened to does not.
    copies = kv_scratch_bytes(model, chunk, context, "bf16", device) if precision == "int8" else caching
    streams = model.altup.streams if model.altup else 1
    if device == "cpu":
        residual, inner = 2 * streams + 3, max(attending + caching, feeding + copies)
    else:
        # The allocator also keeps blocks of other sizes than the one asked for.
        residual, inner = 4 * streams + 6, max(attending, feeding) + caching
    ple = 2 * len(model.layers) * model.ple.dim if model.ple else 0
    values = chunk * (model.dim * residual + ple) * FLOAT
    return values + inner + 4 * model.vocab * FLOAT + scratch_bytes(model)


def attention_values(a: AnyAttention) -> int:
    """Values per token that attention holds at once: queries, rotated, in the cache's order; what comes out, twice.

    Keys and values are in the cache by then, and before it there are no queries. Latent attention also holds queries
    as they were projected and absorbed, and those in the cache's 16 bits.
    """
    if isinstance(a, LatentAttention):
        head = a.nope_dim + 3 * a.rope.dim + 4 * a.kv_rank + a.entry // 2
        return a.heads * head + (a.q_rank or 0)
    return 4 * a.head_dim * max(a.heads, a.kv_heads)


def latent_step_bytes(a: AnyAttention, chunk: int) -> int:
    """What latent attention holds while it attends, where that is more than when it joins what came out.

    Most where there are the fewest keys, in a first pass: then the most queries attend at once.
    """
    if not isinstance(a, LatentAttention):
        return 0
    step = min(chunk, max(1, MASK_BYTES // (FLOAT * chunk * a.heads)))
    return max(0, step * (a.entry + a.kv_rank // 2) - chunk * a.kv_rank) * a.heads * FLOAT


def ffn_values(dim: int, f: FeedForward) -> int:
    """Values per token that a feed-forward holds at once: gate, activated, up and their product, or two without a gate.

    At worst one expert has all the tokens: beside that what it reads, it writes, and is summed, and the routing.
    """
    if isinstance(f, Plain):
        return 2 * f.width
    if isinstance(f, Gated):
        return 4 * f.width
    shared = dim + 4 * f.shared.width if f.shared else 0
    return max(4 * f.width + (3 + f.router.on_input) * dim + 6 * f.experts, shared)


def widest(model: Model) -> int:
    """The largest width of a feed-forward, or of one expert."""
    ffns = [layer.ffn for layer in model.layers]
    shared = [f.shared for f in ffns if isinstance(f, Experts) and f.shared is not None]
    return max(f.width for f in (*ffns, *shared))


def scratch_bytes(model: Model) -> int:
    """Widened tiles and what the matrix library packs beside them, sampling, threads, the allocator's slack."""
    return SCRATCH + TILES * min(TILE_BYTES, model.dim * widest(model) * FLOAT)


def cuda_scratch_bytes(model: Model, chunk: int, recipe: Recipe) -> int:
    """The same on a GPU: quantized matrices are widened in tiles, each with its product with a chunk."""
    if recipe.precision not in BITS:
        return CUDA_SCRATCH
    rows = min(widest(model), CUDA_TILE // 2 // model.dim)
    return CUDA_SCRATCH + 2 * rows * (model.dim + chunk)


class Prices:
    """Bytes by component of one slice ``small`` of a source's model, at any recipe. What repeats is counted once."""

    def __init__(self, source: Source, part: Slice, small: Model, tensors: Mapping[str, Kept], device: str) -> None:
        self.source, self.part, self.small, self.tensors, self.device = source, part, small, tensors, device
        # Layers are mostly alike: a few dozen kinds of tensors instead of hundreds of tensors.
        self.kinds = Counter(tensor.kind for tensor in tensors.values())
        self.weights: dict[Recipe, int] = {}
        self.activations: dict[tuple[int, int, str], int] = {}
        self.caches: dict[tuple[int, str], int] = {}
        self.mixtures: dict[Recipe, list[tuple[Experts, int]]] = {}

    def components(self, recipe: Recipe, kv: str, tier: str, context: int, chunk: int) -> dict[str, int]:
        """What a run holds besides the runtime's own floor and the tokenizer."""
        return {
            "weights": self.weights_bytes(recipe),
            "ple": 0 if tier == "none" else ple_bytes(self.small, table_kind(self.source, recipe), tier),
            "kv": self.kv_bytes(kv, context, chunk),
            "activations": self.activation_bytes(recipe, kv, context, chunk),
        }

    def held(self, tensor: Kept, recipe: Recipe) -> int:
        """What a tensor takes."""
        return tensor.nbytes(recipe)

    def kv_bytes(self, kv: str, context: int, chunk: int) -> int:
        """What the caches take."""
        if (context, kv) not in self.caches:
            self.caches[context, kv] = kv_bytes(self.small, context, kv)
        return self.caches[context, kv]

    def activation_bytes(self, recipe: Recipe, kv: str, context: int, chunk: int) -> int:
        """What a pass takes."""
        key = (chunk, context, kv)
        if key not in self.activations:
            self.activations[key] = activation_bytes(self.small, chunk, context, kv, self.device)
        more = cuda_scratch_bytes(self.small, chunk, recipe) - scratch_bytes(self.small) if self.device == "cuda" else 0
        return self.activations[key] + more

    def weights_bytes(self, recipe: Recipe) -> int:
        """All tensors but the per-layer-embedding table."""
        if recipe not in self.weights:
            self.weights[recipe] = sum(count * self.held(kind, recipe) for kind, count in self.kinds.items())
        return self.weights[recipe]

    def bytes_per_token(self, recipe: Recipe) -> int:
        """Weights that one decoded token reads: all but an embedding of which one row is used, and idle experts."""
        return sum(self.weight_reads(recipe).values())

    def weight_reads(self, recipe: Recipe) -> dict[str, int]:
        """The same by the format they are kept in, as safetensors or :mod:`loaders.formats.quant` call it."""
        found: Counter[str] = Counter()
        for kind, count in self.kinds.items():
            found[kind.stored(recipe)] += count * self.held(kind, recipe)
        if not self.small.tied:
            found[self.tensors["embed"].stored(recipe)] -= self.held(self.tensors["embed"], recipe)
        stacks = next((tensor for name, tensor in self.tensors.items() if name.endswith(STACKS[0])), None)
        for f, size in self.experts(recipe) if stacks is not None else ():
            found[stacks.stored(recipe)] -= size * (f.experts - f.active) // f.experts
        return dict(found)

    def experts_bytes(self, recipe: Recipe) -> int:
        """All experts, whether a token meets them or not; those that every token shares are not among them."""
        return sum(size for _, size in self.experts(recipe))

    def experts(self, recipe: Recipe) -> list[tuple[Experts, int]]:
        """(mechanism, bytes) of each layer that has a choice of experts."""
        if recipe not in self.mixtures:
            self.mixtures[recipe] = [
                (layer.ffn, sum(self.held(self.tensors[f"layers.{i}.{name}"], recipe) for name in STACKS))
                for i, layer in enumerate(self.small.layers)
                if isinstance(layer.ffn, Experts)
            ]
        return self.mixtures[recipe]
