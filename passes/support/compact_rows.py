"""Cut the token axis of the residual stream and of everything that goes with it."""

from __future__ import annotations

from torch import Tensor, fx

from luvc_fx.anatomy.axes.probe import Join
from luvc_fx.anatomy.axes.trace import follows
from luvc_fx.graph.emit import emit, inserted
from luvc_fx.graph.nodes import is_tensor, order, value
from luvc_fx.ops import gather_rows
from luvc_fx.passes.support.causal_mask import Causal, read_causal
from luvc_fx.passes.support.context import Context
from luvc_fx.report import Reason, Refused


def compact_followers(context: Context, site: str, at: fx.Node, places: fx.Node, ascending: fx.Node) -> None:
    """Shorten the values that meet the tokens behind `at`: rotary tables, masks, row numbers.

    Rotary tables are unsqueezed again in every layer: a value is cut once, where its copies are made of,
    and every user behind the site reads the short one or is made of it.

    Args:
        places: int64 ``[batch, rows']``, for each new row the old row whose position it has.
        ascending: the same rows in sequence order, for masks: who may see whom follows the sequence.
    """
    decoder = context.anatomy.decoder
    assert decoder is not None
    axes = decoder.axes
    place = order(context.graph)
    cut: dict[fx.Node, fx.Node] = {}
    for number, join in enumerate(axes.joins):
        if place[join.consumer] <= place[at]:
            continue
        root, consumer = root_of(join, place, place[at])
        if root.follower in cut.values():
            continue
        if root.follower not in cut:
            cut[root.follower] = _cut(context, site, root, at, places, ascending)
        if consumer is None:
            context.retarget.rewire(join.consumer, root.follower, cut[root.follower])
            axes.joins[number] = Join(join.consumer, cut[root.follower], join.axes)
        else:
            context.retarget.rewire(consumer, root.follower, cut[root.follower])
    _compact_rows_outputs(context, site, at, places)


def _compact_rows_outputs(context: Context, site: str, at: fx.Node, places: fx.Node) -> None:
    """Row numbers asked for by the front door meet no token; only the output reads them."""
    decoder = context.anatomy.decoder
    assert decoder is not None
    for marker in decoder.rows_outputs:
        newest = context.rows.get(marker, marker)
        rows = _gather(context, site, newest, (1,), at, places)
        for user in list(newest.users):
            if not inserted(user):
                user.replace_input_with(newest, rows)
        context.rows[marker] = rows


def root_of(join: Join, place: dict[fx.Node, int], site: int) -> tuple[Join, fx.Node | None]:
    """The value to cut for `join`: where the follower is computed behind the site, what it is computed from.

    Returns:
        The join with that value as its follower, and the node that reads it; None where that node is the
        consumer of the join itself.
    """
    consumer: fx.Node | None = None
    follower, axes = join.follower, join.axes
    while place.get(follower, -1) > site and not inserted(follower):
        parents = [n for n in follower.all_input_nodes if is_tensor(n)]
        if len(parents) != 1 or len(follower.all_input_nodes) != 1:
            break
        parent_axes = follows(follower, parents[0], axes)
        if parent_axes is None or 0 in parent_axes:
            break
        consumer, follower, axes = follower, parents[0], parent_axes
    return Join(join.consumer, follower, axes), consumer


def _cut(
    context: Context, site: str, root: Join, at: fx.Node, places: fx.Node, ascending: fx.Node
) -> fx.Node:
    if 0 in root.axes:
        raise Refused(Reason.TOKEN_AXIS, "a value without a batch axis follows the tokens", root.follower)
    index = ascending if len(root.axes) > 1 else places
    if root.axes == (2, 3):
        known = context.causal.get(root.follower) or read_causal(root.follower)
        if known is not None:
            return _remade(context, site, known, at, ascending)
    return _gather(context, site, root.follower, root.axes, at, index)


def _remade(context: Context, site: str, known: Causal, at: fx.Node, ascending: fx.Node) -> fx.Node:
    """The mask of the rows that are left, built from what `known` says instead of gathered on two axes."""
    given = () if known.keys is None else (known.keys,)
    mask, *keys = emit(context.graph, site, known.shortened(), ascending, *given, after=at)
    context.causal[mask] = Causal(keys[0] if keys else None, known.added)
    return mask


def _gather(
    context: Context, site: str, source: fx.Node, axes: tuple[int, ...], at: fx.Node, index: fx.Node
) -> fx.Node:
    if value(source).shape[0] not in (1, value(index).shape[0]):
        raise Refused(Reason.TOKEN_AXIS, "a value with another batch follows the tokens", source)

    def body(x: Tensor, rows: Tensor) -> Tensor:
        for axis in axes:
            x = gather_rows(x, rows, axis)
        return x

    (short,) = emit(context.graph, site, body, source, index, after=at)
    return short
