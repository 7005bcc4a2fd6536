"""In a graph that holds encoder and decoder: fewer features than placeholders, so rows follow."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from luvc_fx.anatomy.axes.lengths import TOKENS
from luvc_fx.graph.emit import emit
from luvc_fx.graph.nodes import is_tensor, value
from luvc_fx.ops import gather_rows, mask_to_index, surviving_rows
from luvc_fx.passes.support.compact_rows import compact_followers
from luvc_fx.passes.support.context import Context


def shrink_fusion(context: Context) -> None:
    """Keep, of every row's placeholders, those of the representatives, and cut what goes with them.

    The model's own check of the count stays as it is: it compares the whole prompt with the number of
    features before merging, and both are still what it says. Beside it each row is checked.

    With 16 visual tokens in each of two rows of 21, of which merging left 8::

        %hidden : [2, 21, 8] = embedding(%ids, %weight)
        %where : [2, 21, 8] = expand_as(%is_image, %hidden)
        %fused : [2, 21, 8] = masked_scatter(%hidden, %where, %features)

    becomes, where the places come from the representatives of `merge_tokens`::

        %hidden : [2, 21, 8] = embedding(%ids, %weight)
        %where : [2, 21, 8] = expand_as(%is_image, %hidden)
        _assert_async(all(eq(sum(select(%where, -1, 0), [1]), 16)), "luvc_fx was compiled for 16 ...")
        %places : [2, 13] = scatter(...)
        %embeds : [2, 13, 8] = gather(%hidden, 1, expand(%places, ...))
        %mask : [2, 13, 8] = gather(%where, 1, expand(%ascending, ...))
        %fused : [2, 13, 8] = masked_scatter(%embeds, %mask, %features)
    """
    decoder, encoder = context.anatomy.decoder, context.anatomy.encoder
    if decoder is None or encoder is None or context.representatives is None:
        return
    (mask,) = decoder.masks
    total = encoder.placeholders
    each = total // decoder.batch
    name = "shrink fusion"

    def body(embeds: Tensor, mask: Tensor, representatives: Tensor) -> tuple[Tensor, ...]:
        visual = mask.select(-1, 0)
        torch.ops.aten._assert_async.msg(
            (visual.sum(1) == each).all(),
            f"luvc_fx was compiled for {each} visual tokens in each row of the batch",
        )
        places, ascending = surviving_rows(visual, representatives, total)
        left = mask_to_index(visual.gather(1, ascending), representatives.numel() // visual.shape[0])
        return gather_rows(embeds, places, 1), gather_rows(mask, ascending, 1), places, ascending, left

    context.retarget.advance(decoder.fusion.prev)
    for node in (decoder.embeds, mask, context.representatives):
        assert is_tensor(node)
    before = decoder.fusion.prev
    embeds, short_mask, places, ascending, context.places = emit(
        context.graph, name, body, decoder.embeds, mask, context.representatives, after=before
    )
    fusion: fx.Node = decoder.fusion
    context.retarget.place(embeds, fusion, {TOKENS: value(embeds).shape[1]})
    context.retarget.rewire(fusion, decoder.embeds, embeds)
    context.retarget.rewire(fusion, mask, short_mask)
    compact_followers(context, name, fusion, places, ascending)
