"""``edge inspect``: what a checkpoint is, one row per run of equal layers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from edge.budget.price import kv_bytes
from edge.budget.price_ort import kept_in
from edge.budget.units import format_bytes
from edge.cli.layers import Row, layer_rows, layer_table, router_text
from edge.cli.model import say_demo, shapes_path
from edge.cli.show import clipped, parameters, print_json, stdout, weights_note
from edge.session import open_source
from edge.store.measured import measured
from edge.store.packages import Opened, weighty
from loaders.checkpoint import Checkpoint
from loaders.errors import printable
from loaders.formats.measured import Measured, plain
from loaders.formats.pack import Pack
from loaders.formats.package import Package
from loaders.network.matformer import sliced
from loaders.network.spec import Experts, Model
from loaders.network.tensors import PLE_TABLE, active, core, total
from loaders.slices import candidates
from loaders.synthetic_pack import is_random

# Tokens that the headline prices a context at.
TOKENS = 4096
MOST_MEASURED = 12


@click.command("inspect")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str | None, as_json: bool) -> None:
    """Show what MODEL is: layers, mechanisms, tensors, bytes, slices. Reads headers only.

    A config.json will do, and the name of a published one. Without MODEL it is the demo model that ships with edge.
    """
    path = shapes_path(model)
    checkpoint = open_source(path, shapes=True)
    facts, rows = summary(checkpoint), layer_rows(checkpoint.model, checkpoint.stored)
    results = measured(checkpoint)
    if as_json:
        count = len(checkpoint.model.layers)
        layers = [row.as_dict(count) for row in rows]
        print_json(
            {
                "model": printable(path),
                **facts,
                "measured": plain(results),
                "layers": layers,
                "spec": asdict(checkpoint.model),
            }
        )
        return
    say_demo(model, checkpoint.model)
    console = stdout()
    for name, text in headline(checkpoint, facts, rows):
        console.print(f"{name:<14} {text}", markup=False)
    console.print()
    console.print(layer_table(checkpoint.model, rows))
    if checkpoint.model.nested is not None and not isinstance(checkpoint, Package):
        console.print()
        console.print(slice_table(checkpoint))
    if results:
        console.print()
        console.print(measured_table(results))


def summary(checkpoint: Opened) -> dict[str, Any]:
    """Counts and bytes, as data."""
    model = checkpoint.model
    stored = checkpoint.stored
    plain, exported = isinstance(checkpoint, Checkpoint), isinstance(checkpoint, Package)
    kv = kept_in(checkpoint.contract) if isinstance(checkpoint, Package) else "bf16"
    return {
        "family": model.family,
        "dtype": checkpoint.dtype,
        "weights": weighty(checkpoint),
        "parameters": total(model),
        "active_parameters": active(model),
        "core_parameters": core(model),
        "text_bytes": sum(stored.values()),
        "ple_bytes": stored.get(PLE_TABLE, 0),
        "ple_row_bytes": stored.get(PLE_TABLE, 0) // model.ple.rows if model.ple else 0,
        "embed_bytes": stored["embed"],
        "skipped_bytes": checkpoint.skipped_bytes if plain else 0,
        "ignored_tensors": len(checkpoint.ignored) if plain else 0,
        "pack": {"parts": dict(checkpoint.sizes()), "source": checkpoint.source, "random": is_random(checkpoint)}
        if isinstance(checkpoint, Pack)
        else None,
        "package": package_facts(checkpoint) if isinstance(checkpoint, Package) else None,
        "kv": kv,
        "kv_bytes_per_token": kv_bytes(model, 1, kv),
        "kv_bytes": {
            "tokens": min(TOKENS, model.context),
            "bytes": kv_bytes(model, min(TOKENS, model.context), kv),
        },
        "context": model.context,
        "vocab": model.vocab,
        "slices": [s.slice.name for s in candidates(model, checkpoint.family)] if not exported else [],
        "notes": [*weights_note(checkpoint), *(checkpoint.shards.notes if plain else ())],
    }


def package_facts(package: Package) -> dict[str, Any]:
    """What an exported package says of itself, as data."""
    facts = package.facts
    names = ("profile", "layout", "precision", "head", "context", "opset", "min_ort", "graph", "source", "parity")
    return {**{name: getattr(facts, name) for name in names}, "slice": facts.slice.name, "files": package.sizes()}


def headline(checkpoint: Opened, facts: dict[str, Any], rows: list[Row]) -> list[tuple[str, str]]:
    """The facts in words."""
    model, cache = checkpoint.model, facts["kv_bytes"]
    part = (
        f"{facts['active_parameters']:,} active per token, " if facts["active_parameters"] < facts["parameters"] else ""
    )
    lines = [
        ("model", f"{checkpoint.family.title}, {len(model.layers)} layers, dim {model.dim}, vocab {model.vocab:,}"),
        ("parameters", f"{facts['parameters']:,} ({part}{facts['core_parameters']:,} core: without embeddings)"),
        (
            "bytes",
            f"{format_bytes(facts['text_bytes'])} {checkpoint.dtype}, "
            f"token embedding {format_bytes(facts['embed_bytes'])} of them",
        ),
        (
            "context",
            f"{model.context:,} tokens; keys and values in {facts['kv']}: "
            f"{format_bytes(facts['kv_bytes_per_token'])} a token, "
            f"{format_bytes(cache['bytes'])} for {cache['tokens']:,}",
        ),
        ("head", "tied to the token embedding" if model.tied else "its own tensor"),
        *mechanisms(checkpoint, facts, rows),
    ]
    if facts["skipped_bytes"]:
        lines.append(("not opened", f"{format_bytes(facts['skipped_bytes'])} of vision and audio"))
    if facts["ignored_tensors"]:
        lines.append(("unused", f"{facts['ignored_tensors']} tensors that this family carries in vain"))
    if facts["pack"] is not None:
        held = ", ".join(f"{part} {format_bytes(size)}" for part, size in facts["pack"]["parts"].items())
        lines.append(
            ("pack", f"{held}; {'random weights' if facts['pack']['random'] else 'of ' + facts['pack']['source']}")
        )
    if facts["package"] is not None:
        package = facts["package"]
        text = f"profile {package['profile']}, layout {package['layout']}, ONNX Runtime {package['min_ort']} or later; "
        text += f"{package['slice']} of {package['source']}, caches for {package['context']:,} tokens"
        lines.append(("package", text))
    return lines + [("note", note) for note in facts["notes"]]


def mechanisms(checkpoint: Opened, facts: dict[str, Any], rows: list[Row]) -> list[tuple[str, str]]:
    """What this model has beside its layers, or alike in all of them."""
    model = checkpoint.model
    lines = []
    routers = {row.layer.ffn.router for row in rows if isinstance(row.layer.ffn, Experts)}
    lines += [("router", router_text(router)) for router in sorted(routers, key=router_text)]
    if model.positions is not None:
        lines.append(("positions", f"a learned table of {model.positions:,}, added to the embeddings"))
    if model.ple is not None:
        row = format_bytes(facts["ple_row_bytes"])
        lines.append(
            ("PLE table", f"{format_bytes(facts['ple_bytes'])}, {model.ple.rows:,} rows of {row}, one read per token")
        )
    if model.altup is not None:
        laurel = f", LAuReL rank {model.laurel.rank}" if model.laurel else ""
        lines.append(("streams", f"{model.altup.streams} (AltUp){laurel}"))
    return lines


def slice_table(checkpoint: Opened) -> Table:
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


def measured_table(results: tuple[Measured, ...]) -> Table:
    """What was measured, text by text, the best first; of many the best alone."""
    left = len(results) - MOST_MEASURED
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    table.caption = f"and {left} more: --json has them all" if left > 0 else None
    for name in ("measured", "precision", "loss", "bits/byte", "KL", "top-1", "tokens", "context", "text"):
        table.add_column(name, justify="left" if name in ("measured", "precision", "text") else "right", no_wrap=True)
    for m in sorted(results, key=lambda m: (m.text, m.context, m.loss))[:MOST_MEASURED]:
        compared = ("-" if m.kl is None else f"{m.kl:.4f}", "-" if m.top1 is None else f"{m.top1:.1%}")
        figures = (f"{m.loss:.3f}", f"{m.bits_per_byte:.3f}", *compared, f"{m.tokens:,}", f"{m.context:,}", m.text[:8])
        table.add_row(Text(clipped(m.name)), m.recipe.label, *figures)
    return table
