"""Rotary tables inside an encoder: a merged token turns by the mean of its tokens' angles.

Angles are linear in the coordinates, so their mean by size is the angle of the mean coordinate. They
merge as the tokens do, and cosine and sine are taken again from what they have become.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from luvc_fx.anatomy.axes.probe import Join
from luvc_fx.graph.emit import emit
from luvc_fx.graph.nodes import ancestors, descendants, is_tensor, op_name, order, reach, run, shape, value
from luvc_fx.passes.support.compact_rows import root_of
from luvc_fx.passes.support.context import Context
from luvc_fx.plan import MergeSite
from luvc_fx.report import Reason, Refused


def find_angles(context: Context, site: MergeSite) -> fx.Node | None:
    """The angles ``[patches, ...]`` that rotary tables of later blocks are made of, or None without any.

    Raises:
        Refused: TOKEN_AXIS where something else meets the tokens behind the site.
    """
    tables: set[fx.Node] = set()
    for _, root, _ in _joins_behind(context, site):
        angles = _angles_of(root.follower)
        if len(angles) != 1:
            text = "a value that is no rotary table meets the tokens behind a merge"
            raise Refused(Reason.TOKEN_AXIS, text, root.follower)
        tables |= angles
    if not tables:
        return None
    table, rows = tables.pop(), shape(site.node)
    if tables or shape(table)[0] != rows[0] or len(rows) != 2:
        raise Refused(Reason.TOKEN_AXIS, "the angles of a rotary table do not lie patch by patch", table)
    return table


def _angles_of(table: fx.Node) -> set[fx.Node]:
    """The inputs of the nearest cosines and sines that `table` is computed from."""

    def turns(node: fx.Node) -> bool:
        return op_name(node) in ("cos", "sin")

    above = reach([table], lambda node: () if turns(node) else node.all_input_nodes)
    return {node.all_input_nodes[0] for node in above if turns(node)}


def turn_followers(context: Context, name: str, site: MergeSite, angles: fx.Node, merged: fx.Node) -> None:
    """Let every later block read tables made of the merged angles."""
    encoder = context.anatomy.encoder
    assert encoder is not None
    remade: dict[fx.Node, fx.Node] = {}
    for number, root, consumer in _joins_behind(context, site):
        if root.follower not in remade:
            remade[root.follower] = _again(context, name, root.follower, angles, merged)
        join = encoder.axes.joins[number]
        context.retarget.rewire(consumer or join.consumer, root.follower, remade[root.follower])
        if consumer is None:
            encoder.axes.joins[number] = Join(join.consumer, remade[root.follower], join.axes)


def _joins_behind(context: Context, site: MergeSite) -> list[tuple[int, Join, fx.Node | None]]:
    """For each value that meets tokens behind the site: its number, and what `root_of` says of it."""
    encoder = context.anatomy.encoder
    assert encoder is not None
    place = order(context.graph)
    return [
        (number, *root_of(join, place, place[site.node]))
        for number, join in enumerate(encoder.axes.joins)
        if place[join.consumer] > place[site.node]
    ]


def _again(context: Context, name: str, table: fx.Node, angles: fx.Node, merged: fx.Node) -> fx.Node:
    """`table`, computed from other angles."""
    between = descendants(angles) & reach([table], lambda n: () if n is angles else n.all_input_nodes)
    between -= {angles}
    steps = [n for n in context.graph.nodes if n in between]
    others = [n for n in ancestors(table) if n not in between and n is not angles and is_tensor(n)]
    others = [n for n in others if any(user in between for user in n.users)]

    def body(turned: Tensor, *rest: Tensor) -> Tensor:
        known: dict[fx.Node, object] = {angles: turned, **dict(zip(others, rest, strict=True))}
        for step in steps:
            known[step] = run(step, lambda n: known[n] if n in known else value(n))
        result = known[table]
        assert isinstance(result, torch.Tensor)
        return result

    (again,) = emit(context.graph, name, body, merged, *others)
    if shape(again)[1:] != shape(table)[1:] or shape(again)[0] != shape(merged)[0]:
        raise Refused(Reason.TOKEN_AXIS, "a rotary table does not lie patch by patch", table)
    return again
