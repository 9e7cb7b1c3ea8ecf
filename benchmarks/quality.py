"""What a slice and a precision cost, measured: loss, distance from the full model, memory, speed; and what calibrating
gains over one width for all layers.

    python -m benchmarks.quality --text FILE [MODEL] [--tokens N] [--speed/--no-speed]
    python -m benchmarks.quality --plot-only
    python -m benchmarks.quality --budgets

MODEL is the demo unless given. Every slice at every precision predicts the first N tokens of FILE, in windows that do
not overlap; what is calibrated is chosen on the text behind them. Speed and peak memory are a fresh process's each.
Results, the picture and, of the demo, what the planner reads replace those of the last time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import demo_budgets, plots
from edge.budget.plan import Request, enumerate_plans
from edge.calibrate import LEAST_TOKENS, calibrate
from edge.calibrate.space import slice_of
from edge.corpus import blocks, open_text, read_text
from edge.demo import FOLDER, model_path
from edge.evaluate import CONTEXT, evaluate, measured_of
from edge.session import Session, open_session, open_source, plan_floor
from loaders.errors import BadCheckpoint
from loaders.formats.measured import NAME, Measured, dump, merge
from loaders.formats.quant import dequantize_rows, quantize_rows
from loaders.formats.recipe import recipes
from loaders.network.spec import Model
from loaders.slices import candidates

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS, CALIBRATE_TOKENS, POINTS = 16384, 8192, 8
PRECISIONS = ("bf16", "int8", "int4")
# Decoding for the speed: new tokens, and how often; the best counts.
PROMPT, NEW, TRIES = "Once upon a time", 128, 3
# Logits of the model that others are compared with, kept to be computed once; above it they are computed each time.
MOST_LOGITS = 1 << 30
STEP = 32


@dataclass(frozen=True)
class Job:
    """One evaluation. ``table``: what is done to the per-layer embeddings, "zeroed" or "int8"; nothing if empty."""

    slice: str
    precision: str
    head: str
    table: str = ""


# What runs in a process of its own


@contextmanager
def opened(options: argparse.Namespace, job: Job) -> Iterator[Session]:
    """A session of a slice at a precision, and at a head, which no flag pins."""
    request = Request(slice=job.slice, precision=job.precision, context=options.context)
    with mock.patch("edge.session.pick", lambda plans, _: next(p for p in plans if p.recipe.head == job.head)):
        session = open_session(options.model, request, "cpu", "auto", text=True)
    with session:
        if job.table:
            spoil(session, job.table)
        yield session


def spoil(session: Session, table: str) -> None:
    """Rows of the per-layer embeddings become zeros, or what int8 leaves of them."""
    rows, gather = session.engine.rows, session.engine.rows.gather

    def rounded(ids: np.ndarray) -> Any:
        found = gather(ids)
        _, layers, dim = found.shape
        records = quantize_rows(np.ascontiguousarray(found.numpy()), table)
        return found.new_tensor(dequantize_rows(records, layers, dim, table))

    rows.gather = rounded if table != "zeroed" else lambda ids: gather(ids) * 0


class Remembered:
    """A forward pass whose answers are kept: a second run over the same text gets the first one's."""

    def __init__(self, session: Session) -> None:
        self.engine_forward, self.seen, self.at, self.whole = session.engine.forward, [], 0, False
        session.engine.forward = self.forward

    def forward(self, ids: np.ndarray, which: str, ahead: Any) -> np.ndarray:
        """As an engine's."""
        if not self.whole:
            self.seen.append((ids.copy(), self.engine_forward(ids, which, ahead).copy()))
        self.at += 1
        known, logits = self.seen[self.at - 1]
        assert np.array_equal(known, ids), "another text, or in other pieces"
        return logits

    def rewind(self) -> None:
        """A run over the whole text ended."""
        self.at, self.whole = 0, True


def scores_here(options: argparse.Namespace, jobs: list[Job], compared: bool) -> list[dict[str, Any]]:
    """Loss and, with ``compared``, distance from the float32 full model, one job after another."""
    found: list[dict[str, Any]] = []
    with opened(options, Job("full", "float32", "float32")) as reference:
        text = read_text(options.text, reference.tokenizer, options.tokens)
        memory = Remembered(reference) if len(text.ids) * reference.model.vocab * 4 <= MOST_LOGITS else None
        for job in jobs:
            with opened(options, job) as session:
                against = reference if compared else None
                score = evaluate(session, text, stride=session.plan.context, reference=against)
                result = measured_of(session, score, text).as_dict()
            if memory is not None and compared:
                memory.rewind()
            say(f"{job.slice} {job.precision} {job.head} {job.table}: {score.loss:.4f}, {score.tps:.0f} tokens/s")
            found.append({"slice": result.pop("name"), **result, "stride": score.stride})
    return found


