"""Which axes of which values follow the token count, found by running the graph on other sizes.

The graph runs once more on fake tensors whose token axis has a large made-up length. Wherever a value
comes out longer than in the capture, that axis follows the token count, and how. Because positions are
compared, not sizes, it does not matter that the number of visual tokens may equal the hidden size.
Values that never saw the tokens but meet them (rotary tables, masks) show up where an elementwise op
or an attention call no longer fits; they are recorded as joins.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from luvc_fx import extents as ex
from luvc_fx._compat import FakeTensorMode, hint
from luvc_fx.extents import Axis, Counts, Extent
from luvc_fx.fx_util import (
    carries_tensor,
    concrete,
    is_tensor,
    op_name,
    run,
    settled_size,
    shape,
    value,
    writes,
)
from luvc_fx.report import Reason, Refused

_PRIMES = (10_007, 10_009, 10_037, 10_039, 10_061, 10_067, 10_069, 10_079, 10_091, 10_093, 10_099, 10_103)


def probe_sizes(counts: Counts) -> Counts:
    """Made-up counts, above any size in a model: primes, sides times what a model may divide them by."""
    sides = [symbol for symbol in counts if symbol != ex.TOKENS]
    rounds = len(_PRIMES)
    made = {s: 64 * (_PRIMES[i % rounds] + 2 * 10_111 * (i // rounds)) for i, s in enumerate(sides)}
    return {symbol: made.get(symbol, 1_000_003) for symbol in counts}


EXPANDING = {"expand", "broadcast_to"}
SIZED = {"view", "reshape", "_unsafe_view", *EXPANDING}
ALIGNED = {*SIZED, "flatten"}
CUTTING = {"select", "narrow", "split", "chunk", "unbind", "index_select", "slice", "tensor_split"}
ATTENTION = {"scaled_dot_product_attention"}
ELEMENTWISE = {
    *("add", "sub", "mul", "div", "truediv", "pow", "maximum", "minimum", "where", "masked_fill"),
    *("iadd", "isub", "imul", "itruediv", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"),
    *("logical_and", "logical_or"),
}


@dataclass(frozen=True, slots=True)
class Join:
    """`consumer` combines tokens with `follower`, whose `axes` must be cut like theirs."""

    consumer: fx.Node
    follower: fx.Node
    axes: tuple[int, ...]


@dataclass(slots=True)
class TokenAxes:
    """What `trace` found: per node its token axes, per foreign value where it joins.

    `counts` are the sizes of the symbols in the capture. `pieces` are the token axes of what comes out of
    a split along the tokens, `crops` the slices that cut as much off the end as off the front, and
    `fillers` constants that are expanded to fit beside the tokens.
    """

    counts: Counts
    extents: dict[fx.Node, dict[int, Axis]] = field(default_factory=dict)
    joins: list[Join] = field(default_factory=list)
    pieces: dict[fx.Node, tuple[int, list[Axis]]] = field(default_factory=dict)
    crops: dict[fx.Node, dict[int, slice]] = field(default_factory=dict)
    fillers: list[fx.Node] = field(default_factory=list)

    def axis(self, node: fx.Node) -> int | None:
        """The only token axis of `node`, or None."""
        axes = self.extents.get(node, {})
        return next(iter(axes)) if len(axes) == 1 else None


def sizes_of(node: fx.Node) -> list[Any]:
    """The size arguments of a `SIZED` node, as a flat list of ints and nodes."""
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return list(sizes)


def set_sizes(node: fx.Node, sizes: list[Any]) -> None:
    """Write the size arguments back in the one-tuple spelling, which every `SIZED` op takes."""
    node.args = (node.args[0], tuple(sizes))


def _index_axes(index: Any, rank: int) -> list[tuple[int, Any]] | None:
    """``(axis, slice or int)`` for each indexed axis, or None where a tensor indexes."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (fx.Node, list)) for item in items):
        return None
    named = sum(item is not None and item is not Ellipsis for item in items)
    found: list[tuple[int, Any]] = []
    axis = 0
    for item in items:
        if item is None:
            continue
        if item is Ellipsis:
            axis += rank - named
            continue
        found.append((axis, item))
        axis += 1
    return found


def _is_crop(item: Any, size: int) -> bool:
    """Whether a slice takes as much off the end as off the front: an image's padding."""
    return (
        isinstance(item, slice)
        and item.step in (None, 1)
        and isinstance(item.start, int)
        and isinstance(item.stop, int)
        and 0 <= item.start < item.stop == size - item.start
    )


def _check_cut(node: fx.Node, source: fx.Node, extents: Mapping[int, Axis], lead: int) -> dict[int, slice]:
    """Refuse a cut at a literal token position: after a merge or a prune it would mean another token.

    The first `lead` rows are no visual tokens and stay where they are; rows counted from the end
    stay the last ones. Returns the crops, per axis.
    """
    cuts = _index_axes(node.args[1], value(source).dim())
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


