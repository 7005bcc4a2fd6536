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
from typing import Any

import torch
from torch import fx

from luvc_fx._compat import tree_leaves, tree_map
from luvc_fx.anatomy.attention import FUSED
from luvc_fx.anatomy.axes import cuts
from luvc_fx.anatomy.axes.lengths import TOKENS, Axis, Counts, Extent, align, axis_of
from luvc_fx.anatomy.axes.probe import ALIGNED, EXPANDING, SIZED, Join, Probe, TokenAxes
from luvc_fx.graph.nodes import (
    carries_tensor,
    concrete,
    is_tensor,
    op_name,
    settled_size,
    shape,
    value,
    writes,
)
from luvc_fx.report import Reason, Refused

CUTTING = {"select", "narrow", "split", "chunk", "unbind", "index_select", "slice", "tensor_split"}
ELEMENTWISE = {
    *("add", "sub", "mul", "div", "truediv", "pow", "maximum", "minimum", "where", "masked_fill"),
    *("iadd", "isub", "imul", "itruediv", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"),
    *("logical_and", "logical_or"),
}


class _Tracer(Probe):
    """Visits the nodes in order and notes the token axes of each."""

    def visit(self, node: fx.Node) -> None:
        if settled_size(node) is not None:
            return
        is_new = is_tensor(node) and node not in self.known
        if is_new and not any(carries_tensor(n) for n in node.all_input_nodes if n in self.changed):
            # Positions, say: after a merge they would be counted anew, and tokens keep their own.
            raise Refused(Reason.TOKEN_AXIS, "a value is made of the number of rows alone", node)
        result = self._sized(node) if op_name(node) in SIZED else self._general(node)
        old = value(node)
        self.changed[node] = result
        if not isinstance(old, torch.Tensor):
            before, after = tree_leaves(tree_map(concrete, old)), tree_leaves(result)
            if all(_is_unchanged(a, b) for a, b in zip(before, after, strict=True)):
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
        return align(shape(source), old, new, self.result.counts, node)

    def _recognised(self, length: int, node: fx.Node) -> Axis:
        """What an axis of this probed length holds, from the token axes of the node's inputs."""
        candidates = [e for n in node.all_input_nodes for e in self.result.extents.get(n, {}).values()]
        # What comes out of a tuple has an input without a shape of its own.
        candidates = candidates or [e for by_axis in self.result.extents.values() for e in by_axis.values()]
        for extent in candidates:
            if extent.length(self.sizes) == length:
                return extent
        for extent in candidates:
            core = Extent(extent.factors if isinstance(extent, Extent) else (extent,))
            times, rows_before = divmod(length, core.length(self.sizes))
            if times >= 1 and rows_before < min(self.sizes.values()):
                return Extent(core.times(times, outer=True).factors, rows_before)
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
                return cuts.piece(self, node)
            if tokens and parent is tokens[0]:
                extents = self.result.extents[tokens[0]]
                lead = max((extent.rows_before for extent in extents.values()), default=0)
                crops = cuts.refuse_fixed_cuts(node, tokens[0], extents, lead)
                if crops:
                    return cuts.crop(self, node, tokens[0], crops)
        if name in CUTTING and tokens and self._cuts_tokens(node, tokens[0]):
            if name == "split":
                return cuts.split(self, node, tokens[0])
            raise Refused(Reason.TOKEN_AXIS, f"tokens are cut at a fixed place by {name}", node)
        if name == "interpolate" and tokens:
            return cuts.pool(self, node, tokens[0])
        followers = {}
        if name == "cat":
            cuts.concatenate(self, node)
        elif name in FUSED:
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

    def _cuts_tokens(self, node: fx.Node, source: fx.Node) -> bool:
        given = node.kwargs.get("dim", 0)
        spot = {"select": 1, "narrow": 1, "index_select": 1, "slice": 1, "unbind": 1}.get(op_name(node), 2)
        dim = node.args[spot] if len(node.args) > spot else given
        return not isinstance(dim, int) or dim % value(source).dim() in self.result.extents[source]

    def _mask_follower(self, node: fx.Node) -> dict[fx.Node, dict[int, Axis]]:
        mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
        if not isinstance(mask, fx.Node) or mask in self.result.extents:
            return {}
        rank = value(mask).dim()
        mask_axes: dict[int, Axis] = {}
        for offset, operand in ((2, node.args[0]), (1, node.args[1])):
            extents = self.result.extents.get(operand, {})  # type: ignore[arg-type]
            axis = value(operand).dim() - 2  # type: ignore[arg-type]
            if axis in extents and shape(mask)[rank - offset] != 1:
                mask_axes[rank - offset] = extents[axis]
        return {mask: mask_axes} if mask_axes else {}

    def _broadcast_followers(self, node: fx.Node, tokens: list[fx.Node]) -> dict[fx.Node, dict[int, Axis]]:
        from_end: dict[int, tuple[int, Axis]] = {}
        for operand in tokens:
            for axis, extent in self.result.extents[operand].items():
                from_end[value(operand).dim() - axis] = (shape(operand)[axis], extent)
        followers = {}
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
                followers[other] = axes
        return followers


def _is_unchanged(a: Any, b: Any) -> bool:
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
    probe = _Tracer(counts)
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
    probe = _Tracer({TOKENS: 1})
    axes_of_parent, covered = [], set()
    with probe.mode, torch.no_grad():
        plain = probe.run(node, {})
        for axis, size in enumerate(shape(parent)):
            if size == 1:
                continue
            moved = probe.run(node, {parent: probe.resized(parent, {axis: axis_of(TOKENS)})})
            changed = {i for i, (a, b) in enumerate(zip(plain.shape, moved.shape, strict=True)) if a != b}
            if changed and changed <= set(axes):
                axes_of_parent.append(axis)
                covered |= changed
    return tuple(axes_of_parent) if covered == set(axes) else None
