"""Values of a recorded graph as views of buffers, and who reads them: what lowering asks before it places one.

Slices and reshapes cost nothing: they are further views of what another node, their root, has computed.
"""

from __future__ import annotations

from typing import NamedTuple

from loaders.network.graph import POSITIONS, Dims, Graph, Node

ARITHMETIC = ("add", "sub", "mul", "div")
COMMUTES = ("add", "mul")
VIEWS = ("reshape", "slice")
ACTIVATIONS = ("activation", "tanh")
APPENDS = ("append", "append_latent")
# Attention's scratch lies behind everything else: how long it is depends on the cache.
ARENA, OUTPUT, SCRATCH = 0, 1, 2

# The value that a view is of, and where in it.
Key = tuple[str, int, int, int, int]


class Buffer:
    """Memory that one or several values share: ``floats`` a row; ``one``: a single row, whatever the pass has."""

    __slots__ = ("first", "floats", "last", "one", "place", "roots", "space")

    def __init__(self, floats: int, one: bool, space: int = ARENA) -> None:
        self.floats, self.one, self.space = floats, one, space
        # Values that lie here; the steps between which it is in use; where the memory plan puts it.
        self.roots: list[str] = []
        self.first = self.last = self.place = -1


class Layout(NamedTuple):
    """[rows][n][m] of a buffer, from float ``at`` of each row; ``unit`` 0 repeats one value along m. A single n has a
    step of m, so that equal views are equal.
    """

    buffer: Buffer | None
    at: int
    n: int
    step: int
    m: int
    unit: int = 1


def sizes(shape: Dims) -> tuple[int, int]:
    """n and m of a shape [t, m] or [t, n, m]."""
    assert len(shape) in (2, 3), f"a value of shape {shape}"
    return (1 if len(shape) == 2 else shape[1]), shape[-1]  # type: ignore[return-value]


def whole(buffer: Buffer | None, n: int, m: int) -> Layout:
    """All of a buffer."""
    return Layout(buffer, 0, n, m, m)


def reshaped(x: Layout, n: int, m: int) -> Layout | None:
    """The same values as [n][m], or None where that takes a copy."""
    if n == x.n and m == x.m:
        return x
    if x.n > 1 and x.step != x.m:
        return None
    return Layout(x.buffer, x.at, n, m, m)


def sliced(x: Layout, by_row: bool, start: int, stop: int) -> Layout:
    """n from ``start`` to ``stop`` where ``by_row``, else m."""
    if by_row:
        n = stop - start
        return Layout(x.buffer, x.at + start * x.step, n, x.step if n > 1 else x.m, x.m)
    m = stop - start
    return Layout(x.buffer, x.at + start, x.n, x.step if x.n > 1 else m, m)


def spread(x: Layout, n: int, m: int) -> Layout:
    """x broadcast to [n][m], by strides of 0."""
    if x.n == n and x.m == m:
        return x
    return Layout(x.buffer, x.at, n, x.step if x.n == n else 0, m, x.unit if x.m == m else 0)


def span(x: Layout) -> int:
    """Floats from the first to the last."""
    return (x.n - 1) * x.step + (x.m - 1) * x.unit + 1


def overlap(a: Layout, b: Layout) -> bool:
    """Whether two views of one buffer share a float; of views with different steps, whether their spans meet."""
    if a.at >= b.at + span(b) or b.at >= a.at + span(a):
        return False
    if a.step != b.step or not a.step:
        return True
    # Columns of one matrix.
    apart = (b.at - a.at) % a.step
    return apart < a.m or apart + b.m > a.step


class Values:
    """What is known of a graph's values before any of them has a place.

    ``dims``: name -> (n, m). ``live``: which nodes are computed at all. ``key``: name -> (root, at, n, step, m), equal
    for equal views. ``readers``: root -> (index of a node, name it reads), in order. ``parts``: roots of which a
    concat reads. ``fused``: activation -> its node, done by the arithmetic that is its one reader.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.nodes = graph, graph.nodes
        self.dims: dict[str, tuple[int, int]] = {}
        self.users: dict[str, list[int]] = {}
        self.live = self.alive()
        self.key: dict[str, Key] = {}
        self.views: dict[str, Node] = {}
        self.viewers: dict[str, list[str]] = {}
        self.readers: dict[str, list[tuple[int, str]]] = {}
        self.parts: set[str] = set()
        self.positions = {POSITIONS}
        self.fused: dict[str, Node] = {}
        if "ple" in graph.inputs:
            self.root("ple", graph.inputs["ple"])
        for i, node in enumerate(self.nodes):
            if self.live[i]:
                self.look(i, node)

    def alive(self) -> list[bool]:
        """Nodes that the output or a cache depends on."""
        users, live = self.users, [False] * len(self.nodes)
        for i in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[i]
            if node.output in users or node.op in APPENDS or node.output == self.graph.output:
                live[i] = True
                for x in node.inputs:
                    if x in users:
                        users[x].append(i)
                    elif isinstance(x, str):
                        users[x] = [i]
        return live

    def look(self, i: int, node: Node) -> None:
        """Whether it is a view or an activation that arithmetic does on its way; else, what it reads."""
        op, name = node.op, node.output
        if op in VIEWS and self.view(node):
            return
        if op == "last" and node.inputs[0] in self.positions:
            # A pass knows its own.
            self.positions.add(name)
            return
        self.root(name, node.shape)
        if op in ACTIVATIONS and self.fusable(node):
            self.fused[name] = node
            return
        for x in node.inputs:
            held = self.fused.get(x)  # type: ignore[arg-type]
            read = x if held is None else held.inputs[0]
            found = self.key.get(read)  # type: ignore[arg-type]
            if found is not None:
                if found[0] in self.readers:
                    self.readers[found[0]].append((i, read))  # type: ignore[arg-type]
                else:
                    self.readers[found[0]] = [(i, read)]  # type: ignore[list-item]
                if op == "concat":
                    self.parts.add(found[0])

    def root(self, name: str, shape: Dims) -> None:
        self.dims[name] = n, m = sizes(shape)
        self.key[name] = (name, 0, n, m, m)

    def viewed(self, node: Node, x: Layout) -> Layout | None:
        """A reshape or a slice of x, which its input is."""
        if node.op == "reshape":
            return reshaped(x, *sizes(node.shape))
        attrs, rank = node.attrs, len(node.shape)
        assert 0 < attrs["axis"] < rank, f"slice on axis {attrs['axis']}"
        return sliced(x, attrs["axis"] < rank - 1, attrs["start"], attrs["stop"])

    def view(self, node: Node) -> bool:
        """Whether it is a view, which is noted."""
        source: str = node.inputs[0]  # type: ignore[assignment]
        root, at, n, step, m = self.key[source]
        found = self.viewed(node, Layout(None, at, n, step, m))
        if found is None:
            return False
        name = node.output
        self.dims[name] = found.n, found.m
        self.key[name] = (root, found.at, found.n, found.step, found.m)
        self.views[name] = node
        self.viewers.setdefault(root, []).append(name)
        return True

    def fusable(self, node: Node) -> bool:
        """Whether an activation's one reader is arithmetic that can do it: of the first of its operands."""
        users, name = self.users.get(node.output, ()), node.output
        if len(users) != 1 or name == self.graph.output:
            return False
        user = self.nodes[users[0]]
        if user.op not in ARITHMETIC or user.shape != node.shape:
            return False
        a, b = user.inputs
        return a not in self.fused and b not in self.fused and a != b and (a == name or user.op in COMMUTES)
