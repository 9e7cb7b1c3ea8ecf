"""What of a machine makes models slower or smaller than they need be, and what to do about it: a line each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edge.budget.units import format_bytes
from edge.profile.cpu import held_back

# Seconds of a random read that no SSD takes.
SLOW = 2e-3


def advice(facts: dict[str, Any]) -> list[str]:
    """Short lines, what matters most first. ``facts`` as ``machine_facts`` has them."""
    return [*about_engines(facts), *about_cores(facts["cpu"]), *about_memory(facts), *about_disk(facts)]


def about_engines(facts: dict[str, Any]) -> Iterator[str]:
    """What could compute and does not."""
    engines, gpus = facts["engines"], facts["gpus"]
    if not engines["native"]["available"]:
        yield f"no native engine: {engines['native']['why']}"
    elif facts["cpu"]["vector"] == "any":
        yield "no kernels are made for this CPU: portable ones decode several times slower"
    if any(gpu["hidden"] for gpu in gpus):
        yield "CUDA_VISIBLE_DEVICES hides the GPU: edge runs on the CPU"
    elif gpus and not engines["torch"]["available"]:
        yield "there is a GPU and no torch to use it: pip install torch"
    elif gpus and "cuda" not in engines["torch"]["devices"]:
        yield "there is a GPU, but this torch was built without CUDA: install another build of torch"


def about_cores(cpu: dict[str, Any]) -> Iterator[str]:
    """What keeps it from computing on all of the processor."""
    threads = f"edge computes with {count(cpu['threads'], 'thread')}"
    usable, logical = cpu["usable_cores"], cpu["logical_cores"]
    cores = min(usable, cpu["physical_cores"] or usable)
    if cpu["quota_cores"] is not None and cpu["quota_cores"] < usable:
        yield f"a CPU quota of {cpu['quota_cores']:.3g} cores ({cpu['quota_source']}): {threads}"
    if usable < logical:
        yield f"this process may use {usable} of {logical} CPUs (taskset, or a container's cpuset)"
    if cpu["threads_named"] and cpu["threads"] < cores:
        yield f"OMP_NUM_THREADS is set: {threads}, and there are {cores} cores. Unset it, or give --threads"
    slow = held_back(cpu["clock"]) if cpu["clock"] else None
    if slow:
        yield slow


def about_memory(facts: dict[str, Any]) -> Iterator[str]:
    """Less than there is, or slower."""
    memory, system = facts["memory"], facts["system"]
    least = min(facts["limits"], key=lambda limit: limit["limit_bytes"], default=None)
    if least is not None and least["limit_bytes"] < memory["total_bytes"]:
        size = f"{format_bytes(least['limit_bytes'])} ({least['source']})"
        if least["source"].startswith("cgroup"):
            yield f"a memory limit of {size}: without --budget, edge takes 4/5 of what it leaves"
        else:
            yield f"a limit of {size}: files that are mapped count in full, and a larger model stops midway"
    if memory["huge_pages"] == "never":
        yield (
            "transparent huge pages are off: decoding is about a fifth slower. "
            "As root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )
    if system["power"] == "battery":
        yield "on battery: most laptops slow down to save it. Plug it in to measure"


def about_disk(facts: dict[str, Any]) -> Iterator[str]:
    """Where tables are streamed from."""
    disk = facts["disk"]
    if disk is None:
        if facts["disk_why"] and "in memory" in facts["disk_why"]:
            yield "the cache lies in memory: packs there take it from models. Set EDGE_CACHE to a folder on a disk"
    elif disk["one_4k"]["p50_s"] > SLOW:
        wait = disk["one_4k"]["p50_s"] * 1e3
        yield f"a slow disk, {wait:.1f} ms a read: --ple ram keeps per-layer embeddings off it, if they fit"


def count(number: int, what: str) -> str:
    """'1 thread', '2 threads'."""
    return f"{number} {what}{'' if number == 1 else 's'}"
