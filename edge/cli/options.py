"""Flags that several commands share, and what they mean as a planner's request. Named as llama.cpp names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from edge.budget.memory import default_budget
from edge.budget.plan import Request
from edge.budget.units import parse_bytes

F = TypeVar("F", bound=Callable[..., Any])


AUTO = {"default": "auto", "show_default": True}
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "budget": click.option("--budget", metavar="SIZE", help="All the memory the run may use: 2GB, 1.5GiB, bytes."),
    "ram-budget": click.option("--ram-budget", metavar="SIZE", help="On a GPU: the host memory the run may use."),
    "context": click.option("-c", "--context", "--ctx-size", type=int, metavar="N", help="Tokens of context."),
    "device": click.option("--device", metavar="auto|cpu|cuda|mps", help="Where to run.", **AUTO),
    "engine": click.option("--engine", metavar="auto|native|torch|ort", help="What runs it.", **AUTO),
    "slice": click.option(
        "--slice", metavar="NAME", help="A slice: E2B, half, ffn=8192x20,16384x15, a JSON file.", **AUTO
    ),
    "precision": click.option("--precision", metavar="auto|int4|int8|bf16|float32", help="Of the weights.", **AUTO),
    "ple": click.option("--ple", metavar="auto|device|ram|ssd", help="Where the per-layer embeddings live.", **AUTO),
    "kv": click.option(
        "--kv", metavar="auto|int8|bf16|float32", help="Precision of the cache of keys and values.", **AUTO
    ),
}

THREADS = click.option("-t", "--threads", type=int, metavar="N", help="On a CPU: threads.  [default: as many as cores]")
MMAP = click.option("--mmap/--no-mmap", default=None, help="Use weights where a pack's file is mapped.")
LOCK = click.option("--lock", is_flag=True, help="Keep the weights in memory: the system may not page them out.")


def planning(command: F) -> F:
    """Everything that decides a plan."""
    return planning_but()(command)


def planning_but(*names: str) -> Callable[[F], F]:
    """Everything that decides a plan but the options called so."""

    def add(command: F) -> F:
        for name in reversed(OPTIONS):
            command = command if name in names else OPTIONS[name](command)
        return command

    return add


@dataclass(frozen=True)
class Wanted:
    """A request, and the sentence about the budget when none was given."""

    request: Request
    note: str | None


def wanted(
    budget: str | None,
    ram_budget: str | None,
    context: int | None,
    slice: str,
    precision: str,
    ple: str,
    kv: str,
    threads: int | None = None,
    lock: bool = False,
    mmap: bool | None = None,
) -> Wanted:
    """The request that flags make; without a budget, four fifths of what is free."""
    size, note = (parse_bytes(budget), None) if budget is not None else default_budget()
    host = None if ram_budget is None else parse_bytes(ram_budget, "--ram-budget")
    return Wanted(Request(size, host, slice, precision, ple, kv, context, threads=threads, lock=lock, mmap=mmap), note)
