"""Which engine runs what is no package, and on which device: decided before any of their libraries is imported."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from edge.budget.nvml import device_used
from edge.engine.native import library
from loaders.errors import Unsupported, Usage

ENGINES = ("auto", "native", "torch", "ort")
DEVICES = ("auto", "cpu", "cuda", "mps")
INSTALL = "Install torch: pip install torch"
# What CUDA takes for "no GPU".
HIDDEN = ("", "-1")


@dataclass(frozen=True)
class Choice:
    """``device`` may still be 'auto' where torch alone can say. ``note``: why it is not what it usually would be."""

    engine: str
    device: str
    note: str | None = None


def choose(engine: str, device: str) -> Choice:
    """What 'auto' comes to here. Raises Usage for a name that is none, Unsupported for what cannot run here."""
    if engine not in ENGINES:
        raise Usage(engine, field="--engine", expected="auto, native, torch or ort")
    if device not in DEVICES:
        raise Usage(device, field="--device", expected="auto, cpu, cuda or mps")
    if engine == "ort":
        return Choice(engine, device)
    if engine == "native":
        return native(device)
    if device == "auto":
        device = "auto" if installed() and (engine == "torch" or has_gpu()) else "cpu"
    if engine == "torch" or device != "cpu":
        return torch(device)
    if library.available():
        return Choice("native", device)
    reason = f"the native engine is not here: {library.why_not()}"
    if not installed():
        raise Unsupported(reason, field="--engine", hint=f"Or {INSTALL[0].lower()}{INSTALL[1:]}")
    return Choice("torch", device, f"engine: torch, as {reason}")


def native(device: str) -> Choice:
    """Asked for by name. Raises Unsupported on a GPU, and where it was not compiled."""
    if device not in ("auto", "cpu"):
        raise Unsupported(f"the native engine on {device}", field="--device", expected="cpu", hint="Use --engine torch")
    if not library.available():
        raise Unsupported("the native engine is not here", field="--engine native", hint=library.why_not())
    return Choice("native", "cpu")


def torch(device: str) -> Choice:
    """torch, on a device it will look for itself. Raises Unsupported where it is not installed."""
    if not installed():
        field = f"--device {device}" if device in ("cuda", "mps") else "--engine torch"
        raise Unsupported("torch is not installed", field=field, hint=INSTALL)
    return Choice("torch", device)


def installed() -> bool:
    """Whether there is a torch to import."""
    try:
        return "torch" in sys.modules or find_spec("torch") is not None
    except (ImportError, ValueError):
        return False


def has_gpu() -> bool:
    """Whether there is a GPU that torch may know how to use."""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in HIDDEN and device_used() is not None
