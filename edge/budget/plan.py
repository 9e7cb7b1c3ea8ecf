"""From one number to a plan: slice, precision, where the PLE table lives, context. Arithmetic over headers alone.

Every combination is priced; of those that fit, the one with the best quality is taken. The same input gives the same
plan, and more budget never gives a worse one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edge.budget.decoding import Rates, row_seconds, usual
from edge.budget.disk import DiskSpeed
from edge.budget.price import ple_bytes, row_bytes
from edge.budget.price_ort import OrtPrices
from edge.budget.pricing import CHUNKS, chunks_of, prices_of
from edge.budget.quality import Quality, comparable, judges
from edge.budget.reads import Reads
from edge.budget.units import format_bytes
from edge.budget.wanted import (
    KV,
    refuse_other,
    usual_kv,
    wanted_contexts,
    wanted_kv,
    wanted_recipes,
    wanted_slices,
    wanted_tiers,
)
from edge.store.packages import Opened
from loaders.errors import WontFit
from loaders.formats.measured import Measured
from loaders.formats.package import Package
from loaders.formats.recipe import PRECISIONS, Recipe
from loaders.network.matformer import Slice, sliced
from loaders.network.spec import Experts, Model
from loaders.network.tensors import total
from loaders.weights import Source, table_kind

# Fewer tokens at a time read the weights of a prompt so often that it shows.
SHORT = 64
DEVICE_SLACK = 24 << 20
# What compiling a GPU kernel takes the first time it is met; later runs find it compiled on disk.
COMPILER = 128 << 20
# What a GPU run holds on the host while it loads and computes: weights on their way, ids, logits.
STAGING = 80 << 20


@dataclass(frozen=True)
class Request:
    """What the user pinned; ``auto`` and None leave it to the planner. Budgets are bytes; None is without limit.

    ``threads`` is how many compute on a CPU; None is one a core. ``lock`` keeps weights from being paged out; ``mmap``
    is whether they are used in the file's own pages, None where that is no slower.
    """

    budget: int | None = None
    ram_budget: int | None = None
    slice: str = "auto"
    precision: str = "auto"
    ple: str = "auto"
    kv: str = "auto"
    context: int | None = None
    device: str = "cpu"
    engine: str = "torch"
    threads: int | None = None
    lock: bool = False
    mmap: bool | None = None


@dataclass(frozen=True)
class Floor:
    """What is taken before any weight is loaded: interpreter and libraries, the tokenizer, on a GPU its context."""

    host: int
    device: int = 0
    tokenizer: int = 0


@dataclass(frozen=True)
class Plan(Mapping[str, Any]):
    """One priced combination; also readable as a mapping with the keys of ``edge run --json``.

    ``bytes`` are those the budget counts, by component: the process on a CPU, the device on a GPU. ``host_bytes`` are
    the process's own on a GPU, empty on a CPU. ``reads``: what a decoded token reads. ``routing``: through how many of
    how many experts it runs.
    """

    part: Slice
    recipe: Recipe
    ple: str
    kv: str
    context: int
    chunk: int
    engine: str
    device: str
    bytes: dict[str, int]
    host_bytes: dict[str, int] = field(default_factory=dict)
    quality: Quality = field(default_factory=Quality)
    reads: Reads = field(default_factory=Reads)
    experts_bytes: int = 0
    routing: tuple[int, int] = (0, 0)

    @property
    def precision(self) -> str:
        """Of the core: float32, bf16, int8 or int4."""
        return self.recipe.precision

    @property
    def slice(self) -> str:
        """The slice's name."""
        return self.part.name

    @property
    def bytes_per_token(self) -> int:
        """Weights that one decoded token reads."""
        return self.reads.total

    @property
    def read_bytes(self) -> Mapping[str, int]:
        """The same by the format they are kept in."""
        return self.reads.weights

    def kv_read_bytes(self, depth: int) -> int:
        """Keys and values that a token at position ``depth`` reads."""
        return self.reads.kv_bytes(depth, self.kv, self.slots)

    @property
    def slots(self) -> int | None:
        """Of a cache on a GPU, where a recorded step reads more of them than are filled; None elsewhere."""
        return self.context if self.device == "cuda" else None

    @property
    def total_bytes(self) -> int:
        """What is held against ``--budget``."""
        return sum(self.bytes.values())

    @property
    def host_total_bytes(self) -> int:
        """What is held against ``--ram-budget`` on a GPU; 0 on a CPU."""
        return sum(self.host_bytes.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        keys = ("slice", "precision", "ple", "kv", "context", "chunk", "engine", "device", "bytes", "total_bytes")
        plain = {key: getattr(self, key) for key in keys}
        plain["head"], plain["bytes_per_token"] = self.recipe.head, self.bytes_per_token
        plain["layers"], plain["widths"] = list(self.part.keep), list(self.part.widths)
        plain["quality"] = self.quality.as_dict()
        if self.experts_bytes:
            plain["experts_bytes"] = self.experts_bytes
        if self.host_bytes:
            plain.update(host_bytes=self.host_bytes, host_total_bytes=self.host_total_bytes)
        return plain

    def most_tps(self, bandwidth: float) -> float:
        """Tokens per second if reading weights at ``bandwidth`` bytes per second were all there is to decoding."""
        return bandwidth / max(1, self.bytes_per_token)

    def predicted_tps(
        self, bandwidth: float | None, rates: Rates | None = None, depth: int = 0, disk: DiskSpeed | None = None
    ) -> float | None:
        """Tokens per second of decoding at position ``depth``, where memory reads ``bandwidth`` bytes per second.

        ``rates``: the engine's, None for those that are usual; ``disk``: where the table is if it is on SSD, None for
        rows that the system has in memory. None where too little is known.
        """
        rates = rates or usual(self.engine, self.device)
        bandwidth = bandwidth or (rates.bandwidth if rates is not None else None)
        if rates is None or not bandwidth:
            return None
        attending = self.kv_read_bytes(depth), bandwidth, self.kv, self.reads.products(depth, self.slots)
        seconds = rates.seconds(self.read_bytes, self.reads.steps, *attending)
        return 1 / (seconds + (row_seconds(self.reads.row, disk) if self.ple == "ssd" else 0.0))

    def over(self, request: Request) -> int:
        """Bytes by which the tighter budget is passed; zero or less when the plan fits."""
        pairs = ((request.budget, self.total_bytes), (request.ram_budget, self.host_total_bytes))
        return max((need - have for have, need in pairs if have is not None), default=0)

    def label(self) -> str:
        """One line for people."""
        tier = "" if self.ple == "none" else f", PLE table {WHERE[self.ple]}"
        kv = "" if self.kv == usual_kv(self.recipe, self.engine) else f" with keys and values in {self.kv}"
        return f"{self.slice} in {self.recipe.label}{tier}, context {self.context}{kv}"

    def __getitem__(self, key: str) -> Any:
        return self.as_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_dict())

    def __len__(self) -> int:
        return len(self.as_dict())


