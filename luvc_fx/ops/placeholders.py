"""Shortening a prompt to the placeholders whose tokens survived a merge."""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.ops.compact import mask_to_index


def surviving_rows(visual: Tensor, representatives: Tensor, placeholders: int) -> tuple[Tensor, Tensor]:
    """Which rows of a prompt stay when its images were merged.

    Of the placeholders those of the representatives stay. The j-th merged token of a row sits at the
    j-th place that the row has left and takes the position of its own representative; those need not
    ascend, as columns that merged in height may each have kept another row.

    Args:
        visual: bool ``[B, S]``, True on placeholders; each row has ``placeholders / B`` of them.
        representatives: int64, of any shape with B N' entries: the representative of each merged token, in
            order, among the placeholders of all rows.
        placeholders: of all rows, before merging.

    Returns:
        ``(places, ascending)``, both int64 ``[B, S']``: the row whose position each new row takes,
        and the same rows in sequence order.
    """
    batch, length = visual.shape
    merged, each = representatives.numel() // batch, placeholders // batch
    before = torch.arange(batch, device=representatives.device).unsqueeze(1) * each
    chosen = mask_to_index(visual, each).gather(1, representatives.reshape(batch, merged) - before)
    stays = visual.logical_not().scatter(1, chosen, True)
    ascending = mask_to_index(stays, length - each + merged)
    short = visual.gather(1, ascending)
    return ascending.scatter(1, mask_to_index(short, merged), chosen), ascending
