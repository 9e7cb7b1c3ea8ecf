"""``edge calibrate``: the widths, layer by layer, that lose least of a MatFormer within a budget; measured."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from edge.budget.units import format_bytes
from edge.calibrate import POINTS, TOKENS, Calibration, Choice, calibrate
from edge.cli.model import model_path, say_demo
from edge.cli.options import OPTIONS
from edge.cli.show import print_json, progress, stderr, stdout
from edge.corpus import open_text
from edge.session import open_source
from edge.session import quiet as quietly
from edge.store.measured import save
from loaders.errors import CannotCreate, Unsupported, Usage, printable
from loaders.formats.atomic import refusal, temporary, umask
from loaders.formats.package import is_package
from loaders.network.matformer import Slice


@click.command("calibrate", short_help="Find the best slice of MODEL for a budget, by measuring.")
@click.argument("model", required=False)
@click.option("--text", required=True, metavar="FILE", help="Text to measure on, UTF-8; plain, .xz or .gz.")
@click.option("--budget", metavar="SIZE", help="All the memory a run may use: 2GB, 1.5GiB, bytes.  [default: a curve]")
@click.option("--points", default=POINTS, show_default=True, metavar="N", help="Sizes of the curve without --budget.")
@click.option("--tokens", default=TOKENS, show_default=True, metavar="N", help="Of the text, at most.")
@click.option("--effort", type=int, metavar="N", help="Slices measured for a size, after the layers.  [default: 16; 4]")
@click.option("--step", type=int, metavar="N", help="Also choose untrained widths, multiples of this.")
@click.option(
    "--precision", metavar="auto|int4|int8|bf16|float32", help="Of the weights.  [default: bf16, a pack's best]"
)
@click.option("-c", "--context", "--ctx-size", type=int, metavar="N", help="Tokens of context that must fit too.")
@OPTIONS["device"]
@OPTIONS["engine"]
@click.option("-o", "--output", metavar="FILE", help="Write the slice as a JSON file that --slice takes.")
@click.option("--force", is_flag=True, help="Let -o replace a file.")
@click.option("--save", "keep", is_flag=True, help="Keep results in the model's pack: plans go by them.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def command(
    model: str | None, text: str, output: str | None, force: bool, keep: bool, as_json: bool, quiet: bool, **flags: Any
) -> None:
    """Measure what each layer's width of MODEL, a MatFormer, is worth on a text, and find the per-layer widths that
    lose least within a budget; compared, on text that was not used to choose, with one width throughout.

    \b
      edge calibrate ./model --text book.txt --budget 2GB
      edge calibrate ./model --text book.txt               a curve, from the narrowest to the full model

    Takes as long as running a hundred slices over the text.
    """
    path = model_path(model)
    if is_package(path):
        hint = "Calibrate the model it was exported from"
        raise Unsupported("an exported package: it is one slice", file=path, field="MODEL", hint=hint)
    if output is not None and flags["budget"] is None:
        raise Usage("-o without a budget", field="--output", expected="--budget SIZE: a curve is many slices")
    if output is not None:
        writable(Path(output), force)
    open_text(Path(text), flags["tokens"]).close()  # what is not there is better known before a library is loaded
    with progress(stderr(), not (quiet or as_json)) as notify:
        found = calibrate(path, text, notify=notify, **flags)
    with closing(open_source(path)) as source:
        if not as_json:  # before a full disk can be in the way
            if not quiet:
                say_demo(model, source.model)
            show(found, "edge run" if model is None else f"edge run {shlex.quote(model)}", output)
        if output is not None:
            write(Path(output), found.choices[0].winner.part, len(source.model.layers), force)
        kept = printable(save(source, found.measured, quietly)) if keep else None
    if as_json:
        print_json({"model": printable(path), **found.as_dict(), "saved": kept})
    elif kept is not None:
        stdout().print(f"kept {len(found.measured)} results in {kept}", markup=False, soft_wrap=True)


def writable(output: Path, force: bool) -> None:
    """Raises CannotCreate for a file that cannot be written, before minutes are spent on what goes into it."""
    if os.path.lexists(output) and (not force or os.path.isdir(output)):
        raise already_there(output)
    if not os.path.isdir(output.absolute().parent):
        raise CannotCreate("no such folder", file=output.absolute().parent, expected="a folder to write into")


def already_there(output: Path) -> CannotCreate:
    """A file of the user's is not replaced unasked."""
    return CannotCreate("already there", file=output, expected="a file that does not exist yet, or --force")


