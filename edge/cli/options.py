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
OPTIONS = (
    click.option("--budget", metavar="SIZE", help="All the memory the run may use: 2GB, 1.5GiB, bytes."),
    click.option("--ram-budget", metavar="SIZE", help="On a GPU: the host memory the run may use."),
    click.option("-c", "--context", "--ctx-size", type=int, metavar="N", help="Tokens of context."),
    click.option("--device", metavar="auto|cpu|cuda|mps", help="Where to run.", **AUTO),
    click.option("--engine", metavar="auto|native|torch|ort", help="What runs it.", **AUTO),
    click.option("--slice", metavar="NAME", help="A slice: E2B, half, ffn=8192x20,16384x15, a JSON file.", **AUTO),
    click.option("--precision", metavar="auto|int4|int8|bf16|float32", help="Of the weights.", **AUTO),
    click.option("--ple", metavar="auto|device|ram|ssd", help="Where the per-layer embeddings live.", **AUTO),
    click.option("--kv", metavar="auto|int8|bf16|float32", help="Precision of the cache of keys and values.", **AUTO),
)


def planning(command: F) -> F:
    """Everything that decides a plan."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Wanted:
    """A request, and the sentence about the budget when none was given."""

    request: Request
    note: str | None


def wanted(
    budget: str | None, ram_budget: str | None, context: int | None, slice: str, precision: str, ple: str, kv: str
) -> Wanted:
    """The request that flags make; without a budget, four fifths of what is free."""
    size, note = (parse_bytes(budget), None) if budget is not None else default_budget()
    host = None if ram_budget is None else parse_bytes(ram_budget, "--ram-budget")
    return Wanted(Request(size, host, slice, precision, ple, kv, context), note)
