"""edge's engines for the CPU beside other programs: prefill, decoding, memory and bytes read, in turns in one run.

    python -m benchmarks.peers [--peers-python PATH] [--cases llama-3.2-1B,...] [--engines native,llama.cpp] [--keep]

Random weights at true shapes: edge's pack in int4 with an int8 head, and for llama.cpp a GGUF file of Q4_0 and Q8_0 of
the same bytes, tensor by tensor. Every measurement is a process of its own; engines take turns, and how fast memory
reads is measured around each. Peers live in an environment of their own (peers-constraints.txt says how to make it),
which --peers-python or EDGE_PEERS_PYTHON names. Weights are made in --work, two to four gigabytes a case, and removed
unless --keep. Replaces the lines of what it measured in results/peers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil

from benchmarks.peers_measure import Asked
from edge.profile import gguf as gguf_file
from edge.profile.noise import Around
from loaders.network.spec import Model
from loaders.sketch import sketch

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "loaders" / "configs"
RESULTS = Path(__file__).parent / "results" / "peers.jsonl"
# The yardstick, and who else there is.
PEER, OPENVINO = "llama.cpp", "openvino"
PEERS = {PEER: "benchmarks.peers_llama", OPENVINO: "benchmarks.peers_openvino"}
EDGE = ("native", "torch", "ort")
READ_BYTES, READ_TRIES = 1 << 30, 3
# Cores that other programs keep busy beyond which a measurement is not one.
BUSY = 0.1
# What is measured, and what of it is a speed that ratios are made of.
SPEEDS = ("prefill_tps", "decode_tps", "long_prefill_tps", "long_tps")
MEDIANS = (*SPEEDS, "load_s", "read_gbps", "others")
MOST = ("peak_bytes", "anonymous_bytes", "file_bytes")
# Turns that also decode far into a long context: reading that far takes most of a minute or more.
LONG_TURNS = 1


@dataclass(frozen=True)
class Case:
    """A model's shapes; tokens of its prompt, and of the long context where it is decoded in one too.

    ``unknown``: engines that do not know the architecture.
    """

    name: str
    prompt: int
    long: int = 0
    short: int = 32
    new: int = 64
    unknown: tuple[str, ...] = ()

    def asked(self, model: Model, threads: int) -> Asked:
        """What a process measures, without the file; ids are those that every table of the model has."""
        vocab = model.ple.rows if model.ple is not None else model.vocab
        context = -(-(max(self.prompt, self.short, self.long) + self.new) // 256) * 256
        return Asked(
            "",
            vocab,
            threads,
            context,
            self.prompt,
            self.short,
            self.new,
            self.long,
            "auto" if model.ple is None else "ssd",
        )


CASES = {
    case.name: case
    for case in (
        Case("llama-3.2-1B", 512, 4096),
        Case("qwen3-0.6B", 512),
        Case("gemma-3n-E2B", 256, unknown=(OPENVINO,)),
    )
}


class Failed(Exception):
    """An engine that does not run a case here, in its own words."""


def read_gbps(threads: int) -> float:
    """GB/s of plain reading with so many threads: the best of a few passes over memory no cache holds."""
    shares = np.array_split(np.ones(READ_BYTES // 8), threads)
    best: float = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(READ_TRIES):
            start = time.perf_counter()
            list(pool.map(np.max, shares))
            best = min(best, time.perf_counter() - start)
    return READ_BYTES / best / 1e9


def command(engine: str, what: Asked, options: argparse.Namespace) -> list[str]:
    """The process that measures an engine."""
    if engine in PEERS:
        return [options.peers_python, "-m", PEERS[engine], what.to_json()]
    return [sys.executable, "-m", "benchmarks.peers_edge", engine, what.ple, what.to_json()]


def once(engine: str, what: Asked, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a process of its own, with the bandwidth around it and ``others``, the cores others used."""
    start, around = time.perf_counter(), Around(partial(read_gbps, what.threads))
    with around:
        said = run(command(engine, what, options), {"OMP_NUM_THREADS": str(what.threads)})
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    gbps, wall = (around.before + around.after) / 2, time.perf_counter() - start
    return {**found, "read_gbps": gbps, "others": round(around.others, 2), "wall_s": round(wall, 1)}


def weights(case: Case, engine: str, options: argparse.Namespace) -> Path:
    """What an engine loads, made where it is not there yet."""
    config, work = CONFIGS / f"{case.name}.json", options.work
    if engine in PEERS:
        gguf = written(config, work / f"{case.name}.gguf")
        return gguf if engine == PEER else graph(gguf, work / f"{case.name}.openvino", options)
    pack = packed(config, work / f"{case.name}.pack")
    package = work / f"{case.name}.package"
    if engine == "ort" and not package.exists():
        say(f"{case.name}: exporting")
        run([sys.executable, "-m", "edge", "export", str(pack), "-o", str(package), "-q", "--no-check"])
    return package if engine == "ort" else pack