WHERE = {"device": "on the device", "ram": "in RAM", "ssd": "on SSD"}


def enumerate_plans(source: Opened, request: Request, floor: Floor, measured: Sequence[Measured] = ()) -> list[Plan]:
    """Every combination the request leaves open, best first; contexts as one block each, longest first.

    ``measured``: what is known of the source's slices. With results of the full model among them quality is loss.
    """
    if isinstance(source, Package):
        return package_plans(source, request, floor)
    model, losses = source.model, comparable(source.model, measured)
    slices = wanted_slices(source, request.slice, losses)
    found: list[tuple[int, Plan]] = []
    for named, quality in zip(slices, judges(model, slices, losses), strict=True):
        small = sliced(model, named.slice)
        prices = prices_of(source, named.slice, small, request)
        for recipe in wanted_recipes(source, request.precision):
            row = 0 if small.ple is None else row_bytes(small, table_kind(source, recipe))
            reads = Reads.of(small, prices.weight_reads(recipe), row, model)
            facts = (quality(recipe), reads, prices.experts_bytes(recipe), routing(small))
            for order, context, kv, tier, chunk in wanted_runs(source, request, recipe):
                priced = prices.components(recipe, kv, tier, context, chunk)
                device, host = split(priced, floor, tier, request.device)
                plan = Plan(
                    named.slice, recipe, tier, kv, context, chunk, request.engine, request.device, device, host, *facts
                )
                found.append((order, plan))
    return [plan for _, plan in sorted(found, key=lambda item: (item[0], *preference(item[1])))]


def wanted_runs(source: Source, request: Request, recipe: Recipe) -> Iterator[tuple[int, int, str, str, int]]:
    """(place of the context, context, keys and values, tier, chunk): what a slice at a recipe can be run as."""
    for order, context in enumerate(wanted_contexts(source.model.context, request.context)):
        for kv in wanted_kv(source.model, recipe, request.kv):
            for tier in wanted_tiers(source, request):
                yield from ((order, context, kv, tier, min(chunk, context)) for chunk in chunks_of(request))


