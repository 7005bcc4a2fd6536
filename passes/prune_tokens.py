"""Insert a selector and a compaction before decoder layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from luvc_fx.anatomy.axes.lengths import TOKENS
from luvc_fx.graph.emit import emit
from luvc_fx.graph.nodes import value
from luvc_fx.graph.notes import SHRUNK, Pruned
from luvc_fx.graph.site_operator import PRUNE, as_text
from luvc_fx.ops import mask_to_index
from luvc_fx.passes.support.compact_rows import compact_followers
from luvc_fx.passes.support.context import Context
from luvc_fx.passes.support.last_query import last_query
from luvc_fx.passes.support.site_keys import site_keys
from luvc_fx.plan import PruneSite, SiteSizes
from luvc_fx.report import Insertion
from luvc_fx.selectors import Site
from luvc_fx.selectors.cut import cut


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

    Values that go with the rows (rotary tables, masks) are gathered by `%rows`, too. In a graph for all
    numbers of tokens `%visual` to `%short` are one operator, whose body is compiled by itself::

        %cut = luvc_fx.prune(%layer_0, %places, %count, %rows_left, ...)
        %short : [2, rows_left, 8] = getitem(%cut, 0)
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
        before = context.places
        if site.sizes is None:
            body = _prune_body(site, make_site)
        else:
            body = _operator_body(site, site.sizes, make_site, context.site_compiler)
            nodes = [*nodes, *_nodes_of(site.sizes)]
        short, rows, context.places = emit(context.graph, name, body, site.node, before, *nodes)
        short.meta[SHRUNK] = Pruned(site.layer, site.node.name, before.name, rows.name)
        context.retarget.replace(site.node, short, {TOKENS: value(short).shape[1]})
        compact_followers(context, name, site.node, rows, rows)
        context.report.inserted.append(insertion)


def _visual_rows(context: Context) -> fx.Node:
    """Int64 ``[batch, tokens]``, with a check that each row has as many visual tokens as planned."""
    decoder = context.anatomy.decoder
    assert decoder is not None
    counts = decoder.row_counts
    given = [counts.visual] if counts is not None and isinstance(counts.visual, fx.Node) else []

    def body(*masks: Tensor) -> Tensor:
        tokens: Any = masks[-1] if given else decoder.visual
        masks = masks[: len(decoder.masks)]
        visual = masks[0].select(-1, 0)
        for mask in masks[1:]:
            visual = visual.logical_or(mask.select(-1, 0))
        if visual.shape[0] != 1:
            right = (visual.sum(1) == tokens).all()
            number = "as many" if given else decoder.visual
            torch.ops.aten._assert_async.msg(
                right, f"luvc_fx was compiled for {number} visual tokens in each row of the batch"
            )
        return mask_to_index(visual, tokens)

    (places,) = emit(context.graph, "visual rows", body, *decoder.masks, *given)
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
        rows = x.shape[1] - site.left + site.count
        return cut(x, places, site.prune, site.count, rows, make_site(x, places, *read))

    return body


def _nodes_of(sizes: SiteSizes) -> list[fx.Node]:
    given = (sizes.count, sizes.rows, sizes.height, sizes.width)
    return [size for size in given if isinstance(size, fx.Node)]


def _operator_body(
    site: PruneSite, sizes: SiteSizes, make_site: Callable[..., Site], compiler: str
) -> Callable[..., tuple[Tensor, ...]]:
    """The same as a call of an operator; the values of the nodes of `sizes` come last."""
    symbols = len(_nodes_of(sizes))

    def body(x: Tensor, places: Tensor, *read: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = iter(read[len(read) - symbols :])
        numbers = [
            next(given) if isinstance(size, fx.Node) else size
            for size in (sizes.count, sizes.rows, sizes.height, sizes.width)
        ]
        told = make_site(x, places, *read[: len(read) - symbols])
        attention = (told.last_query_attention, told.mean_query_attention, told.keys)
        cut_off: tuple[Tensor, Tensor, Tensor] = PRUNE(
            x, places, *numbers, as_text(site.prune), site.layer, told.layers, compiler, *attention
        )
        return cut_off

    return body
