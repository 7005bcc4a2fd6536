"""Operations that cut a token axis or lay axes one behind the other, on a probe's made-up sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from luvc_fx._compat import hint
from luvc_fx.anatomy.axes.lengths import TOKENS, Axis, Extent, HalvedLength, concatenated, pieces_of
from luvc_fx.anatomy.axes.probe import EXPANDING, Probe
from luvc_fx.graph.nodes import is_tensor, op_name, shape, value
from luvc_fx.report import Reason, Refused


def index_axes(index: Any, rank: int) -> list[tuple[int, Any]] | None:
    """``(axis, slice or int)`` for each indexed axis, or None where a tensor indexes."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (fx.Node, list)) for item in items):
        return None
    named = sum(item is not None and item is not Ellipsis for item in items)
    indexed: list[tuple[int, Any]] = []
    axis = 0
    for item in items:
        if item is None:
            continue
        if item is Ellipsis:
            axis += rank - named
            continue
        indexed.append((axis, item))
        axis += 1
    return indexed


def _is_crop(item: Any, size: int) -> bool:
    """Whether a slice takes as much off the end as off the front: an image's padding."""
    return (
        isinstance(item, slice)
        and item.step in (None, 1)
        and isinstance(item.start, int)
        and isinstance(item.stop, int)
        and 0 <= item.start < item.stop == size - item.start
    )


def refuse_fixed_cuts(
    node: fx.Node, source: fx.Node, extents: Mapping[int, Axis], lead: int
) -> dict[int, slice]:
    """Refuse a cut at a literal token position: after a merge or a prune it would mean another token.

    The first `lead` rows are no visual tokens and stay where they are; rows counted from the end
    stay the last ones. Returns the crops, per axis.
    """
    cuts = index_axes(node.args[1], value(source).dim())
    if cuts is None:
        raise Refused(Reason.TOKEN_AXIS, "tokens are picked by an index tensor", node)
    crops = {}
    for axis, item in cuts:
        if axis not in extents or item == slice(None):
            continue
        size = shape(source)[axis]
        if isinstance(item, int):
            fine = item < lead
        elif _is_crop(item, size):
            crops[axis], fine = item, True
        elif isinstance(item, slice) and item.step in (None, 1):
            start, stop = item.start, item.stop
            whole = (start is None or (isinstance(start, int) and start <= lead)) and stop is None
            front = start in (None, 0) and isinstance(stop, int) and 0 <= stop <= lead
            fine = whole or front
        else:
            fine = False
        if not fine:
            raise Refused(Reason.TOKEN_AXIS, f"tokens are cut at a fixed place, {item}", node)
    return crops


def crop(probe: Probe, node: fx.Node, source: fx.Node, crops: dict[int, slice]) -> torch.Tensor:
    """Rows cut off both ends stay cut off, however many tokens lie between."""
    old, extents = probe.of(source), dict(probe.result.extents[source])
    cuts = index_axes(node.args[1], old.dim()) or []
    if any(not isinstance(item, slice) for _, item in cuts) or value(node).dim() != old.dim():
        raise Refused(Reason.TOKEN_AXIS, "a crop that also drops an axis", node)
    sizes = list(shape(node))
    for axis, extent in list(extents.items()):
        if axis in crops:
            start = crops[axis].start
            factors = extent.factors if isinstance(extent, Extent) and extent.splits else (extent,)
            extents[axis] = Extent(factors, -start, -start) if start else extent
        sizes[axis] = extents[axis].length(probe.sizes)
    probe.known[node] = extents
    probe.result.crops[node] = crops
    return probe.like(node, tuple(sizes))


