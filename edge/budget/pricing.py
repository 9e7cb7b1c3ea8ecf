"""Which prices a run has: those of the engine that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.budget import price, price_native, price_ort
from edge.budget.price import FLOAT, Prices
from edge.budget.price_native import NativePrices
from edge.store.packages import Opened
from loaders.formats.package import Package
from loaders.network.matformer import Slice
from loaders.network.ops import Want
from loaders.network.spec import Model
from loaders.weights import Source, kept

if TYPE_CHECKING:
    from edge.budget.plan import Plan, Request

# A GPU wants long chunks; on a CPU they would only cost memory.
CHUNKS = {"cpu": (256, 64, 16), "cuda": (1024, 512, 256, 64, 16), "mps": (256, 64, 16)}
# Kernels that multiply weights as they are stored gain nothing from more.
NATIVE_CHUNKS = (64, 32, 16)


def chunks_of(request: Request) -> tuple[int, ...]:
    """Most tokens of a pass, to choose from."""
    return NATIVE_CHUNKS if request.engine == "native" else CHUNKS[request.device]


def prices_of(source: Source, part: Slice, small: Model, request: Request) -> Prices:
    """What a slice ``small`` costs."""
    tensors = kept(source.model, part, small)
    if request.engine == "native":
        return NativePrices(source, part, small, tensors, request.threads)
    return Prices(source, part, small, tensors, request.device)


def logits_bytes(source: Opened, model: Model, plan: Plan, tokens: int) -> int:
    """What computing the logits of all of so many tokens takes, beside weights; ``model`` is the slice's."""
    if isinstance(source, Package):
        return price_ort.logits_bytes(source, tokens, plan.chunk)
    if plan.engine == "native":
        size = program_size(source, model, plan, "all")
        return price_native.logits_bytes(model, size, tokens, plan.chunk, plan.kv)
    return price.logits_bytes(model, tokens, plan.chunk, plan.kv)


def pass_bytes(source: Opened, model: Model, plan: Plan, tokens: int, *, every: bool) -> int:
    """What a pass over so many tokens holds, with the logits of ``every`` one of them or of the last."""
    if isinstance(source, Package):
        return price_ort.activation_bytes(source, tokens, plan.context, tokens if every else 1)
    logits = tokens * model.vocab * FLOAT if every else 0
    if plan.engine == "native":
        size = program_size(source, model, plan, "all" if every else "last")
        scratch = price_native.scratch_floats(model, plan.context, plan.chunk)
        working = price_native.working_bytes(model, size, scratch, plan.chunk, 1)
        # What sampling would make of one token's are not there with those of every one.
        return working + (logits - price_native.SAMPLING * model.vocab * FLOAT if every else 0)
    held = price.activation_bytes(model, tokens, plan.context, plan.kv, plan.device, every=every)
    return held + logits * (1 if model.softcap is None else 3)


def program_size(source: Source, model: Model, plan: Plan, want: Want) -> price_native.Size:
    """Of the program that runs a plan."""
    tensors = kept(source.model, plan.part, model)
    return price_native.essence(model).size(lambda name: tensors[name].stored(plan.recipe), want)
