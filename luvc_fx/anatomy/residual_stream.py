"""The residual stream of a graph: the chain of values that every path of the tokens runs through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from luvc_fx.graph.nodes import ancestors, descendants, is_tensor, op_name, order, shape, value
from luvc_fx.report import Reason, Refused


def dominators(graph: fx.Graph, source: fx.Node, sinks: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The immediate dominator of each node between `source` and `sinks`, following tensors only."""
    below = descendants(source)
    above = ancestors(*sinks)
    place = order(graph)
    inside = [n for n in graph.nodes if n in below and n in above and (n is source or _is_no_number(n))]
    idom: dict[fx.Node, fx.Node] = {source: source}
    for node in inside:
        if node is source:
            continue
        before = [n for n in node.all_input_nodes if n in idom]
        if not before:
            continue
        common = before[0]
        for other in before[1:]:
            while common is not other:
                if place[common] > place[other]:
                    common = idom[common]
                else:
                    other = idom[other]
        idom[node] = common
    return idom


def _is_no_number(node: fx.Node) -> bool:
    return not isinstance(value(node), (int, float, bool, torch.SymInt, torch.SymBool, torch.SymFloat))


def chain_to(idom: dict[fx.Node, fx.Node], source: fx.Node, sinks: list[fx.Node]) -> list[fx.Node]:
    """The nodes, in order, that every path from `source` to every one of `sinks` runs through."""
    paths = []
    for sink in sinks:
        path = [sink]
        while path[-1] is not source:
            path.append(_above(idom, path[-1]))
        paths.append(path[::-1])
    common = set(paths[0]).intersection(*map(set, paths[1:]))
    return [n for n in paths[0] if n in common]


def entering(
    idom: dict[fx.Node, fx.Node], chain: list[fx.Node], layers: Sequence[Sequence[fx.Node]]
) -> tuple[fx.Node, ...]:
    """Per layer, the last value of the chain before its attention calls.

    Raises:
        Refused: RESIDUAL_STREAM where two layers read the same value.
    """
    sites = tuple(_last_before(idom, chain, calls[0]) for calls in layers)
    places = [chain.index(site) for site in sites]
    for before, after, calls in zip(places, places[1:], layers[1:], strict=False):
        if after <= before:
            raise Refused(
                Reason.RESIDUAL_STREAM, "two attention calls read the same residual value", calls[0]
            )
    return sites


def by_layer(idom: dict[fx.Node, fx.Node], chain: list[fx.Node], calls: list[fx.Node]) -> list[list[fx.Node]]:
    """Attention calls that read the same residual value: the segments of one layer of a packed encoder."""
    layers: dict[fx.Node, list[fx.Node]] = {}
    for call in calls:
        layers.setdefault(_last_before(idom, chain, call), []).append(call)
    return list(layers.values())


def _last_before(idom: dict[fx.Node, fx.Node], chain: list[fx.Node], attention: fx.Node) -> fx.Node:
    on_chain = set(chain)
    node = attention
    while node not in on_chain:
        node = _above(idom, node)
    return node


def _above(idom: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    if node not in idom:  # BLIP-2's queries are weights
        raise Refused(Reason.RESIDUAL_STREAM, "attention over rows that are not made of the stream's", node)
    return idom[node]


def last_residual(chain: list[fx.Node], entering: fx.Node) -> fx.Node:
    """The residual value that leaves the last block: the last sum of two values made of its stream.

    Both are as wide as the stream. That one of them is the sum before it must not be asked: a norm or
    a factor may lie between (`norm(x + f(x))`, `a * x + f(x)`).

    Raises:
        Refused: RESIDUAL_STREAM where nothing is added.
    """
    below = descendants(entering)
    width = shape(entering)[-1]
    for node in reversed(chain[chain.index(entering) + 1 :]):
        terms = [n for n in node.all_input_nodes if n in below and is_tensor(n)]
        if op_name(node) in ("add", "iadd") and len(terms) == 2 and {shape(n)[-1] for n in terms} == {width}:
            return node
    raise Refused(Reason.RESIDUAL_STREAM, "nothing is added after the last encoder block", entering)
