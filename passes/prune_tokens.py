"""Insert a selector and a compaction before decoder layers."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from luvc_fx.extents import TOKENS
from luvc_fx.fx_util import value
from luvc_fx.ops import gather_rows, mask_to_index
from luvc_fx.passes.compact_rows import compact_followers
from luvc_fx.passes.context import Context
from luvc_fx.passes.emit import emit
from luvc_fx.plan import PruneSite
from luvc_fx.selectors import Site, choose


def prune_tokens(context: Context) -> None:
    """Prune at every planned site, from the first layer to the last."""
    decoder = context.anatomy.decoder
    if decoder is None or not context.plan.prunes:
        return
    if context.visual is None:
        context.visual = _visual_rows(context)
    for site in context.plan.prunes:
        context.retarget.advance(site.node)
        name = f"prune before decoder layer {site.layer}"
        body = _prune_body(site, _place(context, site))
        short, rows, context.visual = emit(context.graph, name, body, site.node, context.visual)
        context.retarget.replace(site.node, short, {TOKENS: value(short).shape[1]})
        compact_followers(context, name, site.node, rows, rows)
        context.report.inserted.append(f"{name}: {site.prune.selector} {site.left} -> {site.count}")


def _visual_rows(context: Context) -> fx.Node:
    """Bool ``[batch, rows]`` of the visual tokens, with a check that each row has as many as planned."""
    decoder = context.anatomy.decoder
    assert decoder is not None
    tokens = decoder.visual

    def body(*masks: Tensor) -> Tensor:
        visual = masks[0].select(-1, 0)
        for mask in masks[1:]:
            visual = visual.logical_or(mask.select(-1, 0))
        if visual.shape[0] != 1:
            right = (visual.sum(1) == tokens).all()
            torch.ops.aten._assert_async.msg(
                right, f"luvc_fx was compiled for {tokens} visual tokens in each row of the batch"
            )
        return visual.clone()

    (visual,) = emit(context.graph, "visual rows", body, *decoder.masks)
    return visual


def _place(context: Context, site: PruneSite) -> Site:
    """What a selector is told about `site`."""
    decoder = context.anatomy.decoder
    assert decoder is not None
    images = 1 if site.grid is None else site.left // (site.grid[0] * site.grid[1])
    if site.prune.per_image and site.grid is None and site.left == context.plan.fused:
        context.report.notes.append(
            f"before decoder layer {site.layer} the images of a row cannot be told apart, as the token grid "
            "is not known: per_image filters over the whole row"
        )
    return Site(site.layer, len(decoder.entering), site.grid, images)


def _prune_body(site: PruneSite, place: Site):  # type: ignore[no-untyped-def]
    def body(x: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = x.shape[1] - site.left + site.count
        stays = visual.logical_not()
        if site.count:
            places = mask_to_index(visual, site.left)
            tokens = gather_rows(x, places, 1)
            kept = places.gather(1, choose(tokens, site.prune, site.count, place))
            stays = stays.scatter(1, kept, True)
        rows = mask_to_index(stays, length)
        return gather_rows(x, rows, 1), rows, visual.gather(1, rows)

    return body