def speed_here(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Greedy decoding, and the peak of this process, which does nothing else."""
    with opened(options, job) as session:
        prompt, seconds = session.tokenizer.encode(PROMPT), []
        for _ in range(TRIES):
            session.reset()
            out = session.step(prompt)
            start = time.perf_counter()
            for _ in range(NEW):
                token = int(out.argmax())
                session.prefetch(token)
                out = session.step([token])
            seconds.append(time.perf_counter() - start)
        return {"decode_tps": NEW / min(seconds), "peak_bytes": session.memory()["peak_bytes"]}


def calibrate_here(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The best slice of each of some sizes, chosen on text that is not scored."""

    def notify(what: str, done: int, total: int) -> None:
        if what == "measuring slices" and done % 10 == 0:
            say(f"calibrating: {done} of at most {total} measured")

    with text_behind(options) as file:
        found = calibrate(
            options.model, file, points=POINTS, precision="bf16", context=options.context,
            tokens=options.calibrate_tokens, notify=notify,
        )  # fmt: skip
    about = {"chosen_tokens": found.tokens, "evaluations": found.evaluations}
    winners = [(choice.budget, choice.winner) for choice in found.choices]
    return [
        {"slice": w.part.name, "budget_bytes": budget, "chosen_loss": w.loss, "held_loss": w.held, **about}
        for budget, w in winners
    ]


@contextmanager
def text_behind(options: argparse.Namespace) -> Iterator[Path]:
    """A file of the text that follows what is scored. Raises BadCheckpoint where there is too little."""
    with opened(options, Job("full", "bf16", "bf16")) as session:
        scored = read_text(options.text, session.tokenizer, options.tokens).bytes
    with closing(open_text(options.text, None)) as stream:
        rest = b"".join(blocks(stream, options.text))[scored:]
    if len(rest) < LEAST_TOKENS:
        raise BadCheckpoint("nothing behind the tokens to score", file=options.text, hint="Give fewer --tokens")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        path.write_bytes(rest)
        yield path


def child(options: argparse.Namespace, order: dict[str, Any]) -> Any:
    """Carries out an order in a fresh process; what it answers."""
    line = [sys.executable, "-m", "benchmarks.quality", str(options.model), "--text", str(options.text)]
    line += ["--tokens", str(options.tokens), "--calibrate-tokens", str(options.calibrate_tokens)]
    done = subprocess.run([*line, "--child", json.dumps(order)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{order['do']}: exit {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def obey(options: argparse.Namespace, order: dict[str, Any]) -> Any:
    """The other end of :func:`child`."""
    jobs = [Job(**job) for job in order.get("jobs", ())]
    if order["do"] == "scores":
        return scores_here(options, jobs, order["compared"])
    return speed_here(options, jobs[0]) if order["do"] == "speed" else calibrate_here(options)


# What gives the orders


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


class Planned:
    """What `edge plan` says of slices: bytes, before anything is loaded."""

    def __init__(self, path: Path, context: int) -> None:
        self.context = context
        with closing(open_source(path)) as source:
            self.source = source
            self.floor, self.request = plan_floor(source, Request(context=context), "cpu", "auto")

    def facts(self, job: Job) -> dict[str, Any]:
        """Of the plan that an unlimited budget gives a slice at a recipe. ``least_bytes``: of its smallest plan."""
        want = Request(slice=job.slice, precision=job.precision, context=self.context, engine=self.request.engine)
        plans = [p for p in enumerate_plans(self.source, want, self.floor) if p.recipe.head == job.head]
        plan = plans[0]
        return {
            "ple": plan.ple, "kv": plan.kv, "chunk": plan.chunk, "planned": plan.bytes,
            "planned_bytes": plan.total_bytes, "weights_bytes": plan.bytes["weights"],
            "least_bytes": min(p.total_bytes for p in plans),
        }  # fmt: skip


def between(model: Model) -> list[str]:
    """Slices of one width that nobody trained: multiples of 32 between the narrowest and the widest that was."""
    assert model.nested is not None
    least, most = min(model.nested.widths), max(layer.ffn.width for layer in model.layers)
    step = max(STEP, (most - least) // POINTS // STEP * STEP)
    widths = (w for w in range(least + step, most, step) if w not in model.nested.widths)
    return [slice_of(model, [w] * len(model.layers)).name for w in widths]


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every line of the results: case "slice", "table", "uniform" (a width in between) and "calibrated"."""
    planned = Planned(options.model, options.context)
    model, family = planned.source.model, planned.source.family
    names = [item.slice.name for item in candidates(model, family)]
    jobs = [Job(name, r.precision, r.head) for name in names for p in PRECISIONS for r in recipes(p)]
    tables = [Job("full", "bf16", "bf16", table) for table in ("zeroed", "int8") if model.ple is not None]
    scores = child(options, {"do": "scores", "compared": True, "jobs": [asdict(job) for job in (*jobs, *tables)]})
    for job, score in zip(jobs, scores, strict=False):
        speed = child(options, {"do": "speed", "jobs": [asdict(job)]}) if options.speed else {}
        if speed:
            say(f"{job.slice} {job.precision} {job.head}: {speed['decode_tps']:.1f} tokens/s")
        yield {"case": "slice", **score, **planned.facts(job), **speed}
    for job, score in zip(tables, scores[len(jobs) :], strict=True):
        yield {"case": "table", "table": job.table, **score}
    if model.nested is None:
        return
    winners = {w["slice"]: w for w in child(options, {"do": "calibrate"})}
    curve = [("uniform", name, {}) for name in between(model)] + [("calibrated", n, w) for n, w in winners.items()]
    jobs = [Job(name, "bf16", "bf16") for _, name, _ in curve]
    scores = child(options, {"do": "scores", "compared": False, "jobs": [asdict(job) for job in jobs]})
    for (case, _, facts), job, score in zip(curve, jobs, scores, strict=True):
        yield {"case": case, **facts, **score, **planned.facts(job)}


def results_of(lines: Iterable[dict[str, Any]]) -> tuple[Measured, ...]:
    """What the planner may use: slices at every precision, and what was calibrated."""
    names = [field.name for field in fields(Measured) if field.name != "name"]
    cases = ("calibrated", "slice")
    lines = sorted((line for line in lines if line["case"] in cases), key=lambda line: cases.index(line["case"]))
    found = (
        Measured(line["slice"], *(tuple(v) if isinstance(v := line[n], list) else v for n in names)) for line in lines
    )
    return merge((), found)


def write(path: Path, data: bytes) -> None:
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N")
    parser.add_argument("--calibrate-tokens", type=int, default=CALIBRATE_TOKENS, metavar="N")
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plot-only", action="store_true", help="draw the picture again from the results")
    parser.add_argument("--budgets", action="store_true", help="the same prompt under three budgets, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.text is None and not (options.plot_only or options.budgets):
        parser.error("--text FILE is needed")
    options.model = options.model or model_path()
    return options


def main() -> None:
    """Runs what was asked for."""
    options = parse_args()
    results = options.out / "quality.jsonl"
    if options.budgets:
        demo_budgets.record(options.out / "demo_budgets.jsonl")
    elif options.plot_only:
        plots.quality([json.loads(line) for line in results.read_text().splitlines()], options.out / "quality.png")
    else:
        with closing(open_source(options.model)) as source:
            options.context = min(CONTEXT, source.model.context)
        if options.child:
            print(json.dumps(obey(options, json.loads(options.child))))
            return
        options.out.mkdir(parents=True, exist_ok=True)
        run(options, results)


def run(options: argparse.Namespace, results: Path) -> None:
    """Measures, and writes lines, picture and what the planner reads."""
    demo, started = options.model.resolve() == FOLDER, time.perf_counter()
    machine = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    about = {"model": "demo" if demo else options.model.name, "file": options.text.name, **machine}
    lines = [{**line, **about, "date": time.strftime("%Y-%m-%d")} for line in measure(options)]
    write(results, "".join(json.dumps(line) + "\n" for line in lines).encode())
    place = FOLDER if demo and options.out.resolve() == RESULTS else options.out
    write(place / NAME, dump(results_of(lines)))
    plots.quality(lines, options.out / "quality.png")
    say(f"{len(lines)} results in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
