"""The Jinja environment chat templates run in: transformers' names, Jinja's sandbox, and a bound on cost."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, MappingView
from datetime import datetime
from functools import wraps
from typing import Any

from loaders.errors import Usage

_FILTERS = (
    "abs capitalize count d default dictsort first float int items last length lower map max min "
    "reject rejectattr reverse select selectattr sort string title trim unique upper"
)
_STR_METHODS = (
    "capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal isdigit islower "
    "isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind "
    "rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS.split()),
    list: frozenset({"count", "index", "copy"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
}


class TooMuch(Exception):
    """A template asked for too much."""


class Cost:
    """What one rendering has used. All limits are far above what a chat template needs."""

    OUTPUT = 1 << 20  # characters of the prompt
    VALUE = 2 << 20  # characters and items in one value, fully expanded
    TOTAL = 32 << 20  # the same, over all values built
    STEPS = 500_000
    SECONDS = 2.0
    RANGE = 10_000

    def begin(self, now: datetime) -> None:
        """Starts a rendering that takes place at ``now``."""
        self.now, self.total, self.steps, self.deadline = now, 0, 0, time.monotonic() + self.SECONDS

    def step(self) -> None:
        """Counts a loop's turn or a call."""
        self.steps += 1
        if self.steps > self.STEPS:
            raise TooMuch(f"more than {self.STEPS} steps")
        if time.monotonic() > self.deadline:
            raise TooMuch(f"more than {self.SECONDS:g} seconds")

    def need(self, size: int) -> None:
        """Refuses a value of ``size`` before it is built."""
        if size > self.VALUE:
            raise TooMuch(f"a value of {size if size < 10**18 else 'very many'} characters")

    def kept(self, value: Any) -> Any:
        """Measures a value just built, and hands it on."""
        self.step()
        size = self.measure(value)
        self.total += size
        if self.total > self.TOTAL:
            raise TooMuch("too much text built")
        return value

    def measure(self, value: Any) -> int:
        """Characters and items of ``value``; a part that occurs twice counts twice."""
        if isinstance(value, str):
            self.need(len(value))
            return len(value)
        if not isinstance(value, list | tuple | dict | MappingView):
            return 1
        size, todo = 0, [value]
        while todo:
            item = todo.pop()
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, dict):
                todo += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | MappingView):
                todo += item  # type: ignore[arg-type]
            size += 8
            self.need(size + 8 * len(todo))
        return size

    def ticking(self, values: Iterable[Any]) -> Iterator[Any]:
        """``values``, counting each."""
        for value in values:
            self.step()
            yield value

    def concat(self, parts: Iterable[str]) -> str:
        """Joins what a macro or block wrote."""
        parts = list(parts)
        self.need(sum(map(len, parts)))
        return str(self.kept("".join(parts)))

    def collect(self, parts: Iterable[str]) -> str:
        """Joins the output."""
        out, size = [], 0
        for part in parts:
            self.step()
            size += len(part)
            if size > self.OUTPUT:
                raise TooMuch(f"more than {self.OUTPUT} characters of prompt")
            out.append(part)
        return "".join(out)

    def joined(self, *values: Any) -> str:
        """The ``~`` operator."""
        return self.concat(map(str, values))

    def join(self, values: Iterable[Any], between: str = "") -> str:
        """str.join, of anything."""
        texts = [str(v) for v in self.ticking(values)]
        self.need(sum(map(len, texts)) + len(texts) * len(between))
        return between.join(texts)

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        """str.replace."""
        times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
        self.need(len(text) + times * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def percent(self, text: str, values: Any) -> str:
        """str % values."""
        if re.search(r"%(\([^)]*\))?[^a-zA-Z%]*(\d{4}|\*)", text):
            raise TooMuch("a format that wide, or with a width from its arguments")
        self.need(len(text) + text.count("%") * (self.measure(values) + 1000))
        return str(text % values)

    def binop(self, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, refused if its result would be huge."""
        self.step()
        if operator == "%" and isinstance(left, str):
            return self.kept(self.percent(left, right))
        for a, b in ((left, right), (right, left)):
            if operator == "*" and isinstance(a, str | list | tuple) and isinstance(b, int):
                self.need(self.measure(a) * max(int(b), 0))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(int(right), 1) if operator == "**" else 1) + right.bit_length()
            if operator in "**" and bits > 4096:
                raise TooMuch("a number that long")
        if operator == "+" and isinstance(left, str | list | tuple):
            self.need(self.measure(left) + self.measure(right))
        return None

    def method(self, owner: Any, name: str, args: tuple[Any, ...]) -> None:
        """Refuses a method of a plain value that is not known to be cheap."""
        if name not in _METHODS.get(type(owner), ()):
            raise TooMuch(f"{type(owner).__name__}.{name} is not available")
        if name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int):
            self.need(args[0])


def environment(cost: Cost) -> Any:
    """A sandboxed environment that charges ``cost``."""
    import jinja2
    from jinja2 import ext, nodes, sandbox, utils, visitor

    class Measured(visitor.NodeTransformer):
        """Puts a measuring call around every expression that builds a value, and around what a loop runs over."""

        def call(self, name: str, args: list[nodes.Expr], at: nodes.Node) -> nodes.Expr:
            return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=at.lineno)

        def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
            self.generic_visit(node)
            return self.call("cost_joined", node.nodes, node)

        def literal(self, node: Any) -> nodes.Expr:
            self.generic_visit(node)
            plain = all(isinstance(item, nodes.Const) for item in getattr(node, "items", ()))
            stored = getattr(node, "ctx", "load") != "load"
            return node if stored or plain else self.call("cost_kept", [node], node)

        visit_List = visit_Tuple = visit_Dict = literal

        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
            self.generic_visit(node)
            return self.call("cost_kept", [node], node) if isinstance(node.arg, nodes.Slice) else node

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = self.call("cost_ticking", [node.iter], node)
            return node

    class Formatter(sandbox.SandboxedFormatter):
        def format_field(self, value: Any, format_spec: str) -> Any:
            if re.search(r"\d{4}", format_spec):
                raise TooMuch("a format that wide")
            return cost.kept(super().format_field(value, format_spec))

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%", "+"})
        concat = staticmethod(cost.concat)
        cost_joined = staticmethod(cost.joined)
        cost_kept = staticmethod(cost.kept)
        cost_ticking = staticmethod(cost.ticking)

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree: nodes.Template = Measured().visit(super()._parse(source, name, filename))
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            done = cost.binop(operator, left, right)
            return done if done is not None else cost.kept(super().call_binop(context, operator, left, right))

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            cost.step()
            owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
            if isinstance(owner, str | list | tuple | dict | int | float | type):
                cost.method(owner, name, args)
                if isinstance(owner, str) and name in ("join", "replace"):
                    ours = cost.join(args[0], owner) if name == "join" else cost.replace(owner, *args, **kwargs)
                    return cost.kept(ours)
            result = super().call(context, obj, *args, **kwargs)
            return result if owner is cost else cost.kept(result)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            owner, name = getattr(value, "__self__", None), getattr(value, "__name__", "")
            if not isinstance(owner, str) or name not in ("format", "format_map"):
                return None

            def bounded(*args: Any, **kwargs: Any) -> str:
                if name == "format_map":
                    raise TooMuch("str.format_map is not available")
                return Formatter(self).vformat(owner, args, kwargs)

            return bounded

    class Generation(ext.Extension):
        """``{% generation %}``, which marks what to train on: here only its body counts."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            at = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(at)

    class Namespace(utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}")
            super().__setitem__(name, value)

        def __repr__(self) -> str:  # what it holds can change after it was measured
            return "<Namespace>"

    def charged(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def charging(*args: Any, **kwargs: Any) -> Any:
            return cost.kept(call(*args, **kwargs))

        return charging

    def raise_exception(message: object) -> None:
        raise Usage(f"the chat template refuses the messages: {message}")

    def make_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(*args, **kwargs)

    def bounded_range(*args: int) -> range:
        out = range(*args)
        if out.start - out.stop > cost.RANGE * abs(out.step) or out.stop - out.start > cost.RANGE * abs(out.step):
            raise TooMuch(f"a range of more than {cost.RANGE}")
        return out

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        wide = [indent, *(separators or ())]
        if any((len(w) if isinstance(w, str) else int(w or 0)) > 16 for w in wide):
            raise TooMuch("JSON that wide")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def join(value: Any, d: str = "", attribute: Any = None) -> str:
        names = str(attribute).split(".") if attribute is not None else []
        items = value
        for name in names:
            items = [env.getitem(item, int(name) if name.isdigit() else name) for item in cost.ticking(items)]
        return cost.join(items, str(d))

    def indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        pad = width if isinstance(width, str) else " " * min(int(width), 1000)
        text = str(s)
        cost.need(len(text) + (text.count("\n") + 1) * len(pad))
        lines = text.split("\n")
        rest = [pad + line if line or blank else line for line in lines[1:]]
        return "\n".join([(pad if first else "") + lines[0], *rest])

    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    defaults = env.filters
    own: dict[str, Callable[..., Any]] = {
        "tojson": tojson,
        "join": join,
        "indent": indent,
        "replace": lambda s, old, new, count=None: cost.replace(str(s), str(old), str(new), count),
        "format": lambda s, *args, **kwargs: cost.percent(str(s), kwargs or args),
        "list": lambda value: list(cost.ticking(value)),
        "safe": str,
    }
    env.filters = {name: charged(call) for name, call in {**{k: defaults[k] for k in _FILTERS.split()}, **own}.items()}
    env.globals = {
        "range": bounded_range,
        "dict": make_dict,
        "namespace": Namespace,
        "cycler": utils.Cycler,
        "joiner": utils.Joiner,
        "raise_exception": raise_exception,
        "strftime_now": lambda form: cost.now.strftime(str(form)[:200]),
    }
    return env
