"""Queries and keys of a decoder layer, computed ahead of it: its norm and projections run a second time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from luvc_fx.anatomy.axes.lengths import TOKENS
from luvc_fx.anatomy.axes.probe import EXPANDING, SIZED, TokenAxes
from luvc_fx.anatomy.recognise import Decoder
from luvc_fx.anatomy.residual_stream import chain_to, dominators
from luvc_fx.graph.nodes import (
    ancestors,
    descendants,
    is_tensor,
    op_name,
    order,
    reach,
    run,
    shape,
    writes,
)
from luvc_fx.ops import gather_rows
from luvc_fx.passes.support.last_query import constant_scale, last_mask, visible
from luvc_fx.plan import PruneSite
from luvc_fx.report import Reason, Refused

ScoreKeys = Callable[..., tuple[Tensor, Tensor]]


def site_keys(graph: fx.Graph, decoder: Decoder, site: PruneSite) -> tuple[list[fx.Node], ScoreKeys]:
    """The inputs of `Site.mean_query_attention` and `Site.keys`, and the function that computes them.

    Queries and keys without rotary positions are the last values of the layer that are made of its input
    and of weights alone; rotary tables are values that go with the tokens.

    Returns:
        Nodes, and a function of the residual value ``[B, S, D]``, an int64 ``[B, N]`` of rows in it and
        the values of the nodes, which gives float32 ``[B, N]`` and ``[B, N, heads * dim]``.

    Raises:
        Refused: the layer's queries or keys are not found, or cannot be computed ahead of it.
    """
    call, before = decoder.calls[site.layer], decoder.calls[site.layer - 1]
    scale = constant_scale(call)
    query = _before_rotary(graph, decoder.axes, site.node, call.queries)
    key = _before_rotary(graph, decoder.axes, site.node, call.keys)
    rotated = _after_rotary(graph, decoder.axes, site.node, call.keys, key)
    steps, given = _replay(graph, site.node, (query, key, rotated))
    masks, over_cache = last_mask(before)  # it hides the same rows, and exists already
    swapped = [decoder.axes.axis(node) == 1 for node in (query, key, rotated)]

    def score_keys(x: Tensor, places: Tensor, earlier: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.shape[1]
        known = dict(zip(given, values, strict=False)) | {site.node: x}
        for step in steps:
            known[step] = _again(step, known, decoder.axes, rows)
        queries, keys, rotated_keys = (
            known[node].transpose(1, 2) if swap else known[node]
            for node, swap in zip((query, key, rotated), swapped, strict=True)
        )
        among = torch.arange(rows, device=x.device) <= places.amax(1, keepdim=True)
        if masks:
            among = among & visible(values[-1], over_cache, earlier.shape[2], rows)
        attention = _mean_query_attention(queries, keys, among, scale).gather(1, places)
        return attention, gather_rows(rotated_keys, places, 2).transpose(1, 2).flatten(2)

    return [before.keys, *given, *masks], score_keys


def _mean_query_attention(queries: Tensor, keys: Tensor, among: Tensor, scale: float) -> Tensor:
    """Attention weights of the mean query, averaged over the heads.

    Args:
        queries: ``[B, H, S, d]``; keys: ``[B, G, S, d]``, of H / G heads each.
        among: bool ``[B, S]``, the rows that take part, as queries and as keys.

    Returns:
        float32 ``[B, S]``, 0 for the others.
    """
    share = among.to(torch.float32)[:, None, :, None]
    mean = (queries.float() * share).sum(2) / share.sum(2)
    query = mean.unflatten(1, (keys.shape[1], -1)) * scale
    scores = (query.unsqueeze(3) * keys.float().unsqueeze(2)).sum(-1)
    scores = scores.masked_fill(among.logical_not()[:, None, None], -torch.inf)
    return scores.softmax(-1).flatten(1, 2).mean(1)


def _chain(graph: fx.Graph, source: fx.Node, sink: fx.Node) -> list[fx.Node]:
    """The values that every path from the layer's input to `sink` runs through."""
    idom = dominators(graph, source, [sink])
    if sink not in idom:
        raise Refused(Reason.NO_ATTENTION, "keys of a layer are not made of its input", sink)
    return chain_to(idom, source, [sink])


def _before_rotary(graph: fx.Graph, axes: TokenAxes, source: fx.Node, sink: fx.Node) -> fx.Node:
    """The last value ``[B, heads, S, d]`` or ``[B, S, heads, d]`` before anything meets the tokens."""
    below, meets = descendants(source), {join.consumer for join in axes.joins}
    last = None
    for node in _chain(graph, source, sink)[1:]:
        if below & ancestors(node) & meets:
            break
        if is_tensor(node) and _by_heads(node, sink, axes):
            last = node
    if last is None:
        text = "queries or keys of a layer are not found ahead of rotary positions and of what else is added"
        raise Refused(Reason.NO_ATTENTION, text, sink)
    return last


def _by_heads(node: fx.Node, sink: fx.Node, axes: TokenAxes) -> bool:
    sizes, axis = shape(node), axes.axis(node)
    return len(sizes) == 4 and axis in (1, 2) and sizes[3] == shape(sink)[3]


def _after_rotary(graph: fx.Graph, axes: TokenAxes, source: fx.Node, sink: fx.Node, key: fx.Node) -> fx.Node:
    """The last value that holds one key for each of `key`, before those of a cache (even an empty one)."""
    batch, *middle, dim = shape(key)
    heads, rows = middle if axes.axis(key) == 2 else middle[::-1]
    for node in reversed(_chain(graph, source, sink)):
        if is_tensor(node) and shape(node) == (batch, heads, rows, dim):
            steps, _ = _replay(graph, source, (node,))
            if all(step.all_input_nodes for step in steps):
                return node
    return key


def _replay(
    graph: fx.Graph, source: fx.Node, targets: tuple[fx.Node, ...]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes between `source` and `targets`, in order, and the values from before that they read."""
    place = order(graph)

    def inputs(node: fx.Node) -> list[fx.Node]:
        if place[node] <= place[source]:
            return []
        return node.all_input_nodes[:1] if op_name(node) in SIZED else node.all_input_nodes

    needed = reach(targets, inputs)
    steps = [node for node in graph.nodes if node in needed and place[node] > place[source]]
    given = [n for n in graph.nodes if n in needed and place[n] <= place[source] and n is not source]
    for node in (*steps, *given):
        if not is_tensor(node) and node in given:
            raise Refused(Reason.NO_ATTENTION, "keys of a layer are made of a number", node)
        if node in steps and (writes(node) or op_name(node) in _IN_PLACE):
            raise Refused(Reason.NO_ATTENTION, "keys of a layer are made by writing in place", node)
    return steps, given


_IN_PLACE = {"iadd", "isub", "imul", "itruediv"}


def _again(step: fx.Node, known: dict[fx.Node, Tensor], axes: TokenAxes, rows: int | torch.SymInt) -> Tensor:
    """Run `step` on the values in `known`; a token axis that it spells out gets the size for `rows` rows."""
    if op_name(step) not in SIZED or step not in axes.extents:
        result: Tensor = run(step, known.__getitem__)
        return result
    sizes: list[int | torch.SymInt] = list(shape(step))
    for axis, extent in axes.extents[step].items():
        sizes[axis] = extent.length({TOKENS: rows})
    source = known[step.all_input_nodes[0]]
    return source.expand(sizes) if op_name(step) in EXPANDING else source.reshape(sizes)