def pool(probe: Probe, node: fx.Node, source: fx.Node) -> torch.Tensor:
    """Both sides of a grid resampled to half of their length."""
    extents, sizes = probe.result.extents[source], list(shape(node))
    halves = all(-(-old // 2) == new for old, new in zip(shape(source)[2:], sizes[2:], strict=True))
    plain = all(isinstance(e, Extent) and e.splits and len(e.factors) == 1 for e in extents.values())
    if len(sizes) != 4 or set(extents) != {2, 3} or not halves or not plain:
        raise Refused(Reason.TOKEN_AXIS, "tokens are resampled, and not to half of their number", node)
    probe.known[node] = {axis: Extent((HalvedLength(extent),)) for axis, extent in extents.items()}
    for axis, extent in probe.known[node].items():
        sizes[axis] = extent.length(probe.sizes)
    return probe.like(node, tuple(sizes))


def split(probe: Probe, node: fx.Node, source: fx.Node) -> tuple[torch.Tensor, ...]:
    """A split between the parts of a row."""
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    assert isinstance(dim, int)
    dim %= value(source).dim()
    rest = pieces_of(probe.result.extents[source][dim])
    parts: list[Axis] = []
    for tensor in value(node):
        taken: list[Axis] = []
        while rest and sum(p.length(probe.result.counts) for p in taken) < hint(tensor.shape[dim]):
            taken.append(rest.pop(0))
        if sum(p.length(probe.result.counts) for p in taken) != hint(tensor.shape[dim]):
            raise Refused(Reason.TOKEN_AXIS, "tokens are cut at a fixed place by split", node)
        parts.append(concatenated(taken))
    probe.result.pieces[node] = (dim, parts)
    lengths = [part.length(probe.sizes) for part in parts]
    return tuple(torch.split(probe.of(source), lengths, dim))


def piece(probe: Probe, node: fx.Node) -> torch.Tensor:
    """One part of a split."""
    split, number = node.args
    assert isinstance(split, fx.Node) and isinstance(number, int)
    dim, parts = probe.result.pieces[split]
    source = next(n for n in split.all_input_nodes if n in probe.result.extents)
    probe.known[node] = {**probe.result.extents[source], dim: parts[number]}
    return probe.changed[split][number]


def concatenate(probe: Probe, node: fx.Node) -> None:
    """Note the token axes of a concatenation; constants beside tokens are made to fit."""
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    # `cat` takes an empty tensor of one axis for anything: a cache that holds nothing yet.
    rank = value(node).dim()
    nodes = [part for part in parts if isinstance(part, fx.Node) and value(part).dim() == rank]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    assert isinstance(dim, int)
    dim %= rank
    tokens = [n for n in nodes if n in probe.result.extents]
    across = {axis: e for n in tokens for axis, e in probe.result.extents[n].items() if axis != dim}
    for other in nodes:
        if across and other not in probe.result.extents:
            fill(probe, other, across)
    along = [probe.result.extents.get(n, {}).get(dim) for n in nodes]
    if not any(along):
        return
    joined: list[Axis] = []
    lead = 0
    for part, extent in zip(nodes, along, strict=True):
        if extent is not None:
            joined.append(extent)
        elif not joined:
            lead += shape(part)[dim]
        elif TOKENS in joined[-1].symbols():
            raise Refused(Reason.TOKEN_AXIS, "rows are appended behind the tokens", node)
        else:
            joined[-1] = _longer(joined[-1], 0, shape(part)[dim])
    joined[0] = _longer(joined[0], lead, 0)
    probe.known[node] = {**across, dim: concatenated(joined)}


def fill(probe: Probe, other: fx.Node, axes: Mapping[int, Axis]) -> None:
    """Let a constant that was expanded to the tokens' axes follow them."""
    chain = [other]
    while op_name(chain[-1]) not in EXPANDING:
        above = [n for n in chain[-1].all_input_nodes if is_tensor(n)]
        if len(above) != 1 or shape(above[0]) != shape(other):
            raise Refused(Reason.TOKEN_AXIS, "a constant of a fixed size lies beside the tokens", other)
        chain.append(above[0])
    source = chain[-1].args[0]
    assert isinstance(source, fx.Node)
    shift = value(chain[-1]).dim() - value(source).dim()
    if any(axis >= shift and shape(source)[axis - shift] != 1 for axis in axes):
        raise Refused(Reason.TOKEN_AXIS, "a constant of a fixed size lies beside the tokens", other)
    for node in reversed(chain):
        probe.changed[node] = probe.resized(node, axes)
        probe.result.extents[node] = dict(axes)
    probe.result.fillers.append(chain[-1])


def _longer(axis: Axis, rows_before: int, rows_after: int) -> Axis:
    """`axis` with rows more in front and behind."""
    if not rows_before and not rows_after:
        return axis
    if isinstance(axis, Extent):
        return Extent(axis.factors, axis.rows_before + rows_before, axis.rows_after + rows_after)
    return Extent((axis,), rows_before, rows_after)
