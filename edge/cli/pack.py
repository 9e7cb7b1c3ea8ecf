"""``edge pack``: a checkpoint in edge's own form, made ahead of time, checked, listed or removed."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from edge.budget.units import format_bytes
from edge.cli.show import print_json, progress, stderr, stdout
from edge.session import open_source
from edge.store import packs
from edge.store.cache import in_memory
from loaders.checkpoint import Checkpoint
from loaders.errors import Usage, printable
from loaders.formats.pack import Pack, parts_for
from loaders.formats.quant import BITS
from loaders.packing import write_pack


@click.command("pack", short_help="Quantize MODEL once; later runs start from that.")
@click.argument("model", required=False)
@click.option("-o", "--output", metavar="DIR", help="A folder that does not exist yet.  [default: the user's cache]")
@click.option(
    "--precision", default=",".join(BITS), show_default=True, metavar="LIST", help="The cores to hold: int8, int4."
)
@click.option(
    "--ple", default="int8", show_default=True, type=click.Choice(list(BITS)), help="Of per-layer embeddings."
)
@click.option("--verify", is_flag=True, help="Read MODEL, a pack or its key, and compare every sum.")
@click.option("--list", "listed", is_flag=True, help="List the packs in the cache.")
@click.option("--remove", metavar="KEY", help="Remove a pack from the cache: its key, or its checkpoint's folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
def command(
    model: str | None,
    output: str | None,
    precision: str,
    ple: str,
    verify: bool,
    listed: bool,
    remove: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Quantize MODEL once into a pack: later runs start from it, at any budget, without the checkpoint."""
    asked = sum((verify, listed, remove is not None))
    if asked > 1 or (asked and output is not None):
        raise Usage("several things at once", field="edge pack", expected="one of -o, --verify, --list, --remove")
    if listed:
        show_list(as_json)
    elif remove is not None:
        folder = packs.named(remove)
        packs.remove(folder)
        if as_json:
            print_json({"removed": str(folder)})
        say(f"removed {folder}", quiet or as_json)
    elif model is None:
        raise Usage("no model", field="MODEL", expected="a checkpoint folder")
    elif verify:
        check(model, as_json, quiet)
    else:
        make(Path(model), output, wanted(precision), ple, as_json, quiet)


def wanted(text: str) -> tuple[str, ...]:
    """'int8,int4' in the order packs hold them."""
    names = {name.strip() for name in text.split(",")}
    if not names or names - set(BITS):
        raise Usage(text, field="--precision", expected="int8, int4 or both, with a comma")
    return tuple(name for name in BITS if name in names)


def make(model: Path, output: str | None, precisions: tuple[str, ...], ple: str, as_json: bool, quiet: bool) -> None:
    """Packs into a folder of its own, or into the cache, where what is there already is kept."""
    source, start = open_source(model), time.perf_counter()
    if not isinstance(source, Checkpoint):
        what = "a pack" if isinstance(source, Pack) else "an exported package"
        raise Usage(what, field="MODEL", expected="a checkpoint folder")
    with closing(source), progress(stderr(), not (quiet or as_json)) as notify:
        if output is not None:
            write_pack(source, Path(output), precisions, ple=ple, notify=notify)
            folder = Path(output)
        else:
            if ple != "int8":
                raise Usage(ple, field="--ple", expected="int8 in the cache", hint="Give -o DIR")
            with packs.pack_closed(packs.ensure(source, parts_for(source.model, precisions), notify=notify)) as pack:
                folder = pack.folder
    with packs.pack_closed(Pack.open(folder)) as pack:
        sizes = dict(pack.sizes())
    facts = {"pack": str(folder), "parts": sizes, "bytes": sum(sizes.values()), "seconds": time.perf_counter() - start}
    if as_json:
        print_json(facts)
    held = ", ".join(f"{part} {format_bytes(size)}" for part, size in sizes.items())
    say(f"{folder}: {format_bytes(sum(sizes.values()))} ({held}), {facts['seconds']:.1f} s", quiet or as_json)
    if in_memory(folder):
        say(f"{folder} is on a file system that is memory itself: no budget counts it", quiet or as_json)


def check(model: str, as_json: bool, quiet: bool) -> None:
    """Compares every file of a pack with its sum."""
    folder = Path(model) if os.path.isdir(model) else packs.named(model)
    source = open_source(folder)
    if isinstance(source, Checkpoint):
        cached = packs.cached(source)
        if cached is None:
            raise Usage("a checkpoint without a pack", file=folder, field="MODEL", expected="a pack, or its key")
        source.close()
        source = Pack.open(cached)
    with packs.pack_closed(source) as pack:
        size = pack.verify()
        if as_json:
            print_json({"pack": str(pack.folder), "bytes": size, "ok": True})
        say(f"{pack.folder}: {format_bytes(size)} as written", quiet or as_json)


def show_list(as_json: bool) -> None:
    """The packs in the cache, one row each."""
    entries = packs.listing()
    if as_json:
        print_json({"folder": str(packs.packs_folder()), "packs": [entry.as_dict() for entry in entries]})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("key", "bytes", "holds", "of", "state"):
        table.add_column(name, justify="right" if name == "bytes" else "left", overflow="fold")
    for entry in entries:
        size = format_bytes(sum(entry.parts.values()))
        held = " ".join(part for part in entry.parts if part != packs.ROOT)
        table.add_row(*(Text(printable(t)) for t in (entry.key, size, held, entry.source, entry.state)))
    console = stdout()
    console.print(table if entries else f"no packs in {packs.packs_folder()}", markup=False)


def say(text: str, quiet: bool) -> None:
    """One line for people."""
    if not quiet:
        stderr().print(text, markup=False, soft_wrap=True)