def run(line: list[str], settings: Mapping[str, str] = MappingProxyType({})) -> str:
    """A program's output, with settings in its environment. Raises Failed with its last words."""
    env = {**os.environ, **settings}
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300])
    return done.stdout


def written(config: Path, gguf: Path) -> Path:
    """llama.cpp's file of random weights."""
    if not gguf.exists():
        say(f"{config.stem}: writing a GGUF file")
        partial = gguf.with_suffix(".partial")
        gguf_file.write(sketch(config).model, partial)
        partial.rename(gguf)
    return gguf


def graph(gguf: Path, folder: Path, options: argparse.Namespace) -> Path:
    """OpenVINO's graph of such a file."""
    found = folder / "openvino_model.xml"
    if not found.exists():
        say(f"{gguf.stem}: making a graph of the GGUF file")
        folder.mkdir(exist_ok=True)
        run([options.peers_python, "-m", PEERS[OPENVINO], "--make", str(gguf), str(folder)])
    return found


def packed(config: Path, pack: Path) -> Path:
    """A pack of random weights; the checkpoint it is made of goes at once."""
    from loaders.checkpoint import Checkpoint
    from loaders.formats.synthetic import write_random
    from loaders.packing import write_pack

    if not pack.exists():
        say(f"{config.stem}: making a pack")
        checkpoint = pack.with_suffix(".checkpoint")
        try:
            write_random(config, checkpoint)
            write_pack(Checkpoint.open(checkpoint), pack, ("int4",))
        finally:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return pack


