"""Insert a selector and a compaction before decoder layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, fx

from luvc_fx.extents import TOKENS
from luvc_fx.fx_util import value
from luvc_fx.ops import drop_tokens, gather_rows, mask_to_index
from luvc_fx.passes.compact_rows import compact_followers
from luvc_fx.passes.context import Context
from luvc_fx.passes.emit import emit
from luvc_fx.passes.last_query import last_query
from luvc_fx.plan import PruneSite
from luvc_fx.selectors import Site, choose_mask, wants_attention


def prune_tokens(context: Context) -> None:
    """Prune at every planned site, from the first layer to the last."""
    decoder = context.anatomy.decoder
    if decoder is None or not context.plan.prunes:
        return
    if context.places is None:
        context.places = _visual_rows(context)
    for site in context.plan.prunes:
        context.retarget.advance(site.node)
        name = f"prune before decoder layer {site.layer}"
        nodes: list[fx.Node] = []
        paid: Callable[..., Tensor] | None = None
        if wants_attention(site.prune.selector) and 0 < site.count < site.left and site.layer:
            nodes, paid = last_query(decoder.calls[site.layer - 1])
        body = _prune_body(site, _place(context, site), paid)
        short, rows, context.places = emit(context.graph, name, body, site.node, context.places, *nodes)
        context.retarget.replace(site.node, short, {TOKENS: value(short).shape[1]})
        compact_followers(context, name, site.node, rows, rows)
        context.report.inserted.append(f"{name}: {site.prune.selector} {site.left} -> {site.count}")


def _visual_rows(context: Context) -> fx.Node:
    """Int64 ``[batch, tokens]``, with a check that each row has as many visual tokens as planned."""
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
        return mask_to_index(visual, tokens)

    (places,) = emit(context.graph, "visual rows", body, *decoder.masks)
    return places


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


def _prune_body(  # type: ignore[no-untyped-def]
    site: PruneSite, place: Site, paid: Callable[..., Tensor] | None
):
    def body(x: Tensor, places: Tensor, *looked_at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = x.shape[1]
        told = place if paid is None else dataclasses.replace(place, paid=paid(places, *looked_at))
        keep, ahead = choose_mask(gather_rows(x, places, 1), site.prune, site.count, told)
        rows = drop_tokens(places, keep, ahead, length, length - site.left + site.count)
        kept = mask_to_index(keep, site.count)
        # A token moves up by those before it that went.
        moved = places.gather(1, kept) - kept + torch.arange(site.count, device=x.device)
        return gather_rows(x, rows, 1), rows, moved

    return body
