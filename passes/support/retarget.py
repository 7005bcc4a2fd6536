"""Make the graph behind a site right for the new token count.

One walk over the graph in order. A node whose inputs changed runs again on fake values; before that,
literal sizes of views and expands that followed the old count are rewritten. Afterwards every token
axis must have the length that the analysis promised: a size that only broadcast by luck is caught.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from luvc_fx._compat import FakeTensor, FakeTensorMode, fake_run, hint, tree_leaves, tree_map
from luvc_fx.anatomy.axes.lengths import TOKENS, Axis, Counts
from luvc_fx.anatomy.axes.probe import SIZED, TokenAxes, set_sizes, sizes_of
from luvc_fx.graph.emit import MARK, inserted
from luvc_fx.graph.nodes import concrete, fold_sizes, op_name, run, value
from luvc_fx.report import Reason, Refused


class Retarget:
    """A cursor that moves once over the graph, from front to back.

    `place` declares the token counts of an inserted value; `advance` brings everything up to a node
    up to date, so that the next site sees true shapes.
    """

    def __init__(self, graph: fx.Graph, *axes: TokenAxes) -> None:
        self.graph = graph
        self.extents: dict[fx.Node, dict[int, Axis]] = {}
        self.space: dict[fx.Node, int] = {}
        self.pieces: dict[fx.Node, tuple[int, list[Axis]]] = {}
        self.crops: dict[fx.Node, dict[int, slice]] = {}
        for number, space in enumerate(axes):
            self.extents.update(space.extents)
            self.pieces.update(space.pieces)
            self.crops.update(space.crops)
            self.space.update(dict.fromkeys((*space.extents, *space.pieces), number))
        self.counts: dict[fx.Node, Counts] = {}
        self.dirty: set[fx.Node] = set()
        self.cursor: fx.Node = next(iter(graph.nodes))
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        fold_sizes(graph)

    def place(self, new: fx.Node, like: fx.Node, counts: Counts) -> None:
        """Declare that `new` has its token axes where `like` has them, and holds `counts` tokens."""
        self.extents[new] = self.extents[like]
        self.space[new] = self.space[like]
        self.counts[new] = counts

    def replace(self, old: fx.Node, new: fx.Node, counts: Counts) -> None:
        """Let every captured user of `old` read `new`, which holds `counts` tokens."""
        self.place(new, old, counts)
        for user in list(old.users):
            if not inserted(user):
                self.rewire(user, old, new)

    def rewire(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let one user read `new` instead of `old`; it is brought up to date in passing."""
        user.replace_input_with(old, new)
        self.dirty.add(user)

    def fill(self, node: fx.Node, counts: Counts) -> None:
        """Let a constant that is expanded to lie beside the tokens be as long as `counts` tokens."""
        self.counts[node] = counts
        self.dirty.add(node)

    def advance(self, until: fx.Node | None = None) -> None:
        """Bring every node up to `until`, itself included, up to date (all of them if None)."""
        node = self.cursor
        while node.op != "output":
            touched = node in self.dirty or any(n in self.dirty for n in node.all_input_nodes)
            if inserted(node):
                self.dirty.add(node)
            elif touched and node.op.startswith("call_"):
                self._update(node)
                self.dirty.add(node)
            if node is until:
                self.cursor = node
                return
            node = node.next
        self.cursor = node
        if until is not None:
            raise AssertionError(f"{until} lies behind the walk")

    def _update(self, node: fx.Node) -> None:
        counts, extents = self._counts_of(node), self.extents.get(node)
        if node in self.pieces and counts is not None:
            self._update_split(node, counts)
            return
        if not extents or counts is None:
            node.meta["example_value"] = _run(node)
            return
        old = value(node)
        try:
            lengths = {axis: extent.length(_values(counts)) for axis, extent in extents.items()}
        except ValueError as error:
            raise Refused(Reason.TOKEN_AXIS, str(error), node) from None
        # Beside rows of a cache, whose number is not known: their count is never written down.
        open_ended = {
            a for a, e in extents.items() if e.rows_before and isinstance(old.shape[a], torch.SymInt)
        }
        if op_name(node) in SIZED:
            sizes_by_axis = {a: None if a in open_ended else n for a, n in lengths.items()}
            self._resize(node, extents, sizes_by_axis, counts)
        elif node in self.crops:
            self._recrop(node)
        elif op_name(node) == "interpolate":
            rest = {k: v for k, v in node.kwargs.items() if k not in ("size", "scale_factor")}
            node.args, node.kwargs = node.args[:1], {**rest, "size": [lengths[2], lengths[3]]}
        sizes = list(old.shape)
        for axis, length in lengths.items():
            sizes[axis] = length
        self._verify_shape(node, [hint(size) for size in sizes])
        self.counts[node] = counts
        if open_ended:
            node.meta["example_value"] = _run(node)
            return
        with fake_run([old]):
            node.meta["example_value"] = torch.empty(sizes, dtype=old.dtype, device=old.device)

    def _update_split(self, node: fx.Node, counts: Counts) -> None:
        dim, parts = self.pieces[node]
        lengths = [part.length(_values(counts)) for part in parts]
        pairs = zip(lengths, parts, strict=True)
        sizes = [n if isinstance(n, int) else self._length_node(node, part, counts) for n, part in pairs]
        node.args = (node.args[0], sizes, dim)
        node.kwargs = {}
        self.counts[node] = counts
        node.meta["example_value"] = _run(node)

    def _recrop(self, node: fx.Node) -> None:
        """As much off the end as off the front, of a value that has another length now."""
        source, index = node.args
        assert isinstance(source, fx.Node)
        crops, rank = self.crops[node], value(source).dim()
        items = list(index) if isinstance(index, tuple) else [index]
        place = items.index(Ellipsis) if Ellipsis in items else len(items)
        items[place : place + 1] = [slice(None)] * (rank - len(items) + (Ellipsis in items))
        for axis, crop in crops.items():
            items[axis] = slice(crop.start, hint(value(source).shape[axis]) - crop.start)
        node.args = (source, tuple(items))

    def _counts_of(self, node: fx.Node) -> Counts | None:
        if node in self.counts:
            return self.counts[node]
        space = self.space.get(node)
        sources = [m for n in node.all_input_nodes for m in (n.all_input_nodes if _is_tuple(n) else [n])]
        counts = [self.counts[n] for n in sources if n in self.counts and self.space[n] == space]
        seen = {tuple(sorted((k, hint(v)) for k, v in _values(held).items())) for held in counts}
        if len(seen) > 1:
            raise Refused(Reason.TOKEN_AXIS, "values with different token counts meet", node)
        return counts[0] if counts else None

    def _resize(
        self, node: fx.Node, extents: dict[int, Axis], lengths: dict[int, Any], counts: Counts
    ) -> None:
        sizes = sizes_of(node)
        for axis, length in lengths.items():
            if isinstance(sizes[axis], int) and sizes[axis] == -1:
                continue
            if isinstance(length, int):
                sizes[axis] = length
            elif any(isinstance(count, fx.Node) for count in counts.values()):
                sizes[axis] = self._length_node(node, extents[axis], counts)
            else:
                sizes[axis] = self._size_node(node, extents[axis])
        set_sizes(node, sizes)

    def _length_node(self, node: fx.Node, extent: Axis, counts: Counts) -> fx.Node:
        """A node for the length of an axis, computed in front of `node` from the nodes in `counts`."""
        with self.graph.inserting_before(node):
            written = {k: _Written(v, self._call) if isinstance(v, fx.Node) else v for k, v in counts.items()}
            length = extent.length(written)
        assert isinstance(length, _Written)
        return length.node

    def _size_node(self, node: fx.Node, extent: Axis) -> fx.Node:
        """A node for a symbolic length, computed from the value that `node` reshapes."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis, known = next(iter(self.extents[source].items()))
        # Only the count of a sequence is ever symbolic, so each length is a constant times it.
        one = {TOKENS: 1}
        with self.graph.inserting_before(node):
            size = self._call(torch.ops.aten.sym_size.int, source, axis)
            if known != extent and (known.rows_before or extent.rows_before):
                text = "rows before the tokens and a length that is not known"
                raise Refused(Reason.TOKEN_AXIS, text, node)
            if known != extent:
                size = self._call(operator.floordiv, size, known.length(one))
                size = self._call(operator.mul, size, extent.length(one))
        return size

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {"example_value": _run(node), MARK: "retarget"}
        return node

    def _verify_shape(self, node: fx.Node, wanted: list[int]) -> None:
        """Run the node on the sizes seen while tracing: much faster than on symbolic ones."""
        try:
            with self.mode, torch.no_grad():
                result = run(node, lambda n: tree_map(concrete, value(n)))
        except Exception as error:
            text = f"{op_name(node)} fails on the new count: {error}"
            raise Refused(Reason.TOKEN_AXIS, text, node) from error
        if list(result.shape) != wanted:
            text = f"{op_name(node)} gives {list(result.shape)} where {wanted} is right"
            raise Refused(Reason.TOKEN_AXIS, text, node)


class _Written:
    """A whole number in a graph, whose arithmetic writes nodes."""

    def __init__(self, node: fx.Node, call: Callable[..., fx.Node]) -> None:
        self.node = node
        self._call = call

    def _with(self, target: Callable[..., Any], other: Any) -> _Written:
        return _Written(self._call(target, self.node, getattr(other, "node", other)), self._call)

    def __mul__(self, other: Any) -> _Written:
        return self if isinstance(other, int) and other == 1 else self._with(operator.mul, other)

    def __add__(self, other: Any) -> _Written:
        return self if isinstance(other, int) and other == 0 else self._with(operator.add, other)

    def __floordiv__(self, other: int) -> _Written:
        return self if other == 1 else self._with(operator.floordiv, other)

    __rmul__, __radd__ = __mul__, __add__


def _values(counts: Counts) -> dict[str, Any]:
    """Numbers in place of nodes: ints, or SymInts."""
    return {key: value(count) if isinstance(count, fx.Node) else count for key, count in counts.items()}


def _is_tuple(node: fx.Node) -> bool:
    """Whether `node` is a split or a chunk: its parts have token axes, and itself has none."""
    return isinstance(value(node), (tuple, list))


def _run(node: fx.Node) -> Any:
    """The fake value of a node that follows no token count: it runs again."""
    fakes = [leaf for n in node.all_input_nodes for leaf in tree_leaves(value(n))]
    with fake_run([fake for fake in fakes if isinstance(fake, FakeTensor)]):
        return run(node, value)
