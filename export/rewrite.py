"""Rewrites a recorded graph into one that an operator of a target can take."""

from __future__ import annotations

from dataclasses import replace

from loaders.network.graph import TOKENS, Graph, Node


def uncut(graph: Graph) -> Graph:
    """The same graph with queries for every token wherever keys and values of every token are appended.

    Recorded for the last logits alone, the last layer that writes a cache asks for one query over many new keys, which
    a fused operator that also writes the cache does not take. Its queries are computed for all tokens instead, and what
    comes out is cut: nothing else of that layer, and no later layer, is run for more than the last token.
    """
    by_output = {node.output: node for node in graph.nodes}
    found: list[Node] = []
    whole: dict[str, str] = {}
    attended: set[str] = set()

    def longer(name: str) -> str:
        """The value ``name`` was cut from, or would have been without the cut."""
        node = by_output.get(name)
        if node is None or node.shape[0] == TOKENS:
            return name
        if name not in whole:
            if node.op == "last":
                whole[name] = str(node.inputs[0])
            else:
                inputs = tuple(longer(x) if isinstance(x, str) else x for x in node.inputs)
                whole[name] = f"{name}.all"
                found.append(replace(node, inputs=inputs, output=whole[name], shape=(TOKENS, *node.shape[1:])))
        return whole[name]

    for node in graph.nodes:
        own = node.op == "attention" and node.inputs[1] not in attended
        if own:
            attended.add(str(node.inputs[1]))
        if not own or node.shape[0] == TOKENS:
            found.append(node)
            continue
        q, kv, positions = (str(x) for x in node.inputs)
        everything = f"{node.output}.all"
        inputs = (longer(q), kv, longer(positions))
        found.append(replace(node, inputs=inputs, output=everything, shape=(TOKENS, *node.shape[1:])))
        found.append(Node("last", (everything,), {}, node.output, node.shape))
    return replace(graph, nodes=without_idle(found, graph.output))


def without_idle(nodes: list[Node], output: str) -> list[Node]:
    """Nodes that something needs, in order; those that write a cache are needed."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if node.output in needed or node.op.startswith("append"):
            kept.append(node)
            needed.update(x for x in node.inputs if isinstance(x, str))
    return kept[::-1]
