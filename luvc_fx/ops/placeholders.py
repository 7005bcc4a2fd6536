"""Shortening a prompt to the placeholders whose tokens survived a merge."""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.ops.compact import mask_to_index


def surviving_rows(visual: Tensor, slots: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """Which rows of a prompt stay when its images were merged.

    Of an image's placeholders those of the representatives stay. The j-th merged token, in raster
    order, sits at the j-th place that its image has left and takes the position of its own
    representative; those need not ascend, as columns that merged in height may each have kept
    another row.

    Args:
        visual: bool ``[B, S]``, True on placeholders; each row has ``images * patches`` of them.
        slots: int64 ``[B * images, H', W']``, the representative of each merged token.
        patches: placeholders of one image before merging.

    Returns:
        ``(places, ascending)``, both int64 ``[B, S']``: the row whose position each new row takes,
        and the same rows in sequence order.
    """
    batch, length = visual.shape
    images = slots.shape[0] // batch
    merged = slots.shape[1] * slots.shape[2]
    first = torch.arange(images, device=slots.device).reshape(1, images, 1) * patches
    chosen = (slots.reshape(batch, images, merged) + first).reshape(batch, images * merged)
    chosen = mask_to_index(visual, images * patches).gather(1, chosen)
    stays = visual.logical_not().scatter(1, chosen, True)
    ascending = mask_to_index(stays, length - images * (patches - merged))
    short = visual.gather(1, ascending)
    return ascending.scatter(1, mask_to_index(short, images * merged), chosen), ascending
