"""Give features that enter the decoder late (deepstack) to their rows without a data-dependent size.

Models add such features by ``h[mask, :] = h[mask, :] + features``. The size of ``h[mask, :]`` is not
known to the graph, and nothing could follow its rows. The same sum, written for every row and taken
where the mask says so, has static sizes, and is cut like any value that goes with the tokens.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from luvc_fx._compat import has_hint, hint
from luvc_fx.graph.emit import MARK, emit
from luvc_fx.graph.nodes import descendants, drop_dead, is_tensor, op_name, order, value
from luvc_fx.passes.support.contract import Edit
from luvc_fx.schedule import Schedule


@dataclass(frozen=True, slots=True)
class _Addition:
    """``written[mask, :] = written[mask, :] + features``."""

    written: fx.Node
    mask: fx.Node
    features: fx.Node
    taken: fx.Node
    put: fx.Node


def spread_deepstack(graph: fx.Graph, schedule: Schedule) -> Edit | None:
    """Add deepstack features to their rows by operations of static sizes.

    In a prompt of 24 rows, with a size `u0` that the graph does not know (how many rows are marked)::

        %h : [1, 24, 64] = clone(%hidden)
        %taken : [u0, 64] = getitem(%h, (%mask, slice(None)))
        %sum : [u0, 64] = add(%taken, %features)
        setitem(%h, (%mask, slice(None)), %sum)
        %norm = layer_norm(%h, ...)

    becomes::

        %h : [1, 24, 64] = clone(%hidden)
        %place : [24] = clamp(sub(cumsum(flatten(%mask), 0), 1), 0)
        %rows : [1, 24, 64] = view(index_select(%features, 0, %place), [1, 24, 64])
        %sum : [1, 24, 64] = where(unsqueeze(%mask, -1), add(%h, %rows), %h)
        %norm = layer_norm(%sum, ...)

    A schedule without prunes cuts no rows of the decoder, and leaves them as they are.
    """
    additions = _deepstack_additions(graph) if schedule.prune else []
    return functools.partial(_rewrite, graph, additions) if additions else None


def _rewrite(graph: fx.Graph, additions: list[_Addition]) -> None:
    for addition in additions:
        _spread(graph, addition)
    drop_dead(graph)


def _deepstack_additions(graph: fx.Graph) -> list[_Addition]:
    """Those of a graph, in order."""
    additions, place = [], order(graph)
    for put in graph.nodes:
        if put.target is not operator.setitem or not _is_mask_index(put.args[1]):
            continue
        written, (mask, _), total = put.args
        if not isinstance(total, fx.Node) or op_name(total) != "add" or len(total.users) != 1:
            continue
        terms = total.args[:2]
        taken = next((t for t in terms if _is_masked_read(t, written, mask)), None)
        features = next((t for t in terms if t is not taken), None)
        if not isinstance(taken, fx.Node) or not isinstance(features, fx.Node) or total.kwargs:
            continue
        addition = _Addition(written, mask, features, taken, put)
        if op_name(written) == "clone" and _marks_own_rows(addition) and _is_read_only_after(addition, place):
            additions.append(addition)
    return additions


def _marks_own_rows(addition: _Addition) -> bool:
    """Whether each row that the mask marks gets a row of its own; a single one would be spread over all."""
    written, mask, features = value(addition.written), value(addition.mask), value(addition.features)
    return (
        mask.dim() + 1 == written.dim()
        and features.dim() == 2
        and features.shape[1] == written.shape[-1]
        and has_hint(features.shape[0])
        and hint(features.shape[0]) != 1
    )


def _is_read_only_after(addition: _Addition, place: dict[fx.Node, int]) -> bool:
    """Whether nothing else sees the rows before they are written, or those that were taken."""
    others = [n for n in addition.written.users if n not in (addition.taken, addition.put)]
    sums = [n for n in addition.taken.users if op_name(n) != "sym_size"]
    return len(sums) == 1 and all(place[n] > place[addition.put] for n in others)


def _is_mask_index(index: object) -> bool:
    return (
        isinstance(index, tuple)
        and len(index) == 2
        and is_tensor(index[0])
        and value(index[0]).dtype == torch.bool
        and index[1] == slice(None)
    )


def _is_masked_read(node: object, written: object, mask: object) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.target is operator.getitem
        and node.args == (written, (mask, slice(None)))
    )


def _source(node: fx.Node) -> fx.Node:
    """What `node` is a copy of, on another device or in another precision, but for roundings between."""
    dtype = value(node).dtype
    while op_name(node) == "to" and isinstance(node.args[0], fx.Node):
        if value(node).dtype not in (dtype, value(node.args[0]).dtype):
            break
        node = node.args[0]
    return node


def _spread(graph: fx.Graph, addition: _Addition) -> None:
    before = set(graph.nodes)

    # What a site shortens lies behind it, so what needs all rows is computed where they came from.
    mask, features = _source(addition.mask), _source(addition.features)

    def spread(mask: Tensor, features: Tensor) -> Tensor:
        # A mask takes rows in order, row after row of the batch.
        place = (mask.flatten().cumsum(0) - 1).clamp(min=0)
        return features.index_select(0, place).reshape(*mask.shape, features.shape[-1])

    def add(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        return torch.where(mask.unsqueeze(-1), x + rows.to(x.dtype), x)

    (rows,) = emit(graph, "deepstack", spread, mask, features)
    (total,) = emit(graph, "deepstack", add, addition.written, mask, rows)
    for node in set(graph.nodes) - before:
        del node.meta[MARK]  # part of the model, as what it stands for
    for user in list(addition.written.users):
        if user not in (addition.taken, addition.put) and user in before:
            user.replace_input_with(addition.written, total)
    graph.erase_node(addition.put)
    sized = descendants(addition.taken)
    for node in reversed([n for n in graph.nodes if n in sized and op_name(n) == "_assert_scalar"]):
        graph.erase_node(node)
