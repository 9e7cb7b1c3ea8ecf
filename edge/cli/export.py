"""``edge export``: a model as ONNX, with all that phones and other runtimes need, compared with edge's own answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from edge import __version__, engine
from edge.budget.memory import trim
from edge.budget.plan import Request
from edge.budget.units import format_bytes
from edge.cli.model import model_path, say_demo
from edge.cli.show import print_json, progress, stderr
from edge.engine.base import Engine
from edge.session import Session, prepare
from edge.store import packs
from edge.store.packages import open_source
from loaders.checkpoint import Checkpoint
from loaders.errors import Usage, printable
from loaders.formats.atomic import taken
from loaders.formats.facts import Facts
from loaders.formats.pack import parts_for
from loaders.formats.package import Package
from loaders.formats.quant import BITS
from loaders.formats.sharded import Notify
from loaders.slices import resolve
from loaders.weights import Source

USUAL_CONTEXT = 4096
# Tokens of a pass, and bytes of the row cache, while a package is checked.
CHUNK, ROWS = 64, 16 << 20


@click.command("export", short_help="Write MODEL as ONNX for phones and other runtimes, and check it.")
@click.argument("model", required=False)
@click.option("-o", "--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@click.option(
    "--profile", default="ort", show_default=True, type=click.Choice(["ort", "standard"]),
    help="ONNX Runtime's fused operators, or those of the ONNX standard alone.",
)  # fmt: skip
@click.option(
    "--precision", default="int4", show_default=True, metavar="float32|float16|int8|int4", help="Of the weights."
)
@click.option("--slice", "name", default="full", show_default=True, metavar="NAME", help="A slice, as for `edge run`.")
@click.option(
    "-c", "--context", "--ctx-size", type=int, metavar="N",
    help=f"Tokens the caches are made for.  [default: the model's, at most {USUAL_CONTEXT}]",
)  # fmt: skip
@click.option(
    "--layout", default="edge", show_default=True, type=click.Choice(["edge", "genai", "web"]),
    help="Names and files as edge, onnxruntime-genai or transformers.js has them.",
)  # fmt: skip
@click.option(
    "--check/--no-check", "checked", default=True, show_default=True, help="Compare the package with the model."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
def command(
    model: str | None,
    output: str,
    profile: str,
    precision: str,
    name: str,
    context: int | None,
    layout: str,
    checked: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write MODEL, or a slice of it, as a package of ONNX files that needs nothing else.

    \b
      edge export ./model -o ./package
      edge run ./package "Once upon a time"

    MODEL is a checkpoint folder or a pack; without one it is the demo model that ships with edge. The package is run in
    ONNX Runtime and compared with the model before it gets its name; one that differs is not written.
    """
    if os.path.lexists(output):
        raise taken(Path(output))
    source = open_source(model_path(model))
    if isinstance(source, Package):
        source.close()
        raise Usage("an exported package", field="MODEL", expected="a checkpoint folder or a pack")
    usual = min(source.model.context, USUAL_CONTEXT)
    wanted = Wanted(name, precision, usual if context is None else context, profile, layout)
    with closing(source), progress(stderr(), not (quiet or as_json)) as notify:
        found = make(source, wanted, Path(output), checked, notify)
    if as_json:
        print_json(report(output, *found))
    elif not quiet:
        say_demo(model, source.model)
        facts, size, _ = found
        stderr().print(summary(output, facts, size), markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Wanted:
    """What flags say of a package."""

    slice: str
    precision: str
    context: int
    profile: str
    layout: str


def make(source: Source, wanted: Wanted, output: Path, checked: bool, notify: Notify) -> tuple[Facts, int, str | None]:
    """Writes the package, from the model's pack where it is quantized: what is quantized once stays so. Its facts, its
    bytes, and the ONNX Runtime that was asked for its operators.
    """
    from export.package import Options, refuse, write

    options = Options(__version__, wanted.context, wanted.precision, wanted.profile, wanted.layout)
    refuse(source, options)
    part = resolve(source.model, source.family, wanted.slice)
    if checked:
        engine.start("ort", "cpu")  # where it is not installed, that is better known now
    weights = quantized(source, wanted.precision, checked, notify)
    try:
        check = partial(compare, weights.folder, wanted, notify) if checked else None
        written = write(weights, part, output, options, check, notify)
    finally:
        if weights is not source:
            weights.close()
    return written.facts, written.bytes, written.operators


def quantized(source: Source, precision: str, checked: bool, notify: Notify) -> Source:
    """The pack of a checkpoint that is to be quantized; anything else as it is.

    Where there is none it is made now, if the package is to be compared with what it holds: else in one go.
    """
    if not isinstance(source, Checkpoint) or precision not in BITS:
        return source
    parts = parts_for(source.model, (precision,))
    folder = packs.cached(source)
    if not checked and (folder is None or not packs.there(folder, parts)):
        return source
    pack = packs.ensure(source, parts, notify=notify)
    trim()
    return pack


def compare(model: Path, wanted: Wanted, notify: Notify, folder: Path, exact: Callable[[bool], None]) -> dict[str, Any]:
    """What a package in ``folder`` computes beside what ``model`` does, as a report; see :func:`export.check.check`.

    Raises ParityFailed.
    """
    from edge.engine.ort_start import version
    from export.check import check, course

    with closing(Package.open(folder)) as package:
        tokens = course(package.model, wanted.context)
    exactly = False

    def turned(to: bool) -> None:
        nonlocal exactly
        exactly = to
        exact(to)

    count = len(tokens.ids)
    found = check(
        tokens,
        wanted.precision,
        lambda: reference_engine(model, wanted, count),
        lambda: package_engine(folder, count, exactly),
        turned,
        notify,
    )
    return {**found, "runtime": f"onnxruntime {version()}"}


@contextmanager
def reference_engine(model: Path, wanted: Wanted, context: int) -> Iterator[Engine]:
    """The same weights in float32 arithmetic, with a float32 cache."""
    precision = "float32" if wanted.precision == "float16" else wanted.precision
    request = Request(None, None, wanted.slice, precision, kv="float32", context=context)
    with Session(prepare(model, request, "cpu", "torch")) as session:
        yield session.engine
    trim()


@contextmanager
def package_engine(folder: Path, count: int, exactly: bool) -> Iterator[Engine]:
    """A package in ONNX Runtime, for ``count`` tokens. Nothing is prepared for later runs: there may be none."""
    from edge.engine.ort import OrtEngine, open_session
    from edge.engine.ort_exact import open_exact
    from edge.engine.ort_pages import Pages
    from edge.engine.ort_ple import open_rows
    from export.web import embedding_of

    with closing(Package.open(folder)) as package:
        session = open_exact(package) if exactly else open_session(package.graph, package.graph)
        rows = None if package.facts.ple is None else open_rows(package, "ssd", ROWS)
        # Buffers of windows have the size they are shipped with, those of all tokens need not have.
        context = min(package.context, count + CHUNK)
        apart = embedding_of(package.graph)
        embedding = open_session(apart, apart) if apart != package.graph else None
        running = OrtEngine(package, session, rows, Pages([], CHUNK), context=context, chunk=CHUNK, embedding=embedding)
        with closing(running):
            yield running
    trim()


def report(output: str, facts: Facts, size: int, runtime: str | None) -> dict[str, Any]:
    """What was written, as data."""
    return {
        "package": printable(output),
        "source": facts.source,
        "slice": facts.slice.name,
        "precision": facts.precision,
        "head": facts.head,
        "profile": facts.profile,
        "layout": facts.layout,
        "context": facts.context,
        "opset": facts.opset,
        "min_ort": facts.min_ort,
        "graph": facts.graph,
        "bytes": size,
        "memory": facts.memory,
        "operators_of": runtime,
        "parity": facts.parity,
    }


def summary(output: str, facts: Facts, size: int) -> str:
    """One line for people."""
    head = f" with {facts.head} head" if facts.head != facts.precision else ""
    what = f"{facts.slice.name}, {facts.precision}{head}, context {facts.context}, {format_bytes(size)}"
    return f"{output}: {what}, {parity(facts.parity)}"


def parity(found: Any) -> str:
    """The figures of a check: the largest difference, and of quantized packages what speed costs on top."""
    if found is None:
        return "not checked"
    shipped = found.get("shipped")
    where = f"{', '.join(found['difference'])}" if "noise" in found else f"over {found['tokens']} tokens"
    text = f"logits within {found['judged']:.1e} of the model's, {where}"
    if "noise" in found:
        text += f" (further on the model differs from itself, by {max(found['noise'].values()):.1e})"
    elif found["judged"] != found["largest"]:
        text += f", in half of all places ({found['largest']:.1e} at most)"
    if shipped is not None:
        text += f", in exact arithmetic; as shipped {shipped['largest']:.1e}, KL {shipped['kl']:.1e}"
        text += f", the same first choice for {shipped['top1']:.0%}"
    return text
