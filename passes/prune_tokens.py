"""Insert a selector and a compaction before decoder layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, fx

from luvc_fx.anatomy.axes.lengths import TOKENS
from luvc_fx.graph.emit import emit
from luvc_fx.graph.nodes import value
from luvc_fx.graph.notes import SHRUNK, Pruned
from luvc_fx.ops import absorb, drop_tokens, gather_rows, mask_to_index
from luvc_fx.passes.support.compact_rows import compact_followers
from luvc_fx.passes.support.context import Context
from luvc_fx.passes.support.last_query import last_query
from luvc_fx.passes.support.site_keys import site_keys
from luvc_fx.plan import PruneSite
from luvc_fx.report import Insertion
from luvc_fx.selectors import Site, choose_mask


def prune_tokens(context: Context) -> None:
    """Prune at every planned site, from the first layer to the last.

    With 8 visual tokens in rows of 13, of which 3 are kept before layer 1::

        %layer_0 : [2, 13, 8] = add(%x, %mlp)
        %norm : [2, 13, 8] = layer_norm(%layer_0, ...)

    becomes, where `%places` says which rows are visual, and the scores are the selector's::

        %layer_0 : [2, 13, 8] = add(%x, %mlp)
        %visual : [2, 8, 8] = gather(%layer_0, 1, expand(%places, ...))
        %scores : [2, 8] = sum(pow(%visual, 2), [-1])
        %keep : [2, 8] = ...
        %rows : [2, 8] = scatter(...)
        %short : [2, 8, 8] = gather(%layer_0, 1, expand(%rows, ...))
        %norm : [2, 8, 8] = layer_norm(%short, ...)

    Values that go with the rows (rotary tables, masks) are gathered by `%rows`, too.
    """
    decoder = context.anatomy.decoder
    if decoder is None or not context.plan.prunes:
        return
    if context.places is None:
        context.places = _visual_rows(context)
    for site in context.plan.prunes:
        context.retarget.advance(site.node)
        insertion = Insertion(
            "prune", site.layer, site.prune.selector.name, site.left, site.count, absorbs=_absorbs(site)
        )
        name = insertion.name
        nodes, make_site = _what_it_reads(context, site)
        body = _prune_body(site, make_site)
        before = context.places
        short, rows, context.places = emit(context.graph, name, body, site.node, before, *nodes)
        short.meta[SHRUNK] = Pruned(site.layer, site.node.name, before.name, rows.name)
        context.retarget.replace(site.node, short, {TOKENS: value(short).shape[1]})
        compact_followers(context, name, site.node, rows, rows)
        context.report.inserted.append(insertion)


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
    """What a selector is told about `site` that is known before the graph runs."""
    decoder = context.anatomy.decoder
    assert decoder is not None
    images = 1 if site.grid is None else site.left // (site.grid[0] * site.grid[1])
    if site.prune.selector.per_image and site.grid is None and site.left == context.plan.fused:
        context.report.notes.append(
            f"before decoder layer {site.layer} the images of a row cannot be told apart, as the token grid "
            "is not known: per_image filters over the whole row"
        )
    return Site(site.layer, len(decoder.entering), site.grid, images)


def _what_it_reads(context: Context, site: PruneSite) -> tuple[list[fx.Node], Callable[..., Site]]:
    """What the selector reads of attention, where it needs that.

    Returns:
        Nodes, and a function of the residual value ``[B, S, D]``, the rows of the visual tokens in it, int64
        ``[B, N]``, and the values of the nodes: the `Site` that the selector is given.
    """
    decoder, place, selector = context.anatomy.decoder, _place(context, site), site.prune.selector
    assert decoder is not None
    asked = 0 < site.count < site.left and site.layer > 0
    queried: list[fx.Node] = []
    projected: list[fx.Node] = []
    last_query_attention = score_keys = None
    if asked and selector.needs_last_query_attention:
        queried, last_query_attention = last_query(decoder.calls[site.layer - 1])
    if asked and selector.needs_keys:
        projected, score_keys = site_keys(context.graph, decoder, site)

    def make_site(x: Tensor, places: Tensor, *values: Tensor) -> Site:
        made = place
        if last_query_attention is not None:
            attention = last_query_attention(places, *values[: len(queried)])
            made = dataclasses.replace(made, last_query_attention=attention)
        if score_keys is not None:
            attention, keys = score_keys(x, places, *values[len(queried) :])
            made = dataclasses.replace(made, mean_query_attention=attention, keys=keys)
        return made

    return [*queried, *projected], make_site


def _absorbs(site: PruneSite) -> bool:
    return site.prune.absorb and 0 < site.count < site.left


def _prune_body(site: PruneSite, make_site: Callable[..., Site]) -> Callable[..., tuple[Tensor, ...]]:
    """What is inserted at `site`, as a function of the residual value, the visual rows and what is read.

    It returns the shortened residual value, the rows of the old one that are left, int64 ``[B, S']``, and the
    rows of the visual tokens in the new one, int64 ``[B, count]``.
    """

    def body(x: Tensor, places: Tensor, *read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = x.shape[1]
        visual = gather_rows(x, places, 1)
        keep, ahead = choose_mask(visual, site.prune, site.count, make_site(x, places, *read))
        rows = drop_tokens(places, keep, ahead, length, length - site.left + site.count)
        kept = mask_to_index(keep, site.count)
        # A token moves up by those before it that went.
        moved = places.gather(1, kept) - kept + torch.arange(site.count, device=x.device)
        short = gather_rows(x, rows, 1)
        if _absorbs(site):
            mean = absorb(visual, keep, ahead, kept)
            short = short.scatter(1, moved.unsqueeze(-1).expand_as(mean), mean)
        return short, rows, moved

    return body
