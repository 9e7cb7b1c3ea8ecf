"""``edge eval``: how well slices and precisions of a model predict a text, as one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from edge.budget.memory import trim
from edge.budget.plan import Floor, Plan, Request, enumerate_plans, pick, wanted_recipes
from edge.budget.units import format_bytes
from edge.cli.model import model_path, say_demo
from edge.cli.options import THREADS, F, planning_but, wanted
from edge.cli.show import plan_lines, print_json, progress, stderr, stdout
from edge.corpus import open_text
from edge.evaluate import CONTEXT, Score, Text, evaluate, measured_of, read_text, span
from edge.session import Ready, Session, open_source, prepare
from edge.store.packages import Opened
from loaders.errors import Unsupported, Usage, printable
from loaders.formats.measured import Measured
from loaders.formats.package import Package
from loaders.formats.sharded import Notify
from loaders.slices import resolve

REPEATED = ("slice", "precision")
USUAL = "[default: full, as stored; with --budget what `edge run` would take]"
EXACT = ("float32", "bf16")
# What a text may take of the room that a floor is rounded up by.
SMALL = 1 << 20


def planning_all(command: F) -> F:
    """The flags of a plan, of which --slice and --precision may be given again and again."""
    command = planning_but(*REPEATED)(command)
    for flag, metavar in (("--precision", "int4|int8|bf16|float32"), ("--slice", "NAME")):
        command = click.option(
            flag,
            metavar=metavar,
            multiple=True,
            help=f"Give it again for several: all combinations.  {USUAL}",
        )(command)
    return command


@dataclass(frozen=True)
class Result:
    """One evaluation: what ran, what it scored, what it took."""

    plan: Plan
    score: Score
    measured: Measured
    memory: dict[str, Any]


@click.command("eval", short_help="Measure perplexity and bits per byte over a text.")
@click.argument("model", required=False)
@click.option("--text", "file", required=True, metavar="FILE", help="UTF-8, plain or packed by xz or gzip.")
@click.option("--tokens", type=int, metavar="N", help="Score the first N tokens only.  [default: all]")
@click.option("--stride", type=int, metavar="N", help="Tokens a window moves on by.  [default: half the context]")
@click.option("--against", type=click.Choice(EXACT), help="Compare with the full model in this precision.")
@click.option("--save", is_flag=True, help="Keep the results with the model's pack, for `edge plan` and `run`.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print the table alone.")
@THREADS
@planning_all
def command(**flags: Any) -> int:
    """Score the text in FILE with MODEL: perplexity, bits per byte and, with --against, what quantization or a
    slice changes: the KL divergence per token and how often the likeliest token stays the same.

    Without --context windows have 1024 tokens, or fewer where the model or the budget has fewer. All the
    memory that is used, a model it is compared with included, stays within --budget.

    \b
      edge eval ./model --text held-out.txt --precision bf16 --precision int4 --against bf16
    """
    check(flags)
    path, file = model_path(flags["model"]), Path(flags["file"])
    open_text(file, flags["tokens"]).close()  # what is not there is better known before a library is loaded
    loud, console = not (flags["quiet"] or flags["as_json"]), stderr()

    def say(line: str) -> None:
        if loud:
            console.print(line, markup=False, soft_wrap=True)

    with progress(console, loud) as notify:
        job = Job(path, file, flags, say, notify)
        text, results = job.measure()
    if not flags["as_json"]:  # before a full disk can be in the way
        stdout().print(table(results))
        for line in account(results):
            say(line)
    kept = None
    if flags["save"]:
        with progress(console, loud) as notify:
            kept = job.save(results, notify)
        say(f"kept in {printable(kept)}")
    if flags["as_json"]:
        print_json(report(job, text, results, kept))
    return 0


def check(flags: dict[str, Any]) -> None:
    """Raises Usage for numbers that no text and no model could make sense of."""
    tokens, context, stride = flags["tokens"], flags["context"], flags["stride"]
    if tokens is not None and tokens < 2:
        raise Usage(tokens, field="--tokens", expected="2 or more")
    if context is not None and context < 2:
        raise Usage(context, field="--context", expected="2 or more")
    if stride is not None and (stride < 1 or (context is not None and stride > context)):
        raise Usage(stride, field="--stride", expected=f"1 to {'the context' if context is None else context}")


def refuse_saving(source: Opened, wanted: bool) -> None:
    """Raises Unsupported where there is nowhere to keep results."""
    if wanted and isinstance(source, Package):
        hint = "Evaluate the model it was exported from"
        raise Unsupported("an exported package", file=source.folder, field="--save", expected="a model", hint=hint)


def combined(source: Opened, flags: dict[str, Any]) -> tuple[list[Request], str | None]:
    """A request for each slice at each precision, and what there is to say when no budget was given.

    Raises Usage or Unsupported for what the model does not have.
    """
    names = ("budget", "ram_budget", "context", "ple", "kv", "threads")
    want = wanted(**{name: flags[name] for name in names}, slice="auto", precision="auto")
    free = flags["budget"] is not None
    if flags["against"] is not None:
        wanted_recipes(source, flags["against"])
    slices = flags["slice"] or (("auto",) if free else ("full",))
    precisions = flags["precision"] or (("auto",) if free else (wanted_recipes(source, "auto")[0].precision,))
    # Like a run's where a budget decides; elsewhere longer caches would be planned for nothing.
    context = CONTEXT if want.request.context is None and not free else want.request.context
    for part in slices:
        if part != "auto":
            resolve(source.model, source.family, part)
    for precision in precisions:
        wanted_recipes(source, precision)
    pairs = dict.fromkeys((part, precision) for part in slices for precision in precisions)
    return [replace(want.request, slice=s, precision=p, context=context) for s, p in pairs], want.note


@dataclass(frozen=True)
class Job:
    """One command: the model, the text, the flags, and where to say what."""

    path: Path
    file: Path
    flags: dict[str, Any]
    say: Callable[[str], None]
    notify: Notify

    def prepared(self, request: Request, *, fresh: bool = False) -> Ready:
        """All that comes before a request's plan."""
        return prepare(self.path, request, self.flags["device"], self.flags["engine"], text=True, fresh=fresh)

    def measure(self) -> tuple[Text, list[Result]]:
        """The text, and every combination evaluated, one after another. What is refused is so before one loads."""
        with closing(open_source(self.path)) as source:
            refuse_saving(source, self.flags["save"])
            requests, note = combined(source, self.flags)
        ready = self.prepared(requests[0], fresh=True)
        with closing(ready.source):
            assert ready.tokenizer is not None
            text = read_text(self.file, ready.tokenizer, self.flags["tokens"])
            floor = replace(ready.floor, host=ready.floor.host + (text.held_bytes if text.held_bytes > SMALL else 0))
            known = [replace(r, device=ready.request.device, engine=ready.request.engine) for r in requests]
            for request in known:
                plan = pick(enumerate_plans(ready.source, request, floor), request)
                span(plan.context, text, self.context(plan), self.flags["stride"])
            if not (self.flags["quiet"] or self.flags["as_json"]):
                say_demo(self.flags["model"], ready.source.model)
            for line in filter(None, (note, ready.runtime.note)):
                self.say(line)
            with self.beside(requests[0], floor) as (reference, floor):
                for request in known if reference is not None else []:
                    pick(enumerate_plans(ready.source, request, floor), request)
                return text, [self.one(request, floor, text, reference) for request in requests]

    def context(self, plan: Plan) -> int | None:
        """What was asked for, cut to what the model was made for."""
        return None if self.flags["context"] is None else plan.context

    @contextmanager
    def beside(self, request: Request, floor: Floor) -> Iterator[tuple[Session | None, Floor]]:
        """The model to compare with, loaded, or None; and the floor that others are planned on, all of it included."""
        against = self.flags["against"]
        if against is None:
            yield None, floor
            return
        whole = replace(request, slice="full", precision=against, ple="auto", kv="auto")
        whole = replace(whole, context=request.context or CONTEXT)
        with Session(replace(self.prepared(whole), floor=floor), notify=self.notify) as reference:
            plan = reference.plan
            on_host, on_device = (
                (plan.total_bytes, 0) if plan.device == "cpu" else (plan.host_total_bytes, plan.total_bytes)
            )
            yield reference, replace(floor, host=on_host, device=on_device)

    def one(self, request: Request, floor: Floor, text: Text, reference: Session | None) -> Result:
        """One slice at one precision, loaded, scored and closed again."""
        trim()
        ready = self.prepared(request)
        seen = ready.floor
        floor = replace(seen, host=max(seen.host, floor.host), device=max(seen.device, floor.device))
        with Session(replace(ready, floor=floor), notify=self.notify) as session:
            for line in plan_lines(session.plan, session.request, session.best):
                self.say(line)

            def notify(what: str, done: int, total: int) -> None:
                self.notify(f"{what} {session.plan.slice} in {session.plan.recipe.label}", done, total)

            context, stride = self.context(session.plan), self.flags["stride"]
            score = evaluate(session, text, context=context, stride=stride, reference=reference, notify=notify)
            return Result(session.plan, score, measured_of(session, score, text), session.memory())

    def save(self, results: Sequence[Result], notify: Notify) -> Path:
        """Keeps the results with the model's pack; its folder."""
        from edge.store.measured import save

        with closing(open_source(self.path)) as source:
            return save(source, [result.measured for result in results], notify)


