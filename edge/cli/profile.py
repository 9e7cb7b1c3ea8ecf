"""``edge profile``: what this machine can run, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from edge.budget.plan import Request
from edge.cli import profiled
from edge.cli.options import MMAP, THREADS, planning_but
from edge.cli.show import fits, print_json, stderr, stdout
from edge.profile import results
from loaders.errors import NotPermitted, Usage, printable

INTERRUPTED, UNFIT, REGRESSED, UNSOUND = 130, 80, 1, 1
PINS = ("slice", "precision", "ple", "kv", "threads", "mmap")


@click.command("profile", short_help="Measure what this machine can run: memory, speed, energy.")
@click.argument("model", required=False)
@click.option("--config", metavar="NAME|FILE", help="Random weights at the shapes of a published model or config.json.")
@click.option("--budgets", metavar="SIZES", help="1GB,2GB,3GB.  [default: four, from what fits at least]")
@click.option("--contexts", default="512", show_default=True, metavar="N,N", help="Lengths of the prompts, tokens.")
@click.option(
    "--repeat", default=5, show_default=True, type=click.IntRange(1, 1000), metavar="N", help="Runs of a case."
)
@click.option(
    "-n", "new", default=128, show_default=True, type=click.IntRange(2, 1 << 16), metavar="N", help="Tokens to decode."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Keep results and report here.")
@click.option("--in-cgroup", "in_box", is_flag=True, help="Also run under a hard limit equal to the budget.")
@click.option("--against", metavar="llama.cpp", help="Also run a peer that is installed, on the same shape.")
@click.option("--keep", is_flag=True, help="Leave the random weights of --config in the cache.")
@click.option(
    "--compare", nargs=2, type=click.Path(path_type=Path), metavar="OLD NEW", help="Compare two results.jsonl."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print the table alone.")
@THREADS
@MMAP
@planning_but("budget", "ram-budget", "context")
def command(**flags: Any) -> int:
    """Measure MODEL under each budget: load time, time to the first token, tokens per second, memory, bytes read,
    energy; beside what was planned. Every run is a process of its own, sampled 50 times a second.

    MODEL is a checkpoint folder, a pack or an exported package; without one it is the demo. --config measures
    before anything is downloaded: random weights at a model's true shapes.

    \b
      edge profile --config gemma-3n-E4B --budgets 2GB,3GB,4GB --contexts 512,4096 -o report/
      edge profile ./model --budgets 2GB --in-cgroup
      edge profile --compare before/results.jsonl after/results.jsonl

    pp512 is a prompt of 512 tokens, tg128 decoding 128 tokens, '@ d4096' after 4,096; the first token is that of the
    first prompt, of 512 tokens or fewer. -o DIR keeps results.jsonl and report.html. Exits with 1 when a run was
    killed or broke its budget, or --compare finds a regression; with 80 when nothing fits.
    """
    if flags["compare"]:
        return compare(*flags["compare"], flags["as_json"])
    from edge.cli.measuring import Keeper, Talk, runs_of
    from edge.profile import run as sweeps
    from edge.profile import subject as subjects

    console, loud = stderr(), not (flags["quiet"] or flags["as_json"])
    subject, wanted = subjects.find(flags["model"], flags["config"]), asked(flags)
    peer = found_peer(flags["against"], subject)
    items = sweeps.planned(subject, wanted)
    if flags["in_box"]:
        check_box(items[0].case.device)
    if not any(item.plan for item in items):
        raise next(item.refusal for item in items if item.refusal is not None)
    talk = Talk(console, loud, runs_of(items))
    keeper = Keeper(flags["output"], talk)
    talk.introduce(subject, items, keeper.file)
    try:
        with talk:
            for line in lines(subject, wanted, items, peer, flags, talk):
                keeper.add(line)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        # Whatever has ended it: what was measured is shown and kept.
        trouble = keeper.finish()
        present(keeper, flags["as_json"], console, loud)
    if trouble is not None:
        raise trouble
    return verdict(keeper.lines)


def lines(
    subject: Any, wanted: Any, items: Sequence[Any], peer: Any, flags: dict[str, Any], talk: Any
) -> Iterator[Any]:
    """What comes out, case by case, the peer's last."""
    from edge.profile import run as sweeps
    from edge.profile.subject import weights

    facts, plans = facts_of(subject, items), [item.plan for item in items if item.plan is not None]
    with weights(subject, plans, flags["keep"], talk.notify) as path:
        yield from sweeps.sweep(path, items, facts, expectation(items), flags["in_box"], talk)
    if peer is not None:
        yield from against(peer, subject, wanted, facts, talk.at)


def asked(flags: dict[str, Any]) -> Any:
    """The sweep that the command line wants. Raises Usage."""
    from edge.profile.run import Wanted

    budgets = None if flags["budgets"] is None else tuple(split("--budgets", flags["budgets"]))
    contexts = tuple(whole(text) for text in split("--contexts", flags["contexts"]))
    request = Request(**{name: flags[name] for name in PINS})
    return Wanted(request, budgets, contexts, flags["device"], flags["engine"], flags["new"], flags["repeat"])


