"""Write what tensor parallelism leaves in a graph so that a token axis can be followed through it.

Dynamo writes ``all_reduce(x)`` as a sum over the processes that is copied back into ``x``; the same sum,
read in place of ``x``, changes nothing in place. And a result whose last axis lies in shares on the
processes is put together by a `DTensor` with the full shape as numbers; the same exchange in functional
collectives has none.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from luvc_fx._compat import Shares, shares_of
from luvc_fx.graph.emit import MARK, emit
from luvc_fx.graph.nodes import op_name, order, value
from luvc_fx.passes.support.contract import Edit
from luvc_fx.schedule import Schedule


@dataclass(frozen=True, slots=True)
class _Sum:
    """``x.copy_(total)`` with ``total`` the sum of ``x`` over the processes."""

    x: fx.Node
    total: fx.Node
    copy: fx.Node


@dataclass(frozen=True, slots=True)
class _Gather:
    """``whole = DTensor.from_local(x, ...).redistribute(replicated).to_local()``."""

    x: fx.Node
    whole: fx.Node
    shares: Shares


def plain_collectives(graph: fx.Graph, schedule: Schedule) -> Edit | None:
    """Write collectives of tensor parallelism so that a token axis can be followed through them.

    A sum over the processes that is copied back::

        %x = linear(%h, %w)
        %reduced = all_reduce(%x, "sum", "0")
        %total = wait_tensor(%reduced)
        %copied = copy_(%x, %total)
        %y = add(%h, %x)

    becomes a sum that is read in place of what it was copied into::

        %x = linear(%h, %w)
        %reduced = all_reduce(%x, "sum", "0")
        %total = wait_tensor(%reduced)
        %y = add(%h, %total)

    A last axis of 10 that `DTensor` puts together from shares on two processes::

        %local : [1, 24, 5] = from_local(%x, ...)
        %spread = redistribute(%local, ...)
        %whole : [1, 24, 10] = to_local(%spread)

    becomes the same exchange, in which no number of rows is written down::

        %front : [5, 1, 24] = movedim(%x, -1, 0)
        %gathered = all_gather_into_tensor(contiguous(%front), 2, "0")
        %all : [10, 1, 24] = wait_tensor(%gathered)
        %whole : [1, 24, 10] = movedim(%all, 0, -1)
    """
    if not (schedule.merge or schedule.prune):
        return None
    collectives = _collectives(graph)
    return functools.partial(_rewrite, graph, collectives) if collectives else None


def _collectives(graph: fx.Graph) -> list[_Sum | _Gather]:
    """Those of a graph, in order."""
    collectives: list[_Sum | _Gather] = []
    for node in graph.nodes:
        if op_name(node) == "copy_" and (total := _sum_of(node)) is not None:
            collectives.append(total)
        elif op_name(node) == "to_local" and (gather := _gather_of(node)) is not None:
            collectives.append(gather)
    return collectives


def _rewrite(graph: fx.Graph, collectives: list[_Sum | _Gather]) -> None:
    place = order(graph)
    for collective in collectives:
        if isinstance(collective, _Gather):
            _gather(graph, collective)
            continue
        for user in list(collective.x.users):
            if place[user] > place[collective.copy]:
                user.replace_input_with(collective.x, collective.total)
        collective.copy.replace_all_uses_with(collective.total)
        graph.erase_node(collective.copy)


def _sum_of(copy: fx.Node) -> _Sum | None:
    """`copy` as the end of an all-reduce, where nothing else can see that `x` changes."""
    x, total = copy.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(total, fx.Node) or op_name(total) != "wait_tensor":
        return None
    reduced = total.args[0]
    if not isinstance(reduced, fx.Node) or op_name(reduced) != "all_reduce" or reduced.args[0] is not x:
        return None
    between: set[fx.Node] = set()
    node = copy.prev
    while node is not x:
        between.add(node)
        node = node.prev
    # A matrix product is new memory; what reads it before the copy may be a view of it.
    alone = set(x.users) & between == {reduced}
    return _Sum(x, total, copy) if op_name(x) in ("linear", "matmul", "mm", "addmm") and alone else None


def _gather_of(whole: fx.Node) -> _Gather | None:
    spread = whole.args[0]
    if not isinstance(spread, fx.Node) or op_name(spread) != "redistribute" or len(spread.users) != 1:
        return None
    shared = spread.args[0]
    if not isinstance(shared, fx.Node) or op_name(shared) != "from_local" or len(shared.users) != 1:
        return None
    x = shared.args[0]
    shares = shares_of(value(shared), value(spread))
    return _Gather(x, whole, shares) if isinstance(x, fx.Node) and shares is not None else None


def _gather(graph: fx.Graph, gather: _Gather) -> None:
    size, group, length = gather.shares.processes, gather.shares.group, gather.shares.length
    each = -(-length // size)

    def body(x: Tensor) -> Tensor:
        # Shares may be unequal: the last one is shorter.
        full = pad(x, (0, each - x.shape[-1])).movedim(-1, 0).contiguous()
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(full, size, group)
        whole = torch.ops._c10d_functional.wait_tensor(gathered)
        return whole.narrow(0, 0, length).movedim(0, -1)

    before = set(graph.nodes)
    (new,) = emit(graph, "collectives", body, gather.x, after=gather.whole)
    for node in set(graph.nodes) - before:
        del node.meta[MARK]  # part of the model, as what it stands for
    gather.whole.replace_all_uses_with(new)
