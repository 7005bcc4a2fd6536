"""What happens at a prune: choose the tokens that stay, and shorten the sequence by the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luvc_fx.ops import absorb, drop_tokens, gather_rows, mask_to_index
from luvc_fx.selectors.base import Site
from luvc_fx.selectors.choose import choose_mask

if TYPE_CHECKING:
    from luvc_fx.schedule import Prune


def cut(
    x: Tensor, places: Tensor, prune: Prune, count: int, rows: int, site: Site
) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence with `count` of its visual tokens.

    Args:
        x: ``[B, S, D]``.
        places: int64 ``[B, N]``, ascending: the rows that are visual tokens.
        prune: which stay, and whether the others are averaged into them.
        count: how many stay in each row of the batch, in 0 .. N.
        rows: S - N + `count`, of the shorter sequence; a symbol of its own where all of these are symbols.
        site: where it happens.

    Returns:
        The shorter sequence ``[B, rows, D]``; its rows' old numbers, int64 ``[B, rows]``, ascending; and the
        rows of it that are visual tokens, int64 ``[B, count]``.
    """
    visual = gather_rows(x, places, 1)
    keep, ahead = choose_mask(visual, prune, count, site)
    old_rows = drop_tokens(places, keep, ahead, x.shape[1], rows)
    kept = mask_to_index(keep, count)
    # A token moves up by those before it that went.
    moved = places.gather(1, kept) - kept + torch.arange(count, device=x.device)
    short = gather_rows(x, old_rows, 1)
    if prune.absorb and 0 < count < places.shape[1]:
        mean = absorb(visual, keep, ahead, kept)
        short = short.scatter(1, moved.unsqueeze(-1).expand_as(mean), mean)
    return short, old_rows, moved
