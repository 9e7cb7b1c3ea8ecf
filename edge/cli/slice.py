"""``edge slice``: a slice as a checkpoint of its own, for every tool that reads Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import click

from edge.budget.units import format_bytes
from edge.cli.show import progress, stderr
from edge.session import open_source
from loaders.checkpoint import Checkpoint
from loaders.errors import Usage
from loaders.formats.pack import Pack
from loaders.rewrite import write_slice
from loaders.slices import resolve


@click.command("slice", short_help="Write a slice of MODEL as a checkpoint of its own.")
@click.argument("model")
@click.option("--slice", "name", required=True, metavar="NAME", help="E2B, half, ffn=8192x20,16384x15, a JSON file.")
@click.option("-o", "--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
def command(model: str, name: str, output: str, quiet: bool) -> None:
    """Write a slice of MODEL as a checkpoint folder that transformers loads."""
    console = stderr()
    checkpoint = open_source(Path(model))
    if not isinstance(checkpoint, Checkpoint):
        what = "a pack" if isinstance(checkpoint, Pack) else "an exported package"
        raise Usage(what, field="MODEL", expected="a checkpoint folder: slices of a pack are chosen when it is run")
    part = resolve(checkpoint.model, checkpoint.family, name)
    with progress(console, not quiet) as notify:
        size = write_slice(checkpoint, part, Path(output), notify)
    if not quiet:
        console.print(f"{output}: {part.name}, {part.describe()}, {format_bytes(size)}", markup=False)
