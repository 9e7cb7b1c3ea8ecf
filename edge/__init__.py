"""edge runs the best language model that fits in the memory you have.

import edge
session = edge.load("path/to/checkpoint", budget="2GB")
for event in session.generate("Once upon a time", max_tokens=64):
    print(event.text, end="")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load"]

if TYPE_CHECKING:
    from edge.session import load


def __getattr__(name: str) -> Any:
    """``import edge`` stays free: what loads models is imported when it is first used."""
    if name == "load":
        from edge.session import load

        return load
    raise AttributeError(f"module 'edge' has no attribute {name!r}")
