"""``edge synth``: random weights at the shapes of a config, to measure before anything is downloaded."""

from __future__ import annotations

import time

import click

from edge.budget.units import format_bytes, parse_bytes
from edge.cli.show import parameters, progress, stderr
from loaders.checkpoint import Checkpoint
from loaders.errors import Usage
from loaders.formats.synthetic import write_random
from loaders.network.tensors import total


@click.command("synth", short_help="Write random weights at the shapes of a config.json.")
@click.option("--config", required=True, metavar="FILE", help="A config.json, or the folder that holds one.")
@click.option("-o", "--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Other seeds, other values.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(["bf16", "f16", "f32"]))
@click.option("--shards", type=click.IntRange(min=1), metavar="N", help="Write this many weight files.")
@click.option("--shard-size", metavar="SIZE", help="Write weight files of at most this size: 2GB, 512MiB.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
def command(
    config: str, output: str, seed: int, dtype: str, shards: int | None, shard_size: str | None, quiet: bool
) -> None:
    """Write a checkpoint folder with random weights at the true shapes of a config.json."""
    if shards is not None and shard_size is not None:
        raise Usage("given together", field="--shards, --shard-size", expected="one of them")
    console, start = stderr(), time.perf_counter()
    with progress(console, not quiet) as notify:
        size = write_random(
            config,
            output,
            seed=seed,
            dtype=dtype.upper(),
            shard_bytes=None if shard_size is None else parse_bytes(shard_size, "--shard-size"),
            shards=shards,
            notify=notify,
        )
    if not quiet:
        checkpoint = Checkpoint.open(output)
        made = f"{checkpoint.family.title}, {parameters(total(checkpoint.model) / 1e9)} random parameters"
        seconds = time.perf_counter() - start
        console.print(f"{output}: {made}, {format_bytes(size)} {dtype}, {seconds:.1f} s", markup=False)