def account(results: Sequence[Result]) -> Iterator[str]:
    """What was scored, and what it took, for people."""
    for score in {(r.score.context, r.score.stride): r.score for r in results}.values():
        size = f"{score.tokens} tokens, {format_bytes(score.bytes)}"
        yield f"text: {size}, in windows of {score.context} tokens that move on by {score.stride}"
    memory = results[-1].memory
    budget, on_gpu = memory["budget_bytes"], memory["device_peak_bytes"] is not None
    peak = max(r.memory["device_peak_bytes" if on_gpu else "peak_bytes"] for r in results)
    of = f" of {format_bytes(budget)} budget ({peak / budget:.0%})" if budget else ""
    yield f"peak memory: {format_bytes(peak)}{of}"


def table(results: Sequence[Result]) -> Table:
    """One row for each result."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    compared = any(result.score.kl is not None for result in results)
    for name in ("slice", "precision"):
        found.add_column(name, no_wrap=name == "precision")
    for name in ("weights", "loss", "perplexity", "bits/byte", *(("KL", "top-1") if compared else ()), "tokens/s"):
        found.add_column(name, justify="right", no_wrap=True)
    for plan, score in ((result.plan, result.score) for result in results):
        other = (f"{score.kl:.5f}", f"{score.top1:.1%}") if compared else ()
        found.add_row(
            plan.slice, plan.recipe.label, format_bytes(plan.bytes["weights"]), f"{score.loss:.4f}",
            f"{score.perplexity:.5g}", f"{score.bits_per_byte:.4f}", *other, f"{score.tps:,.0f}",
        )  # fmt: skip
    return found


def report(job: Job, text: Text, results: Sequence[Result], kept: Path | None) -> dict[str, Any]:
    """What ``--json`` prints; its keys are a contract. A single result's keys are the object's own as well."""
    rows = [row(result) for result in results]
    size = {"tokens": len(text.ids), "bytes": text.bytes}
    return {
        **(rows[0] if len(rows) == 1 else {}),
        "model": printable(job.path),
        "text": {"file": printable(job.file), "sha256": text.sha256, **size},
        "against": job.flags["against"],
        "saved": None if kept is None else printable(kept),
        "results": rows,
    }


def row(result: Result) -> dict[str, Any]:
    """One result as plain data. ``weights_bytes``: of the weights alone; ``total_bytes``: all that was planned."""
    plan, score = result.plan, result.score
    memory = {key: result.memory[key] for key in ("budget_bytes", "planned_bytes", "peak_bytes", "device_peak_bytes")}
    return {
        "slice": plan.slice,
        "precision": plan.precision,
        "head": plan.recipe.head,
        "ple": plan.ple,
        "kv": plan.kv,
        "context": score.context,
        "stride": score.stride,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "loss": score.loss,
        "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
        "bits_per_byte": score.bits_per_byte,
        "kl": score.kl,
        "top1": score.top1,
        "seconds": score.seconds,
        "tps": score.tps,
        "weights_bytes": plan.bytes["weights"],
        "total_bytes": plan.total_bytes,
        "memory": memory,
    }
