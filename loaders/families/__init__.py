"""One file per family: how its config becomes a spec, and what its tensors are called; nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from loaders.errors import Unsupported
from loaders.formats.config import Config, short
from loaders.layout import Names
from loaders.network.matformer import Slice
from loaders.network.spec import Model


@dataclass(frozen=True)
class NamedSlice:
    """A published slice and the score that was published with it (MMLU, per cent), where there is one."""

    slice: Slice
    mmlu: float | None = None


def no_slices(model: Model) -> tuple[NamedSlice, ...]:
    """For families that publish none."""
    return ()


@dataclass(frozen=True)
class Family:
    """What a family file provides.

    ``names``: canonical name -> name in the file, without its prefix, or its Place there; ``{}`` stands for the layer.
    ``ignore``: patterns of tensors that are not read, and why; ``{past}`` is the number of the layer past the last.
    ``text_only``: patterns of the parts a text model never opens.
    """

    title: str
    model_types: tuple[str, ...]
    parse: Callable[[Config], Model]
    names: Names
    ignore: Mapping[str, str]
    text_only: Sequence[str] = ()
    slices: Callable[[Model], tuple[NamedSlice, ...]] = no_slices
    sliced_config: Callable[[dict[str, Any], Model, Slice], dict[str, Any]] | None = None


FILES = {
    "llama": "llama",
    "qwen3": "qwen3",
    "gemma3n": "gemma3n",
    "gemma3n_text": "gemma3n",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "qwen3_moe": "qwen3_moe",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "mistral": "mistral",
    "mistral3": "mistral",
    "gpt2": "gpt2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "llama4": "llama4",
    "llama4_text": "llama4",
}


def family_of(model_type: object, file: str) -> Family:
    """The family that reads this ``model_type``; Unsupported, listing what is, otherwise."""
    module = FILES.get(model_type) if isinstance(model_type, str) else None
    if module is None:
        raise Unsupported(
            short(repr(model_type)), file=file, field="model_type", expected="one of " + ", ".join(sorted(FILES))
        )
    return families()[module]


def families() -> dict[str, Family]:
    """Every family, by file name."""
    return {name: import_module(f"loaders.families.{name}").FAMILY for name in dict.fromkeys(FILES.values())}
