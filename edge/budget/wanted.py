"""What a request leaves open: slices, recipes, formats of keys and values, tiers of the table, contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge.budget.quality import Losses
from edge.store.packages import Opened
from loaders.errors import Unsupported, Usage
from loaders.families import NamedSlice
from loaders.formats.pack import Pack, refuse_precision
from loaders.formats.package import Package
from loaders.formats.quant import BITS
from loaders.formats.recipe import PRECISIONS, Recipe, recipes
from loaders.network.spec import LatentAttention, Model
from loaders.slices import candidates, resolve
from loaders.weights import Source

if TYPE_CHECKING:
    from edge.budget.plan import Request

KV = ("float32", "bf16", "int8")
TIERS = ("device", "ram", "ssd")
CONTEXTS = (4096, 2048, 1024, 512)


def wanted_slices(source: Source, text: str, losses: Losses | None) -> tuple[NamedSlice, ...]:
    """All candidates, and what else was measured; or the one that was named, with its published score if it has one."""
    if text == "auto":
        found = candidates(source.model, source.family)
        return found if losses is None else (*found, *losses.unnamed(found))
    part = resolve(source.model, source.family, text)
    known = {(s.slice.keep, s.slice.widths): s for s in source.family.slices(source.model)}
    return (known.get((part.keep, part.widths), NamedSlice(part)),)


def wanted_recipes(source: Opened, text: str) -> tuple[Recipe, ...]:
    """A 16-bit checkpoint gains nothing from float32, so ``auto`` does not offer it there; a pack has what it has."""
    if isinstance(source, Package):
        refuse_other(source, "--precision", text, source.precisions)
        return (source.recipe,)
    if isinstance(source, Pack):
        offered = source.precisions
        if (text != "auto" and one_of("--precision", text, PRECISIONS) not in offered) or not offered:
            raise refuse_precision(source, text)
    else:
        offered = PRECISIONS if source.dtype == "F32" or text != "auto" else PRECISIONS[1:]
    chosen = offered if text == "auto" else (one_of("--precision", text, PRECISIONS),)
    return tuple(recipe for precision in chosen for recipe in recipes(precision))


def wanted_kv(model: Model, recipe: Recipe, text: str) -> tuple[str, ...]:
    """Those of float32 weights in float32 or bf16, of bf16 ones in bf16, of int8 and int4 ones in bf16 or int8.

    Latent caches have no int8: a model of nothing else keeps its entries in bf16, whatever is asked.
    """
    offered: tuple[str, ...] = ("bf16",)
    if text != "auto":
        offered = (one_of("--kv", text, KV),)
    elif recipe.precision == "float32":
        offered = ("float32", "bf16")
    elif recipe.precision in BITS:
        offered = ("bf16", "int8")
    latent = all(isinstance(layer.attention, LatentAttention) for layer in model.layers)
    return tuple(dict.fromkeys("bf16" if latent and kv == "int8" else kv for kv in offered))


def usual_kv(recipe: Recipe, engine: str = "torch") -> str:
    """What keys and values are kept in where nothing forces them lower."""
    if engine == "ort":
        return "float16" if recipe.precision == "float16" else "float32"
    return "float32" if recipe.precision == "float32" else "bf16"


def wanted_tiers(source: Opened, request: Request) -> tuple[str, ...]:
    """``auto`` never puts the table on a device: it would buy microseconds with gigabytes."""
    if source.model.ple is None:
        if request.ple != "auto":
            raise Usage(request.ple, field="--ple", expected="auto: this model has no per-layer embeddings")
        return ("none",)
    return ("ram", "ssd") if request.ple == "auto" else (one_of("--ple", request.ple, TIERS),)


def wanted_contexts(most: int, pinned: int | None) -> tuple[int, ...]:
    """What is asked for, or a comfortable length with shorter ones to fall back to.

    A model gets no more than it was made for, however much is asked: the plan says so.
    """
    if pinned is not None:
        if pinned < 1:
            raise Usage(pinned, field="--context", expected=f"1 or more, at most {most} for this model")
        return (min(pinned, most),)
    return tuple(dict.fromkeys(min(context, most) for context in CONTEXTS))


def one_of(flag: str, text: str, choices: tuple[str, ...]) -> str:
    """A choice, or Usage."""
    if text not in choices:
        raise Usage(text, field=flag, expected="auto or one of " + ", ".join(choices))
    return text


def refuse_other(package: Package, flag: str, text: str, held: Sequence[str]) -> None:
    """Raises Unsupported for what a package cannot be run as; 'auto' is whatever it holds."""
    if text != "auto" and text not in held:
        raise Unsupported(
            f"this package holds {held[0]}", file=package.folder, field=f"{flag} {text}",
            hint="Export the model again, or run the checkpoint itself",
        )  # fmt: skip
