"""``edge synth``: random weights at the shapes of a config, to measure before anything is downloaded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from edge.budget.units import format_bytes, parse_bytes
from edge.cli.show import parameters, progress, stderr
from loaders.errors import Usage
from loaders.formats.quant import BITS
from loaders.formats.sharded import Notify
from loaders.formats.synthetic import read_model, write_random
from loaders.network.tensors import total
from loaders.published import config_path, names
from loaders.synthetic_pack import write_random_pack

# Of checkpoints alone: packs know neither.
CHECKPOINT = {"dtype": "--dtype", "shards": "--shards", "shard_size": "--shard-size"}


@click.command(
    "synth",
    short_help="Write random weights at the shapes of a config.json.",
    epilog="Published configurations: " + ", ".join(names()) + ".",
)
@click.option(
    "--config",
    required=True,
    metavar="NAME|FILE",
    help="A published name, a config.json, or the folder that holds one.",
)
@click.option("-o", "--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@click.option("--pack", multiple=True, metavar="LIST", help="Write a pack instead, with these cores: int8, int4.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Other seeds, other values.")
@click.option("--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="Of a checkpoint.  [default: bf16]")
@click.option("--shards", type=click.IntRange(min=1), metavar="N", help="Write this many weight files.")
@click.option("--shard-size", metavar="SIZE", help="Write weight files of at most this size: 2GB, 512MiB.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
def command(config: str, output: str, pack: tuple[str, ...], seed: int, quiet: bool, **flags: Any) -> None:
    """Write a checkpoint folder with random weights at the true shapes of a config.json.

    With --pack it is a pack, which runs at once: faster to write than a checkpoint and never quantized. It has no
    tokenizer.
    """
    check(pack, flags)
    path, start = config_path(config), time.perf_counter()
    with progress(stderr(), not quiet) as notify:
        if pack:
            cores = precisions(pack)
            size, what = write_random_pack(path, output, cores, seed=seed, notify=notify), ", ".join(cores)
        else:
            size, what = checkpoint(path, output, seed, flags, notify), flags["dtype"] or "bf16"
    if not quiet:
        _, family, model = read_model(path)
        made = f"{family.title}, {parameters(total(model) / 1e9)} random parameters"
        seconds = time.perf_counter() - start
        stderr().print(f"{output}: {made}, {format_bytes(size)} {what}, {seconds:.1f} s", markup=False)


def check(pack: tuple[str, ...], flags: dict[str, Any]) -> None:
    """Raises Usage for flags that do not go together."""
    if flags["shards"] is not None and flags["shard_size"] is not None:
        raise Usage("given together", field="--shards, --shard-size", expected="one of them")
    given = [flag for name, flag in CHECKPOINT.items() if flags[name] is not None]
    if pack and given:
        raise Usage("given together", field=f"--pack, {given[0]}", expected="one of them: a pack has its own formats")


def precisions(texts: tuple[str, ...]) -> tuple[str, ...]:
    """'int4,int8', or one at a time, in the order packs hold them. Raises Usage."""
    asked = {name.strip() for text in texts for name in text.split(",")}
    if asked - set(BITS):
        raise Usage(",".join(texts), field="--pack", expected="int8, int4 or both, with a comma")
    return tuple(name for name in BITS if name in asked)


def checkpoint(config: Path, output: str, seed: int, flags: dict[str, Any], notify: Notify) -> int:
    """A checkpoint folder; bytes of its tensors."""
    size = flags["shard_size"]
    return write_random(
        config,
        output,
        seed=seed,
        dtype=(flags["dtype"] or "bf16").upper(),
        shard_bytes=None if size is None else parse_bytes(size, "--shard-size"),
        shards=flags["shards"],
        notify=notify,
    )
