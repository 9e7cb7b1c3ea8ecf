"""``edge inspect``: what a checkpoint is, one row per run of equal layers."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from edge.budget.price import kv_bytes
from edge.budget.units import format_bytes
from edge.cli.show import parameters, print_json, stdout
from edge.session import open_source
from edge.store.weights import Source
from loaders.checkpoint import Checkpoint
from loaders.network.matformer import sliced
from loaders.network.spec import Layer, Model, Rope
from loaders.network.tensors import PLE_TABLE, core, tensors, total
from loaders.slices import candidates


@click.command("inspect")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str, as_json: bool) -> None:
    """Show what MODEL is: layers, mechanisms, tensors, bytes, slices. Reads headers only."""
    checkpoint = open_source(Path(model))
    facts = summary(checkpoint)
    if as_json:
        print_json({**facts, "spec": asdict(checkpoint.model)})
        return
    console = stdout()
    for name, text in headline(checkpoint, facts):
        console.print(f"{name:<14} {text}", markup=False)
    console.print()
    console.print(layer_table(checkpoint))
    if checkpoint.model.nested is not None:
        console.print()
        console.print(slice_table(checkpoint))


def summary(checkpoint: Source) -> dict[str, Any]:
    """Counts and bytes, as data."""
    model = checkpoint.model
    stored = checkpoint.stored
    plain = isinstance(checkpoint, Checkpoint)
    return {
        "family": model.family,
        "dtype": checkpoint.dtype,
        "parameters": total(model),
        "core_parameters": core(model),
        "text_bytes": sum(stored.values()),
        "ple_bytes": stored.get(PLE_TABLE, 0),
        "ple_row_bytes": stored.get(PLE_TABLE, 0) // model.ple.rows if model.ple else 0,
        "embed_bytes": stored["embed"],
        "skipped_bytes": checkpoint.skipped_bytes if plain else 0,
        "ignored_tensors": len(checkpoint.ignored) if plain else 0,
        "pack": None if plain else {"parts": dict(checkpoint.sizes()), "source": checkpoint.source},
        "kv_bytes_per_token": kv_bytes(model, 1, "bf16"),
        "context": model.context,
        "vocab": model.vocab,
        "slices": [s.slice.name for s in candidates(model, checkpoint.family)],
        "notes": list(checkpoint.shards.notes) if plain else [],
    }


def headline(checkpoint: Source, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts in words."""
    model = checkpoint.model
    embed, cache = format_bytes(facts["embed_bytes"]), format_bytes(kv_bytes(model, min(4096, model.context), "bf16"))
    lines = [
        ("model", f"{checkpoint.family.title}, {len(model.layers)} layers, dim {model.dim}, vocab {model.vocab:,}"),
        ("parameters", f"{facts['parameters']:,} ({facts['core_parameters']:,} core: without embeddings)"),
        ("bytes", f"{format_bytes(facts['text_bytes'])} {checkpoint.dtype}, token embedding {embed} of them"),
        ("context", f"{model.context:,} tokens; keys and values of {min(4096, model.context)} in bf16: {cache}"),
        ("head", "tied to the token embedding" if model.tied else "its own tensor"),
    ]
    if model.ple is not None:
        row = format_bytes(facts["ple_row_bytes"])
        lines.append(
            ("PLE table", f"{format_bytes(facts['ple_bytes'])}, {model.ple.rows:,} rows of {row}, one read per token")
        )
    if model.altup is not None:
        lines.append(
            (
                "streams",
                f"{model.altup.streams} (AltUp)" + (f", LAuReL rank {model.laurel.rank}" if model.laurel else ""),
            )
        )
    if facts["skipped_bytes"]:
        lines.append(("not opened", f"{format_bytes(facts['skipped_bytes'])} of vision and audio"))
    if facts["ignored_tensors"]:
        lines.append(("unused", f"{facts['ignored_tensors']} tensors that this family carries in vain"))
    if facts["pack"] is not None:
        held = ", ".join(f"{part} {format_bytes(size)}" for part, size in facts["pack"]["parts"].items())
        lines.append(("pack", f"{held}; of {facts['pack']['source']}"))
    return lines + [("note", note) for note in facts["notes"]]


def layer_table(checkpoint: Source) -> Table:
    """One row per run of equal layers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = (
        "layers",
        "attention",
        "heads",
        "sees",
        "RoPE",
        "keys from",
        "FFN",
        "sparsity",
        "norms",
        "parameters",
        "bytes",
    )
    for name in names:
        table.add_column(name, justify="left" if name in ("layers", "attention", "RoPE", "norms") else "right")
    model = checkpoint.model
    for first, last, layer in model.runs:
        count, size = run_size(checkpoint, first, last)
        a = layer.attention
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            "full" if a.window is None else "sliding",
            f"{a.heads}/{a.kv_heads} x {a.head_dim}",
            "all" if a.window is None else str(a.window),
            rope_text(a.rope) + (", QK-norm" if a.qk_norm else "") + (", V-norm" if a.v_norm else ""),
            "own" if a.kv_from is None else f"layer {a.kv_from}",
            f"{layer.ffn.width} {layer.ffn.activation}",
            f"{layer.ffn.sparsity:.0%}" if layer.ffn.sparsity else "-",
            norm_text(layer),
            parameters(count / 1e9),
            format_bytes(size),
        )
    return table


def run_size(checkpoint: Source, first: int, last: int) -> tuple[int, int]:
    """(parameters, stored bytes) of a run of layers."""
    prefixes = tuple(f"layers.{i}." for i in range(first, last + 1))
    shapes = {name: shape for name, shape in tensors(checkpoint.model).items() if name.startswith(prefixes)}
    return sum(math.prod(s) for s in shapes.values()), sum(checkpoint.stored[name] for name in shapes)


def rope_text(rope: Rope | None) -> str:
    """Base and scaling."""
    if rope is None:
        return "none"
    return f"{rope.theta:g}" + (f" x{rope.scaling.factor:g}" if rope.scaling else "")


def norm_text(layer: Layer) -> str:
    """Where the residual and its branches are normalised."""
    return "before and after" if "attn_out" in layer.norms and "attn_in" in layer.norms else "before"


def slice_table(checkpoint: Source) -> Table:
    """The slices a planner may choose."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("slice", "parameters", "core", "MMLU", "what it keeps"):
        table.add_column(name, justify="right" if name in ("parameters", "core", "MMLU") else "left")
    for item in candidates(checkpoint.model, checkpoint.family):
        small: Model = sliced(checkpoint.model, item.slice)
        mmlu = "-" if item.mmlu is None else f"{item.mmlu:.1f}%"
        table.add_row(
            item.slice.name, parameters(total(small) / 1e9), parameters(core(small) / 1e9), mmlu, item.slice.describe()
        )
    return table
