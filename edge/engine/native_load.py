"""Realises a plan in the native engine: weights mapped or read, the table's rows, caches, programs."""

from __future__ import annotations

from edge.budget.memory import Ledger
from edge.budget.plan import Plan
from edge.engine.native_engine import NativeEngine
from edge.engine.native_lock import lock
from edge.engine.native_ple import open_rows
from edge.engine.native_weights import load_weights
from edge.store.ple import Counters
from loaders.formats.sharded import Notify
from loaders.network.matformer import parts
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE
from loaders.weights import Source, kept, table_kind


def load_native(
    source: Source, model: Model, plan: Plan, ledger: Ledger, notify: Notify, locked: bool, mapped: bool | None = None
) -> tuple[NativeEngine, Counters | None]:
    """``model`` is the slice's; ``locked`` weights stay in memory; ``mapped`` says how they get there.

    Raises ReadFailed, BadCheckpoint, OverBudget, NotPermitted for memory that cannot be locked.
    """
    wanted, rows = parts(source.model, plan.part), None
    if PLE_TABLE in wanted:
        ledger.take("ple", plan.bytes["ple"])
        rows = open_rows(source, wanted[PLE_TABLE], plan.ple, plan.bytes["ple"], notify)
    tensors = kept(source.model, plan.part, model)
    try:
        weights = load_weights(source, tensors, wanted, plan.recipe, ledger, notify, mapped)
        if locked:
            lock(weights.ranges())
    except BaseException:
        if rows is not None:
            rows.close()
        raise
    formats = {name: tensor.stored(plan.recipe) for name, tensor in tensors.items()}
    if rows is not None:
        formats[PLE_TABLE] = table_kind(source, plan.recipe)
    ledger.take("kv", plan.bytes["kv"])
    ledger.take("activations", plan.bytes["activations"])
    engine = NativeEngine(model, weights, formats.__getitem__, rows, context=plan.context, chunk=plan.chunk, kv=plan.kv)
    return engine, None if rows is None else rows.counters