def split(flag: str, text: str) -> list[str]:
    """The parts of a list, none empty, none twice. Raises Usage."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise Usage(text, field=flag, expected="a list with commas between, nothing twice")
    return parts


def whole(text: str) -> int:
    """A number of tokens. Raises Usage."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Usage(text, field="--contexts", expected="whole numbers of tokens")
    return int(text)


def check_box(device: str) -> None:
    """Raises NotPermitted where no control group can be made, Usage where it would not hold what the budget counts."""
    from edge.profile import box

    if device != "cpu":
        raise Usage(f"on {device}", field="--in-cgroup", expected="a CPU: a control group holds no device's memory")
    reason = box.why_not()
    if reason is not None:
        raise NotPermitted(reason, field="--in-cgroup", hint="Run as root, or where a memory controller is handed on")


def found_peer(name: str | None, subject: Any) -> Any:
    """The peer to run too, asked whether it can before anything is measured. Raises Usage, Unsupported."""
    if name is None:
        return None
    from edge.profile import peer

    if name != peer.PEER:
        raise Usage(name, field="--against", expected=peer.PEER)
    found = peer.find()
    peer.check(found, subject.source.model, peers_folder())
    return found


def peers_folder() -> Path:
    """Where a peer's weights lie while it runs."""
    from edge.store.cache import cache_root, make_folder

    return make_folder(cache_root() / "synthetic")


def against(peer: Any, subject: Any, wanted: Any, facts: Any, say: Callable[[str], None]) -> Iterator[Any]:
    """The peer's lines: a context each, as it knows no budget."""
    from edge.engine.threads import thread_count
    from edge.profile import peer as peers

    model = subject.source.model
    with peers.weights(peer, model, peers_folder(), say) as file:
        yield from peers.run(
            peer,
            model,
            file,
            wanted.contexts,
            facts=facts,
            threads=wanted.request.threads or thread_count(),
            repeat=wanted.repeat,
            new=wanted.new,
            say=say,
        )


def facts_of(subject: Any, items: Sequence[Any]) -> dict[str, Any]:
    """Model, machine and versions of every line; looked up once."""
    from edge.profile.facts import brief, versions

    machine, threads = brief(), items[0].case.request.threads
    if threads is not None:
        machine["threads"] = threads
    return {"model": subject.facts(), "machine": machine, "versions": versions()}


def expectation(items: Sequence[Any]) -> Any:
    """What the planner knows of this machine."""
    from edge.profile.forecast import forecast

    first = next(item.plan for item in items if item.plan is not None)
    return forecast(first, items[0].case.request.threads)


def present(keeper: Any, as_json: bool, console: Any, loud: bool) -> None:
    """The table, or the lines as JSON, on stdout; where the report lies on stderr."""
    report = None if keeper.report is None else printable(keeper.report)
    if not keeper.lines:
        return
    if as_json:
        print_json({"cases": keeper.lines, "report": report})
        return
    out = stdout()
    shown, left_out = fitting(keeper.lines, out)
    out.print(shown)
    for note in profiled.notes(keeper.lines):
        out.print(note, markup=False, soft_wrap=True)
    if left_out and loud:
        where = "report.html has them" if report else "--json or a wider terminal has them"
        console.print(f"left out for want of width: {', '.join(left_out)}; {where}", markup=False, soft_wrap=True)
    if report is not None and loud:
        console.print(f"report: {report}", markup=False, soft_wrap=True)


def fitting(found: Sequence[dict[str, Any]], out: Any) -> tuple[Any, tuple[str, ...]]:
    """The table as wide as fits, and the columns that were left out of it."""
    blank = profiled.blank(found)
    spare = tuple(name for name in profiled.SPARE if name not in blank)
    for count in range(len(spare)):
        table = profiled.table(found, (*blank, *spare[:count]))
        if fits(table, out):
            return table, spare[:count]
    return profiled.table(found, (*blank, *spare)), spare


def verdict(lines: Sequence[dict[str, Any]]) -> int:
    """The exit code of what was measured."""
    statuses = {line["status"] for line in lines}
    boxes = [line["boxed"] for line in lines if line.get("boxed")]
    broken = any((line.get("memory") or {}).get("kept") is False for line in lines)
    unsound = any(box["status"] != "ok" or not box["same_tokens"] for box in boxes)
    if statuses & {"killed", "failed"} or broken or unsound:
        return UNSOUND
    return 0 if "ok" in statuses else UNFIT


def compare(old: Path, new: Path, as_json: bool) -> int:
    """Two files of results beside each other."""
    from edge.cli.compared import table
    from edge.profile.compare import compare as compared

    found = compared(results.read(old), results.read(new))
    if as_json:
        print_json(found.as_dict())
    else:
        stdout().print(table(found))
    return REGRESSED if found.regressed or not found.cases else 0