def write(output: Path, part: Slice, layers: int, force: bool) -> None:
    """The slice as two lists, whole or not at all. Raises CannotCreate, NotPermitted, ReadFailed."""
    lists = {"layers_to_skip": [i for i in range(layers) if i not in part.keep], "ffn_hidden_dims": list(part.widths)}
    try:
        fd, name = tempfile.mkstemp(prefix=temporary(output.name), suffix=".tmp", dir=output.absolute().parent)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(json.dumps(lists) + "\n")
                file.flush()
                os.fsync(fd)
            os.chmod(name, 0o666 & ~umask())
            if not force:
                os.link(name, output)  # which, unlike a rename, never replaces
                os.unlink(name)
            else:
                os.replace(name, output)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
    except FileExistsError:
        raise already_there(output) from None
    except OSError as e:
        raise refusal(e, output) from None


def show(found: Calibration, run: str, output: str | None) -> None:
    """Tables: the layers, then the budget's slices or the curve; and what to type next."""
    console = stdout()
    what = f"{found.recipe.label}, {found.tokens} tokens to choose by, {found.held_tokens} held out"
    console.print(f"{what}, {found.evaluations} runs; losses in nats per token\n", markup=False, soft_wrap=True)
    console.print(sensitivity_table(found))
    console.print()
    if len(found.choices) > 1:
        console.print(curve_table(found))
        return
    choice = found.choices[0]
    console.print(choice_table(choice))
    console.print()
    for line in verdict(choice):
        console.print(line, markup=False, soft_wrap=True)
    name = choice.winner.part.name if output is None else shlex.quote(output)
    flags = f"--slice {name} --precision {found.recipe.precision} --budget {choice.budget}"
    console.print(f"next: {run} {flags} -c {found.context}", markup=False, soft_wrap=True)


def table_of(*names: str, left: int = 1) -> Table:
    """A table whose first columns are words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=i >= left, overflow="fold")
    return table


def sensitivity_table(found: Calibration) -> Table:
    """One row for each layer and width below the full one."""
    table = table_of("layer", "width", "saves", "costs the full model", "costs the narrowest")
    for s in found.sensitivities:
        layers = str(s.layers[0]) if len(s.layers) == 1 else f"{s.layers[0]}-{s.layers[-1]}"
        width = str(s.width) if s.width else "skipped"
        table.add_row(layers, width, format_bytes(s.saved), f"{s.narrowed:+.4f}", f"{s.widened:+.4f}")
    return table


def choice_table(choice: Choice) -> Table:
    """The winner, and slices of one width throughout."""
    table = table_of("slice", "bytes", "predicted", "loss", "held out")
    for point in (choice.winner, *(p for p in choice.uniforms if p.part != choice.winner.part)):
        predicted = "" if point.predicted is None else f"{point.predicted:.4f}"
        cells = (format_bytes(point.bytes), predicted, f"{point.loss:.4f}", f"{point.held:.4f}")
        table.add_row(point.part.name, *cells, style="bold" if point is choice.winner else None)
    return table


def verdict(choice: Choice) -> list[str]:
    """What the comparison came to, on the text that was not used to choose."""
    winner, best = choice.winner, choice.best_uniform
    if best is None or choice.gain is None:
        return [f"{winner.part.name}: no slice of one width fits {format_bytes(choice.budget)}"]
    if best.part == winner.part:
        return [f"{winner.part.name}: no mix of widths was better than one width throughout"]
    word = "better" if choice.gain >= 0 else "worse"
    return [f"{winner.part.name}: {abs(choice.gain):.4f} {word} than {best.part.name} on the text held out"]


def curve_table(found: Calibration) -> Table:
    """One row for each size."""
    table = table_of("bytes", "loss", "held out", "one width", "gain", "slice", left=0)
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for choice in found.choices:
        best = choice.best_uniform
        held = "" if best is None else f"{best.held:.4f}"
        gain = "" if choice.gain is None else f"{choice.gain:+.4f}"
        winner = choice.winner
        cells = (f"{winner.loss:.4f}", f"{winner.held:.4f}", held, gain, winner.part.name)
        table.add_row(format_bytes(choice.budget), *cells)
    return table
