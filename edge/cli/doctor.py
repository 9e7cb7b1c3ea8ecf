"""``edge doctor``: what this machine is, how fast its memory and disk read, what can compute, what holds it back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge.budget.units import format_bytes
from edge.cli.show import print_json, progress, stderr, stdout
from edge.profile.advice import count
from edge.profile.facts import machine_facts
from loaders.errors import Usage

Line = tuple[str, str]


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured lately.")
@click.option("--measure/--no-measure", default=True, help="Time memory and disk, 3 seconds.  [default: measure]")
def command(as_json: bool, fresh: bool, measure: bool) -> None:
    """Say what this machine is and what holds it back: processor, memory and limits, disk, GPUs, engines.

    How fast memory and disk read is measured and kept, memory's for an hour, the disk's for a week. The disk is that of
    edge's cache; set EDGE_CACHE to ask about another.
    """
    if fresh and not measure:
        raise Usage("--no-measure", field="--fresh", expected="one of the two")
    with progress(stderr(), not as_json) as notify:
        facts = machine_facts(measure=measure, fresh=fresh, notify=notify)
    if as_json:
        print_json(facts)
    else:
        show(facts, stdout())


def show(facts: dict[str, Any], console: Console) -> None:
    """Sections: a name, and lines beside it."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    sections = (
        ("cpu", cpu_lines(facts["cpu"], facts["system"])),
        ("memory", memory_lines(facts)),
        ("disk", disk_lines(facts)),
        ("gpu", gpu_lines(facts["gpus"])),
        ("engines", engine_lines(facts["engines"], facts["cpu"])),
        ("energy", energy_lines(facts["energy"])),
        ("system", system_lines(facts["system"])),
        ("advice", facts["advice"] or ["nothing holds this machine back that edge knows of"]),
    )
    for name, lines in sections:
        for i, line in enumerate(lines):
            table.add_row("" if i else name, Text(line))
    console.print(table)


def cpu_lines(cpu: dict[str, Any], system: dict[str, Any]) -> Iterator[str]:
    """What it is, how much of it edge uses, and with which instructions."""
    virtual = "" if system["virtual_machine"] is None else ", in a virtual machine"
    yield f"{cpu['name']}, {cpu['architecture']}{virtual}"
    physical = "" if cpu["physical_cores"] is None else f"{count(cpu['physical_cores'], 'core')}, "
    some = "" if cpu["usable_cores"] == cpu["logical_cores"] else f", {cpu['usable_cores']} for this process"
    quota = "" if cpu["quota_cores"] is None else f", a quota of {cpu['quota_cores']:.3g}"
    logical = count(cpu["logical_cores"], "CPU")
    yield f"{physical}{logical}{some}{quota}: edge computes with {count(cpu['threads'], 'thread')}"
    flags = f" ({' '.join(cpu['flags'])})" if cpu["flags"] else ""
    yield f"vectors: {cpu['vector']}{flags}"
    clock = cpu["clock"]
    if clock is not None:
        most = f", up to {clock['most_mhz']} MHz" if clock["most_mhz"] else ""
        preference = f", preference {clock['preference']}" if clock["preference"] else ""
        yield f"clock: governor {clock['governor']}{preference}{most}"


def memory_lines(facts: dict[str, Any]) -> Iterator[str]:
    """How much, how fast, how limited."""
    memory = facts["memory"]
    swap = f"swap {format_bytes(memory['swap_bytes'])}" if memory["swap_bytes"] else "no swap"
    if memory["swap_used_bytes"]:
        swap += f" ({format_bytes(memory['swap_used_bytes'])} used)"
    yield f"{format_bytes(memory['total_bytes'])}, {format_bytes(memory['available_bytes'])} available, {swap}"
    read = facts["bandwidth_gbps"]
    threads = count(facts["cpu"]["threads"], "thread")
    yield "reading: not measured" if read is None else f"{threads} read {read:.1f} GB/s"
    yield f"large pages: {memory['huge_pages'] or 'none'}"
    for limit in facts["limits"]:
        used = "" if limit["used_bytes"] is None else f", {format_bytes(limit['used_bytes'])} used"
        yield f"limit: {format_bytes(limit['limit_bytes'])}{used} ({limit['source']})"
    if not facts["limits"]:
        yield "no limit set on this process"


def disk_lines(facts: dict[str, Any]) -> Iterator[str]:
    """What streams and loads come from."""
    disk = facts["disk"]
    if disk is None:
        yield facts["disk_why"]
        return
    device = f" on {disk['device']}" if disk["device"] else ""
    ahead = f", {disk['read_ahead_kb']} kB read ahead" if disk["read_ahead_kb"] is not None else ""
    yield f"{disk['folder']}{device}{ahead}"
    yield f"{format_bytes(int(disk['sequential']))}/s in order"
    for name, size in (("4k", "4 KB"), ("18k", "18 KB")):
        yield f"rows of {size}: {reads(disk[f'one_{name}'])}; 8 at once: {reads(disk[f'eight_{name}'])}"


def reads(found: dict[str, float]) -> str:
    """'8,130/s, 0.12 ms each'."""
    return f"{found['per_second']:,.0f}/s, {found['p50_s'] * 1e3:.2g} ms each"


def gpu_lines(gpus: list[dict[str, Any]]) -> Iterator[str]:
    """Each on a line."""
    for gpu in gpus:
        memory = "memory unknown" if gpu["memory_bytes"] is None else format_bytes(gpu["memory_bytes"])
        used = "" if gpu["used_bytes"] is None else f", {format_bytes(gpu['used_bytes'])} in use"
        hidden = ", hidden by CUDA_VISIBLE_DEVICES" if gpu["hidden"] else ""
        yield f"{gpu['name']}, {memory}{used}, driver {gpu['driver']}{hidden}"
    if not gpus:
        yield "none that NVIDIA's driver knows"


def engine_lines(engines: dict[str, dict[str, Any]], cpu: dict[str, Any]) -> Iterator[str]:
    """Each on a line: what it runs on, or why it does not; and how fast, where that was measured."""
    for name, engine in engines.items():
        if engine["available"]:
            kernels = f", kernels {' or '.join(cpu['kernels'])}" if name == "native" and cpu["kernels"] else ""
            yield f"{name:<7} {engine['version'] or 'of unknown version'} on {', '.join(engine['devices'])}{kernels}"
            for device, shares in engine["streams"].items():
                parts = ", ".join(f"{form} at {share:.0%}" for form, share in shares.items())
                yield f"{'':<7} decoding on {device} streams {parts} of the speed of memory"
        else:
            yield f"{name:<7} missing: {engine['why']}"


def energy_lines(energy: dict[str, Any]) -> Iterator[str]:
    """What counts joules."""
    yield energy["source"] or f"not counted: {energy['why']}"
    if "gpu" in energy:
        yield energy["gpu"]["source"] or f"not counted on the GPU: {energy['gpu']['why']}"


def system_lines(system: dict[str, Any]) -> Iterator[str]:
    """What it runs on."""
    versions = system["versions"]
    commit = f" ({versions['commit']})" if versions["commit"] else ""
    power = f", on {system['power']}" if system["power"] else ""
    yield f"{system['name']} {system['release']}{power}"
    yield f"edge {versions['edge']}{commit}, Python {versions['python']}, numpy {versions['numpy']}"
    yield f"cache {system['cache']}"
