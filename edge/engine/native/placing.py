"""Which buffer a value is computed in: the caller's, a piece of what it will be a part of, an operand's, or its own."""

from __future__ import annotations

from collections.abc import Sequence

from edge.engine.native.values import (
    ARENA,
    ARITHMETIC,
    OUTPUT,
    Buffer,
    Layout,
    Values,
    overlap,
    reshaped,
    sizes,
    sliced,
    whole,
)
from loaders.network.graph import Node

# May write over the first of what they read: each value is read before it is written.
IN_PLACE = frozenset((*ARITHMETIC, "norm", "layer_norm", "rope", "temperature", "activation", "tanh", "gaussian_topk"))


class Placing:
    """Places of values, as they come to be computed."""

    def __init__(self, values: Values) -> None:
        self.values, self.graph, self.nodes = values, values.graph, values.nodes
        self.layouts: dict[str, Layout] = {}
        self.slots: dict[str, Layout | None] = {}
        self.joined: dict[str, Layout] = {}
        self.out_buffer: Buffer | None = None

    def layout(self, name: str) -> Layout:
        """Where a value is: views follow from what they are views of."""
        found = self.layouts.get(name)
        if found is None:
            node = self.values.views[name]
            made = self.values.viewed(node, self.layout(str(node.inputs[0])))
            assert made is not None, f"no view {node}"
            found = self.layouts[name] = made
        return found

    def bind(self, name: str, layout: Layout) -> None:
        """A value lies there from now on."""
        assert layout.buffer is not None
        self.layouts[name] = layout
        layout.buffer.roots.append(name)

    def own(self, name: str, one: bool) -> Layout:
        """Memory of its own for a value."""
        n, m = self.values.dims[name]
        return Layout(Buffer(n * m, one), 0, n, m, m)

    def out(self, i: int, node: Node, *operands: str | float) -> Layout:
        """Where node i writes its output; it may write over those ``operands`` that have its shape and die there."""
        name, dims = node.output, self.values.dims
        same = [x for x in operands if isinstance(x, str) and dims[x] == dims[name]] if operands else ()
        found = None
        if same and name in self.values.parts:
            for x in same:
                found = found or self.over(i, name, x, operands, joins=True)
        if found is None:
            found = self.slot(name)
            for x in same:
                found = found or self.over(i, name, x, operands, joins=False)
            found = found or self.own(name, node.shape[0] == 1)
        self.bind(name, found)
        return found

    # Over an operand

    def over(self, i: int, name: str, x: str, operands: Sequence[str | float], *, joins: bool) -> Layout | None:
        """The place of operand x, where nobody else needs what is there: all of a buffer, or (``joins``) a piece that
        lies right where the value will be put together with others.
        """
        found = self.layout(x)
        buffer = found.buffer
        assert buffer is not None
        if buffer.space != ARENA:
            return None
        if not (self.joins(name, found) if joins else found.n * found.m == buffer.floats):
            return None
        if found.n > 1 and not self.composes(name, found):
            return None
        for other in operands:
            if isinstance(other, str) and other != x:
                beside = self.layout(other)
                if beside.buffer is buffer and beside != found and overlap(beside, found):
                    return None
        return None if self.needed(i, found) else found

    def needed(self, i: int, found: Layout) -> bool:
        """Whether a node after i reads any of it."""
        buffer, readers = found.buffer, self.values.readers
        assert buffer is not None
        # Whose last reader is past counts no more, now and later.
        buffer.roots = [root for root in buffer.roots if root in readers and readers[root][-1][0] > i]
        for root in buffer.roots:
            for j, name in reversed(readers[root]):
                if j <= i:
                    break
                if overlap(self.layout(name), found):
                    return True
        return False

    def composes(self, root: str, found: Layout) -> bool:
        """Whether all views of a value can be had of it there."""
        if found.n == 1 or found.step == found.m:
            return True
        made: dict[str, Layout] = {root: found}
        for name in self.values.viewers.get(root, ()):
            node = self.values.views[name]
            view = self.values.viewed(node, made[str(node.inputs[0])])
            if view is None:
                return False
            made[name] = view
        return True

    def joins(self, name: str, found: Layout) -> bool:
        """Whether, with ``name`` there, what it is put together with lies beside it."""
        for j, used in self.values.readers.get(name, ()):
            node = self.nodes[j]
            if node.op != "concat" or node.output in self.joined or not self.entire(name, used):
                continue
            pieces = []
            for x in node.inputs:
                root = self.values.key[str(x)][0]
                if x == used:
                    piece = reshaped(found, *self.values.dims[used])
                else:
                    piece = self.layout(str(x)) if root in self.layouts else None
                if piece is None:
                    break
                pieces.append(piece)
            else:
                if self.adjacent(node, pieces) is not None:
                    return True
        return False

    # Pieces of something larger

    def entire(self, root: str, name: str) -> bool:
        """Whether a view shows all of its root."""
        (n, m), (rows, cols) = self.values.dims[root], self.values.dims[name]
        return n * m == rows * cols

    def slot(self, name: str) -> Layout | None:
        """Where a value has to end up: the caller's memory, or a piece of a concat; also through arithmetic."""
        if name in self.slots:
            return self.slots[name]
        found = self.slots[name] = self.find_slot(name)
        return found

    def find_slot(self, name: str) -> Layout | None:
        if name == self.graph.output:
            return self.output()
        if name in self.values.parts:
            for j, used in self.values.readers[name]:
                found = self.piece(name, self.nodes[j], used)
                if found is not None:
                    return found
        readers = self.values.readers.get(name, ())
        if len(readers) != 1 or readers[0][1] != name:
            return None
        node = self.nodes[readers[0][0]]
        if node.op not in IN_PLACE or self.values.dims[node.output] != self.values.dims[name]:
            return None
        first = node.inputs[0]
        if first != name and not (first in self.values.fused and self.values.fused[str(first)].inputs[0] == name):
            return None
        found = self.slot(node.output)
        return found if found is not None and self.composes(name, found) else None

    def piece(self, name: str, node: Node, used: str) -> Layout | None:
        """Where a concat that reads all of a value, as ``used``, wants it; None for any other node."""
        if node.op != "concat" or not self.entire(name, used):
            return None
        there = self.pieces(node, self.together_at(node))[node.inputs.index(used)]
        found = reshaped(there, *self.values.dims[name])
        return found if found is not None and self.composes(name, found) else None

    def output(self) -> Layout:
        """The caller's memory."""
        n, m = self.values.dims[self.graph.output]
        if self.out_buffer is None:
            self.out_buffer = Buffer(n * m, self.nodes[-1].shape[0] == 1, OUTPUT)
        return whole(self.out_buffer, n, m)

    def together_at(self, node: Node) -> Layout:
        """Where a concat lies; decided when the first of its pieces is."""
        if node.output not in self.joined:
            self.joined[node.output] = self.slot(node.output) or self.own(node.output, node.shape[0] == 1)
        return self.joined[node.output]

    def pieces(self, node: Node, all_of: Layout) -> list[Layout]:
        """Where the inputs of a concat lie in it."""
        axis, start, found = node.attrs["axis"], 0, []
        assert 0 < axis < len(node.shape), f"concat on axis {axis}"
        by_row = axis < len(node.shape) - 1
        for x in node.inputs:
            stop = start + self.values.dims[str(x)][not by_row]
            found.append(sliced(all_of, by_row, start, stop))
            start = stop
        return found

    def adjacent(self, node: Node, found: Sequence[Layout]) -> Layout | None:
        """Where a concat is whose inputs happen to lie as they should in one buffer."""
        head, (n, m) = found[0], sizes(node.shape)
        if any(x.buffer is not head.buffer for x in found):
            return None
        by_row = node.attrs["axis"] < len(node.shape) - 1
        # A single row knows no step: where the next input begins tells.
        step = found[1].at - head.at if by_row and head.n == 1 and len(found) > 1 else head.step
        whole_of = Layout(head.buffer, head.at, n, step if n > 1 else m, m)
        return whole_of if self.pieces(node, whole_of) == list(found) else None

    def gathered(self, node: Node, sources: Sequence[Layout]) -> list[Layout]:
        """Where each input of a concat has to be, once that lies somewhere."""
        found = None if node.output in self.joined else self.adjacent(node, sources)
        if found is not None and not self.composes(node.output, found):
            found = None
        found = found or self.together_at(node)
        self.bind(node.output, found)
        return self.pieces(node, found)