def measure(case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each engine that runs: medians, and every turn. An engine that fails says so and is left out."""
    model = sketch(CONFIGS / f"{case.name}.json").model
    what = case.asked(model, options.threads)
    files: dict[str, Path] = {}
    runs: dict[str, list[dict[str, Any]]] = {e: [] for e in options.engines if e not in case.unknown}
    for turn in range(options.repeats):
        for engine in [engine for engine in options.engines if engine in runs]:
            try:
                if engine not in files:
                    files[engine] = weights(case, engine, options)
                long = what.long if turn < LONG_TURNS else 0
                found = once(engine, replace(what, file=str(files[engine]), long=long), options)
            except Failed as error:
                say(f"{case.name}, {engine}: {error}")
                del runs[engine]
                continue
            runs[engine].append(found)
            say(f"{case.name}, {engine}, {turn + 1} of {options.repeats}: {summary(found)}")
    size = gguf_file.bytes_per_token(model)
    facts = {"threads": options.threads, "bytes_per_token": size, **machine()}
    for engine, turns in runs.items():
        yield summed(case, engine, turns, facts)


def machine() -> dict[str, str]:
    """Where and when; ``run``: what was measured in turns has the same."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"machine": names[0] if names else platform.machine(), "run": time.strftime("%Y-%m-%d %H:%M:%S")}


def summed(case: Case, engine: str, turns: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """The line of an engine in a case. ``gbps``: weights read while decoding, as many bytes as edge says it reads."""
    middle = {key: statistics.median(t[key] for t in turns if key in t) for key in MEDIANS if key in turns[0]}
    most, last = {key: max(t[key] for t in turns) for key in MOST}, turns[-1]
    size = last.get("bytes_per_token", facts["bytes_per_token"])
    about = {"case": case.name, "engine": engine, "prompt": case.prompt, "short": case.short, "long": case.long}
    said: dict[str, Any] = {key: last[key] for key in ("version", "plan", "planned_bytes") if key in last}
    kept = ("read_gbps", "others", "wall_s", *SPEEDS)
    return {
        **about, **facts, **said, **middle, **most,
        "bytes_per_token": size, "gbps": middle["decode_tps"] * size / 1e9,
        "runs": [{key: t[key] for key in kept if key in t} for t in turns],
    }  # fmt: skip


def summary(found: dict[str, Any]) -> str:
    """A turn for people."""
    long = f", far in {found['long_tps']:.1f}" if "long_tps" in found else ""
    busy = f"; OTHERS USED {found['others']} CORES" if found["others"] > BUSY else ""
    return (
        f"prefill {found['prefill_tps']:.1f}, decode {found['decode_tps']:.1f}{long} tokens/s, peak "
        f"{found['peak_bytes'] / 1e6:,.0f} MB; memory reads {found['read_gbps']:.1f} GB/s{busy}; {found['wall_s']} s"
    )


def ratio(line: dict[str, Any], peer: dict[str, Any] | None, key: str) -> float | None:
    """How many times as fast as the peer: the median of turns that followed each other; None where none did."""
    if peer is None or peer["run"] != line["run"]:
        return None
    pairs = zip(line["runs"], peer["runs"], strict=False)
    found = [a[key] / b[key] for a, b in pairs if key in a and key in b]
    return statistics.median(found) if found else None


def peers_table(lines: Sequence[dict[str, Any]] | None = None) -> str:
    """Cases by engines, each beside llama.cpp, as Markdown."""
    found = kept_lines(RESULTS) if lines is None else lines
    if not found:
        return "Not measured yet."
    rows = [
        f"| model | engine | prefill, tokens/s | x {PEER} | decode, tokens/s | x {PEER} | far in | x {PEER} "
        "| peak memory | weights read |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in found:
        peer = next((x for x in found if (x["case"], x["engine"]) == (line["case"], PEER)), None)
        cells = [line["case"], line["engine"] if line["engine"] not in EDGE else f"edge, {line['engine']}"]
        for key in ("prefill_tps", "decode_tps", "long_tps"):
            times = ratio(line, peer, key) if line is not peer else None
            cells += [f"{line[key]:.1f}" if key in line else "", "" if times is None else f"{times:.2f}x"]
        cells.append(f"{line['peak_bytes'] / 1e6:,.0f} MB, {line['anonymous_bytes'] / 1e6:,.0f} own")
        cells += [f"{line['gbps']:.1f} of {line['read_gbps']:.0f} GB/s"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", notes(found)])


def notes(lines: Sequence[dict[str, Any]]) -> str:
    """What the figures are of."""
    first = lines[0]
    prompts = ", ".join(f"{x['prompt']} ({x['case']})" for x in {x["case"]: x for x in lines}.values())
    far = next((f"; far in, after {x['long']:,}, in {LONG_TURNS} turn" for x in lines if "long_tps" in x), "")
    versions = ", ".join(dict.fromkeys(x["version"] for x in lines))
    busy = max(run["others"] for x in lines for run in x["runs"])
    noise = "" if busy <= BUSY else f" Other programs kept up to {busy:.1f} cores busy meanwhile."
    return (
        f"Random weights at the true shapes, int4 with an int8 head (Q4_0 and Q8_0), {first['threads']} threads "
        f"({first['machine']}), {first['run'][:10]}. Medians of {len(first['runs'])} processes of each engine in "
        f"turns; ratios: of turns that followed each other. Prompts: {prompts} tokens. Decoding: the median token of "
        f"{CASES[first['case']].new} after {first['short']}{far}. Peak: VmHWM, mapped pages of files included; own: at "
        "the end, those left out. Weights read: bytes of a token's weights times decode, beside what plain reading "
        f"reached around it. {versions}.{noise}"
    )


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Old lines but those measured anew, in the order of cases, edge's engines first."""
    found = {(line["case"], line["engine"]): line for line in (*old, *new)}
    order = [*EDGE, *PEERS]
    return sorted(found.values(), key=lambda x: (list(CASES).index(x["case"]), order.index(x["engine"])))


def kept_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file of results; none before there is one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def parsed() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default=os.environ.get("EDGE_PEERS_PYTHON"))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--engines", default=",".join(("native", *PEERS)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--short-only", action="store_true", help="leave out the long context")
    parser.add_argument("--work", type=Path, help="where weights are made, and found if --keep left them")
    parser.add_argument("--keep", action="store_true", help="leave the weights in --work")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.cases, options.engines = options.cases.split(","), options.engines.split(",")
    wrong = ({*options.cases} - {*CASES}) | ({*options.engines} - {*EDGE, *PEERS})
    if wrong or options.repeats < 1:
        parser.error(f"no such case or engine: {', '.join(sorted(wrong))}" if wrong else "--repeats: 1 or more")
    if not options.peers_python and {*PEERS} & {*options.engines}:
        parser.error("peers need --peers-python or EDGE_PEERS_PYTHON")
    if options.keep and options.work is None:
        parser.error("--keep needs --work")
    return options


def main() -> int:
    """Measures, prints the table, replaces the results."""
    options, lines = parsed(), []
    with tempfile.TemporaryDirectory(prefix="edge-peers-") as place:
        options.work = (options.work or Path(place)).resolve()
        options.work.mkdir(parents=True, exist_ok=True)
        for name in options.cases:
            case = replace(CASES[name], long=0) if options.short_only else CASES[name]
            lines += list(measure(case, options))
            if not options.keep:
                for path in options.work.glob(f"{name}.*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    every = merged(kept_lines(options.out), lines)
    options.out.write_text("".join(json.dumps(line) + "\n" for line in every))
    print(peers_table(every))
    wanted = [(name, e) for name in options.cases for e in options.engines if e not in CASES[name].unknown]
    return 0 if len(lines) == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
