"""Engines compute; each lives in files of its own, and its library is imported only when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from edge.budget.memory import Ledger, bound_malloc
from edge.budget.nvml import device_used
from edge.budget.watch import Tree
from edge.engine.choice import Choice, choose
from edge.engine.native import library
from edge.engine.threads import tell, thread_count
from edge.store.packages import Opened, verify
from edge.store.ple import Counters
from loaders.errors import Unsupported
from loaders.formats.package import Package
from loaders.formats.sharded import Notify
from loaders.network.matformer import parts
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE
from loaders.weights import Source, kept

if TYPE_CHECKING:
    from edge.budget.plan import Floor, Plan
    from edge.engine.base import Engine

MIB = 1 << 20
# A GPU's floor is rounded up to this, a host's to a MiB: noise of a few pages must not change a plan.
STEP = 4 * MIB


@dataclass(frozen=True)
class Runtime:
    """An engine's libraries, loaded and warmed up, and the device they will use.

    ``threads``: how many compute on a CPU. ``note``: why another engine runs than usually would.
    """

    engine: str
    device: str
    handle: Any
    device_before: int | None
    threads: int = 1
    note: str | None = None

    def floor(self) -> Floor:
        """What the process tree holds now, before any weight, rounded up: all that the budget will count."""
        from edge.budget.plan import Floor  # which needs the engines' programs for its prices

        with Tree() as tree:
            host = -(-(tree() + MIB) // MIB) * MIB
        return Floor(host, -(-(self.device_delta() or 0) // STEP) * STEP)

    def device_delta(self) -> int | None:
        """Bytes in use on the GPU beyond what was in use before this process touched it; None on a CPU."""
        if self.device_before is None:
            return None
        return max(0, (device_used() or 0) - self.device_before)


def start(engine: str, device: str, count: int | None = None, lock: bool = False) -> Runtime:
    """Loads and warms up an engine, which computes with ``count`` threads, or as many as there are cores.

    Raises Usage or Unsupported for one that is not here, or that cannot ``lock`` weights.
    """
    tell(count)
    chosen = choose(engine, device)
    if lock and chosen.engine != "native":
        raise Unsupported(f"the {chosen.engine} engine", field="--lock", expected="the native engine")
    bound_malloc()
    if chosen.engine == "ort":
        return start_ort(device)
    if chosen.engine == "native":
        return start_native()
    runtime = start_torch(chosen, count)
    if engine == device == "auto" and runtime.device == "cpu" and library.available():
        return start_native()  # a GPU that torch cannot use
    return runtime


def start_native() -> Runtime:
    """The compiled engine."""
    from edge.engine.native_start import use, warm_up

    use(thread_count())
    warm_up()
    return Runtime("native", "cpu", None, None, thread_count())


def start_torch(chosen: Choice, count: int | None) -> Runtime:
    """torch, on the device it finds."""
    before = device_before()
    from edge.engine.torch_start import pick_device, use_threads, warm_up

    picked = pick_device(chosen.device)
    if count is not None:
        use_threads(count)
    warm_up(picked)
    return Runtime("torch", picked.type, picked, before if picked.type == "cuda" else None, thread_count(), chosen.note)


def start_ort(device: str) -> Runtime:
    """ONNX Runtime. Raises Unsupported where it is not installed, or for a device that is not the CPU."""
    try:
        from edge.engine.ort_start import pick_device, warm_up
    except ImportError as error:
        hint = "Install onnxruntime: exported packages run in it"
        raise Unsupported(f"no ONNX Runtime: {error}", field="--engine ort", hint=hint) from None
    picked = pick_device(device)
    warm_up()
    return Runtime("ort", picked, picked, None, thread_count())


@cache
def device_before() -> int | None:
    """Bytes in use on the GPU before this process had a context there: asked once, before the first engine starts."""
    return device_used()


def load(
    runtime: Runtime,
    source: Opened,
    model: Model,
    plan: Plan,
    ledger: Ledger,
    notify: Notify,
    room: int | None = None,
    lock: bool = False,
    mmap: bool | None = None,
) -> tuple[Engine, Counters | None]:
    """Realises a plan: reads the slice's windows, opens its table, makes the cache. ``model`` is the slice's; ``room``
    the bytes that may still be taken to prepare what later runs find done, None without a limit; ``lock`` keeps
    weights from being swapped out, ``mmap`` has them used where their file is mapped (the native engine alone).

    Raises OverBudget where a GPU has less than the plan says, NotPermitted where the system locks no memory.
    """
    if isinstance(source, Package):
        return realise_package(source, plan, ledger, notify, room)
    if runtime.engine == "native":
        from edge.engine.native_load import load_native

        return load_native(source, model, plan, ledger, notify, lock, mmap)
    from edge.engine import cuda_memory

    if runtime.device == "cuda":
        cuda_memory.bound(ledger.budget, runtime.device_delta() or 0)
    with cuda_memory.refusals():
        return realise(runtime, source, model, plan, ledger, notify)


def realise(
    runtime: Runtime, source: Source, model: Model, plan: Plan, ledger: Ledger, notify: Notify
) -> tuple[Engine, Counters | None]:
    """:func:`load`, within whatever memory there is."""
    from edge.engine.torch import TorchEngine
    from edge.engine.torch_ple import open_rows
    from edge.engine.torch_weights import load_weights

    wanted, rows = parts(source.model, plan.part), None
    if PLE_TABLE in wanted:
        held = plan.bytes.get("ple", plan.host_bytes.get("ple", 0))
        ledger.take("ple", held)
        rows = open_rows(source, wanted[PLE_TABLE], len(model.layers), plan.ple, held, runtime.handle)
    tensors = kept(source.model, plan.part, model)
    weights = load_weights(source, tensors, wanted, plan.recipe, runtime.handle, ledger, notify)
    ledger.take("kv", plan.bytes["kv"])
    ledger.take("activations", plan.bytes["activations"])
    engine = TorchEngine(
        model, weights, rows, context=plan.context, chunk=plan.chunk, kv=plan.kv, device=runtime.handle
    )
    return engine, None if rows is None else rows.counters


def realise_package(
    package: Package, plan: Plan, ledger: Ledger, notify: Notify, room: int | None
) -> tuple[Engine, Counters | None]:
    """:func:`load` of an exported package, once its sums are known to be right."""
    from edge.engine.ort_load import load_package

    verify(package, notify)
    return load_package(package, plan, ledger, notify, room)