class _Probe:
    """One run of `trace`."""

    def __init__(self, counts: Counts) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.base: dict[fx.Node, Any] = {}
        self.changed: dict[fx.Node, Any] = {}
        self.result = TokenAxes(counts)
        self.sizes = probe_sizes(counts)
        self.known: dict[fx.Node, dict[int, Axis]] = {}

    def like(self, node: fx.Node, sizes: tuple[int, ...]) -> torch.Tensor:
        tensor = value(node)
        return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)

    def resized(self, node: fx.Node, extents: Mapping[int, Axis]) -> torch.Tensor:
        sizes = list(shape(node))
        for axis, extent in extents.items():
            sizes[axis] = extent.length(self.sizes)
        return self.like(node, tuple(sizes))

    def of(self, node: fx.Node) -> Any:
        if node in self.changed:
            return self.changed[node]
        if node not in self.base:
            self.base[node] = tree_map(concrete, value(node))
        return self.base[node]

    def run(self, node: fx.Node, swaps: Mapping[fx.Node, Any]) -> Any:
        return run(node, lambda n: swaps[n] if n in swaps else self.of(n))

    def visit(self, node: fx.Node) -> None:
        if settled_size(node) is not None:
            return
        made = is_tensor(node) and node not in self.known
        if made and not any(carries_tensor(n) for n in node.all_input_nodes if n in self.changed):
            # After a merge it would count the rows that are left, as positions must not.
            raise Refused(Reason.TOKEN_AXIS, "a value is made of the number of rows alone", node)
        result = self._sized(node) if op_name(node) in SIZED else self._general(node)
        old = value(node)
        self.changed[node] = result
        if not isinstance(old, torch.Tensor):
            before, after = tree_leaves(tree_map(concrete, old)), tree_leaves(result)
            if all(_same(a, b) for a, b in zip(before, after, strict=True)):
                del self.changed[node]
            return
        if node in self.known:
            extents = self.known[node]
        elif op_name(node) in ALIGNED:
            extents = self._aligned(node)
        else:
            extents = {
                axis: self._recognised(new, node)
                for axis, (was, new) in enumerate(zip(shape(node), result.shape, strict=True))
                if was != new
            }
        if extents:
            self.result.extents[node] = extents
        else:
            del self.changed[node]

    def _aligned(self, node: fx.Node) -> dict[int, Axis]:
        """The token axes that a reshaping op makes of its input's."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        old, new = self.result.extents.get(source, {}), shape(node)
        if op_name(node) in EXPANDING:
            shift = len(new) - value(source).dim()
            return {axis + shift: extent for axis, extent in old.items()}
        return ex.align(shape(source), old, new, self.result.counts, node)

    def _recognised(self, length: int, node: fx.Node) -> Axis:
        """What an axis of this probed length holds, from the token axes of the node's inputs."""
        candidates = [e for n in node.all_input_nodes for e in self.result.extents.get(n, {}).values()]
        # What comes out of a tuple has an input without a shape of its own.
        candidates = candidates or [e for found in self.result.extents.values() for e in found.values()]
        for extent in candidates:
            if extent.length(self.sizes) == length:
                return extent
        for extent in candidates:
            core = Extent(extent.factors if isinstance(extent, Extent) else (extent,))
            times, plus = divmod(length, core.length(self.sizes))
            if times >= 1 and plus < min(self.sizes.values()):
                return Extent(core.times(times, outer=True).factors, plus)
        raise Refused(Reason.TOKEN_AXIS, "an axis changes without following the token count", node)

    def _sized(self, node: fx.Node) -> Any:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        sizes = list(shape(node))
        for axis, extent in self._aligned(node).items():
            sizes[axis] = extent.length(self.sizes)
        tensor = self.of(source)
        return tensor.expand(sizes) if op_name(node) in EXPANDING else tensor.reshape(sizes)

    def _general(self, node: fx.Node) -> Any:
        name = op_name(node)
        tokens = [n for n in node.all_input_nodes if n in self.result.extents]
        if writes(node):
            raise Refused(Reason.TOKEN_AXIS, f"tokens are changed in place by {name}", node)
        if node.target is operator.getitem:
            parent = node.args[0]
            if parent in self.result.pieces:
                return self._piece(node)
            if tokens and parent is tokens[0]:
                extents = self.result.extents[tokens[0]]
                lead = max((extent.plus for extent in extents.values()), default=0)
                crops = _check_cut(node, tokens[0], extents, lead)
                if crops:
                    return self._cropped(node, tokens[0], crops)
        if name in CUTTING and tokens and self._cuts_tokens(node, tokens[0]):
            if name == "split":
                return self._split(node, tokens[0])
            raise Refused(Reason.TOKEN_AXIS, f"tokens are cut at a fixed place by {name}", node)
        if name == "interpolate" and tokens:
            return self._pool(node, tokens[0])
        followers = {}
        if name == "cat":
            self._see_cat(node)
        elif name in ATTENTION:
            followers = self._mask_follower(node)
        elif name in ELEMENTWISE:
            followers = self._broadcast_followers(node, tokens)
        swaps = {}
        for follower, extents in followers.items():
            swaps[follower] = self.resized(follower, extents)
            self.result.joins.append(Join(node, follower, tuple(sorted(extents))))
        try:
            return self.run(node, swaps)
        except Exception as error:
            raise Refused(
                Reason.TOKEN_AXIS, f"{name} does not fit another token count: {error}", node
            ) from error

    def _cropped(self, node: fx.Node, source: fx.Node, crops: dict[int, slice]) -> torch.Tensor:
        """Rows cut off both ends stay cut off, however many tokens lie between."""
        old, extents = self.of(source), dict(self.result.extents[source])
        cuts = _index_axes(node.args[1], old.dim()) or []
        if any(not isinstance(item, slice) for _, item in cuts) or value(node).dim() != old.dim():
            raise Refused(Reason.TOKEN_AXIS, "a crop that also drops an axis", node)
        sizes = list(shape(node))
        for axis, extent in list(extents.items()):
            if axis in crops:
                start, inner = crops[axis].start, extent if extent.splits else Extent((extent,))
                extents[axis] = Extent(inner.factors, -start, -start) if start else extent
            sizes[axis] = extents[axis].length(self.sizes)
        self.known[node] = extents
        self.result.crops[node] = crops
        return self.like(node, tuple(sizes))

    def _pool(self, node: fx.Node, source: fx.Node) -> torch.Tensor:
        """Both sides of a grid resampled to half of their length."""
        extents, sizes = self.result.extents[source], list(shape(node))
        halves = all(-(-old // 2) == new for old, new in zip(shape(source)[2:], sizes[2:], strict=True))
        plain = all(isinstance(e, Extent) and e.splits and len(e.factors) == 1 for e in extents.values())
        if len(sizes) != 4 or set(extents) != {2, 3} or not halves or not plain:
            raise Refused(Reason.TOKEN_AXIS, "tokens are resampled, and not to half of their number", node)
        self.known[node] = {axis: Extent((ex.Half(extent),)) for axis, extent in extents.items()}
        for axis, extent in self.known[node].items():
            sizes[axis] = extent.length(self.sizes)
        return self.like(node, tuple(sizes))

    def _split(self, node: fx.Node, source: fx.Node) -> tuple[torch.Tensor, ...]:
        """A split between the parts of a row."""
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        assert isinstance(dim, int)
        dim %= value(source).dim()
        rest = ex.pieces_of(self.result.extents[source][dim])
        parts: list[Axis] = []
        for tensor in value(node):
            taken: list[Axis] = []
            while rest and sum(p.length(self.result.counts) for p in taken) < hint(tensor.shape[dim]):
                taken.append(rest.pop(0))
            if sum(p.length(self.result.counts) for p in taken) != hint(tensor.shape[dim]):
                raise Refused(Reason.TOKEN_AXIS, "tokens are cut at a fixed place by split", node)
            parts.append(ex.row_of(taken))
        self.result.pieces[node] = (dim, parts)
        lengths = [part.length(self.sizes) for part in parts]
        return tuple(torch.split(self.of(source), lengths, dim))

    def _piece(self, node: fx.Node) -> torch.Tensor:
        """One part of a split."""
        split, number = node.args
        assert isinstance(split, fx.Node) and isinstance(number, int)
        dim, parts = self.result.pieces[split]
        source = next(n for n in split.all_input_nodes if n in self.result.extents)
        self.known[node] = {**self.result.extents[source], dim: parts[number]}
        return self.changed[split][number]

    def _cuts_tokens(self, node: fx.Node, source: fx.Node) -> bool:
        given = node.kwargs.get("dim", 0)
        spot = {"select": 1, "narrow": 1, "index_select": 1, "slice": 1, "unbind": 1}.get(op_name(node), 2)
        dim = node.args[spot] if len(node.args) > spot else given
        return not isinstance(dim, int) or dim % value(source).dim() in self.result.extents[source]

    def _see_cat(self, node: fx.Node) -> None:
        """Note the token axes of a concatenation; constants beside tokens are made to fit."""
        parts = node.args[0]
        assert isinstance(parts, (list, tuple))
        # `cat` takes an empty tensor of one axis for anything: a cache that holds nothing yet.
        rank = value(node).dim()
        nodes = [part for part in parts if isinstance(part, fx.Node) and value(part).dim() == rank]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        assert isinstance(dim, int)
        dim %= rank
        tokens = [n for n in nodes if n in self.result.extents]
        across = {axis: e for n in tokens for axis, e in self.result.extents[n].items() if axis != dim}
        for other in nodes:
            if across and other not in self.result.extents:
                self._fill(other, across)
        along = [self.result.extents.get(n, {}).get(dim) for n in nodes]
        if not any(along):
            return
        joined: list[Axis] = []
        lead = 0
        for part, extent in zip(nodes, along, strict=True):
            if extent is not None:
                joined.append(extent)
            elif not joined:
                lead += shape(part)[dim]
            elif ex.TOKENS in joined[-1].symbols():
                raise Refused(Reason.TOKEN_AXIS, "rows are appended behind the tokens", node)
            else:
                joined[-1] = _longer(joined[-1], 0, shape(part)[dim])
        joined[0] = _longer(joined[0], lead, 0)
        self.known[node] = {**across, dim: ex.row_of(joined)}

    def _fill(self, other: fx.Node, axes: Mapping[int, Axis]) -> None:
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
            self.changed[node] = self.resized(node, axes)
            self.result.extents[node] = dict(axes)
        self.result.fillers.append(chain[-1])

    def _mask_follower(self, node: fx.Node) -> dict[fx.Node, dict[int, Axis]]:
        mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
        if not isinstance(mask, fx.Node) or mask in self.result.extents:
            return {}
        rank = value(mask).dim()
        found: dict[int, Axis] = {}
        for offset, operand in ((2, node.args[0]), (1, node.args[1])):
            extents = self.result.extents.get(operand, {})  # type: ignore[arg-type]
            axis = value(operand).dim() - 2  # type: ignore[arg-type]
            if axis in extents and shape(mask)[rank - offset] != 1:
                found[rank - offset] = extents[axis]
        return {mask: found} if found else {}

    def _broadcast_followers(self, node: fx.Node, tokens: list[fx.Node]) -> dict[fx.Node, dict[int, Axis]]:
        from_end: dict[int, tuple[int, Axis]] = {}
        for operand in tokens:
            for axis, extent in self.result.extents[operand].items():
                from_end[value(operand).dim() - axis] = (shape(operand)[axis], extent)
        found = {}
        for other in node.all_input_nodes:
            if other in self.result.extents or not is_tensor(other):
                continue
            rank = value(other).dim()
            axes = {
                rank - back: extent
                for back, (size, extent) in from_end.items()
                if back <= rank and shape(other)[rank - back] == size != 1
            }
            if axes:
                found[other] = axes
        return found


def _longer(axis: Axis, plus: int, tail: int) -> Axis:
    """`axis` with rows more in front and behind."""
    if not plus and not tail:
        return axis
    if isinstance(axis, Extent):
        return Extent(axis.factors, axis.plus + plus, axis.tail + tail)
    return Extent((axis,), plus, tail)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape
    return a == b


def trace(
    graph: fx.Graph,
    seeds: Mapping[fx.Node, Mapping[int, Axis]],
    counts: Counts,
    live: set[fx.Node],
    stop: set[fx.Node] | None = None,
) -> TokenAxes:
    """Follow the token axes from `seeds` through every live node after them.

    Args:
        graph: a Dynamo graph whose nodes carry fake values.
        seeds: per node its token axes; `counts` are the sizes of their symbols in the capture.
        live: nodes to visit; others are ignored.
        stop: nodes at which to stop without looking.

    Raises:
        Refused: TOKEN_AXIS with the first node that cannot follow another token count.
    """
    probe = _Probe(counts)
    with probe.mode, torch.no_grad():
        for node in graph.nodes:
            if node in seeds:
                probe.changed[node] = probe.resized(node, seeds[node])
                probe.result.extents[node] = dict(seeds[node])
            elif (
                node in live
                and node.op.startswith("call_")
                and node not in (stop or ())
                and any(n in probe.changed for n in node.all_input_nodes)
            ):
                probe.visit(node)
    return probe.result


def follows(node: fx.Node, parent: fx.Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of `parent` that make up exactly `axes` of `node`, or None where that is not so."""
    if op_name(node) in SIZED:
        return None
    probe = _Probe({ex.TOKENS: 1})
    found, covered = [], set()
    with probe.mode, torch.no_grad():
        plain = probe.run(node, {})
        for axis, size in enumerate(shape(parent)):
            if size == 1:
                continue
            moved = probe.run(node, {parent: probe.resized(parent, {axis: ex.of(ex.TOKENS)})})
            changed = {i for i, (a, b) in enumerate(zip(plain.shape, moved.shape, strict=True)) if a != b}
            if changed and changed <= set(axes):
                found.append(axis)
                covered |= changed
    return tuple(found) if covered == set(axes) else None