def package_plans(package: Package, request: Request, floor: Floor) -> list[Plan]:
    """What a package can be run as: contexts, tiers of its table and chunks; all else was decided by its export.

    Raises Unsupported for a slice, a precision or a cache that it does not have.
    """
    model, prices = package.model, OrtPrices(package)
    part = replace(package.slice, name=package.source_slice.name)
    refuse_other(package, "--slice", request.slice, (part.name, "full"))
    refuse_other(package, "--kv", request.kv, (prices.kv,))
    (recipe,) = wanted_recipes(package, request.precision)
    quality = Quality(total(model) / 1e9, "parameters", len(model.layers))
    kind, found = package.ple_kind or "int8", list[tuple[int, Plan]]()
    reads = Reads.of(model, {recipe.precision: prices.bytes_per_token()}, row_bytes(model, kind) if model.ple else 0)
    facts = (quality, reads, prices.experts_bytes, routing(model))
    for order, context in enumerate(wanted_contexts(min(model.context, package.context), request.context)):
        for tier in wanted_tiers(package, request):
            for chunk in sorted({min(chunk, context) for chunk in CHUNKS["cpu"]}):
                priced = prices.components(context, chunk, 0 if tier == "none" else ple_bytes(model, kind, tier))
                taken, host = split(priced, floor, tier, request.device)
                plan = Plan(
                    part, recipe, tier, prices.kv, context, chunk, request.engine, request.device, taken, host,
                    *facts,
                )  # fmt: skip
                found.append((order, plan))
    return [plan for _, plan in sorted(found, key=lambda item: (item[0], *preference(item[1])))]


def routing(model: Model) -> tuple[int, int]:
    """(experts a token runs through, experts there are) of the first layer that has a choice; (0, 0) without."""
    mixtures = (layer.ffn for layer in model.layers if isinstance(layer.ffn, Experts))
    return next(((ffn.active, ffn.experts) for ffn in mixtures), (0, 0))


def preference(plan: Plan) -> tuple[float, ...]:
    """Quality, then precision, keys and values, the table near rather than far, long chunks; fewer bytes on a tie.

    Chunks so short that a prompt takes many times as long come after anything but quality.
    """
    depth, score = plan.quality.rank
    return (
        -depth,
        -score,
        place(PRECISIONS, plan.precision),
        plan.chunk < min(SHORT, plan.context),
        place(KV, plan.kv),
        ("ram", "device", "ssd", "none").index(plan.ple),
        -plan.chunk,
        plan.total_bytes,
    )


def place(order: Sequence[str], name: str) -> int:
    """Where a name stands; what only packages have stands first."""
    return order.index(name) if name in order else 0


def split(priced: dict[str, int], floor: Floor, tier: str, device: str) -> tuple[dict[str, int], dict[str, int]]:
    """Components by where they lie: (counted against the budget, counted against the RAM budget)."""
    if device == "cpu":
        return {"runtime": floor.host, "tokenizer": floor.tokenizer, **priced}, {}
    # torch hands out device memory in blocks, and keeps what is left of them.
    on_device = {"runtime": floor.device + DEVICE_SLACK, **priced}
    host = {"runtime": floor.host, "tokenizer": floor.tokenizer, "compiler": COMPILER}
    if tier != "device":
        on_device.pop("ple")
        host["ple"] = priced["ple"]
    host["staging"] = STAGING
    return on_device, host


def choose(source: Opened, request: Request, floor: Floor, measured: Sequence[Measured] = ()) -> Plan:
    """The best plan that fits. Raises WontFit, naming the nearest there is, before anything is loaded."""
    return pick(enumerate_plans(source, request, floor, measured), request)


def pick(plans: Sequence[Plan], request: Request) -> Plan:
    """The first of the enumerated plans that fits. Raises WontFit."""
    for plan in plans:
        if plan.over(request) <= 0:
            return plan
    close = nearest(plans, request)
    over_host = request.ram_budget is not None and close.host_total_bytes > request.ram_budget
    flag, have = ("--ram-budget", request.ram_budget) if over_host else ("--budget", request.budget)
    need = close.host_total_bytes if over_host else close.total_bytes
    assert have is not None
    raise WontFit(
        f"nothing fits {flag} {format_bytes(have)}; the nearest is {close.label()}, "
        f"which needs {format_bytes(need)} ({need} bytes){'' if over_host else experts_text(close)}, "
        f"{format_bytes(need - have)} more",
        needed=need,
        budget=have,
        hint=f"Give at least {flag} {need}" + freer(request),
    )


def nearest(plans: Sequence[Plan], request: Request) -> Plan:
    """Where nothing fits: what would need the least more."""
    return min(plans, key=lambda plan: (plan.over(request), preference(plan)))


def experts_text(plan: Plan) -> str:
    """What of a plan its experts are; nothing for a model without."""
    if not plan.experts_bytes:
        return ""
    active, experts = plan.routing
    return f", of it {format_bytes(plan.experts_bytes)} in experts ({active} of {experts} active per token)"


def freer(request: Request) -> str:
    """What to unpin, when something was pinned."""
    pinned = [f"--{k}" for k in ("slice", "precision", "ple", "kv") if getattr(request, k) != "auto"]
    if request.context is not None:
        pinned.append("--context")
    return f", or leave {' and '.join(pinned)} to the planner" if pinned else ""
