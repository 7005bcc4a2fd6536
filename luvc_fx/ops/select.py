"""Choosing positions from scores: always exactly k, distinct, ascending and in range.

Every function here is static in shape, so it traces to a fixed graph: no sort on an accelerator, no
nonzero, no host sync. NaN scores count as minus infinity, so that no input can break the count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.ops.compact import mask_to_index


def descending_rank(scores: Tensor) -> Tensor:
    """How many entries of the last axis beat each entry; equal entries go by the lower index.

    Counting comparisons replaces a sort: it is one fused reduction, where a sort is a library call.
    The cost is quadratic in the axis, and an eager call holds the comparisons in memory.

    Args:
        scores: ``[..., n]``, without NaN (NaN beats nothing and is beaten by nothing).

    Returns:
        int32 ``[..., n]``, a permutation of 0 .. n - 1 along the last axis.
    """
    mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)
    place = torch.arange(scores.shape[-1], device=scores.device)
    earlier = place.unsqueeze(0) < place.unsqueeze(1)
    return ((other > mine) | ((other == mine) & earlier)).sum(-1, dtype=torch.int32)


def select_global(scores: Tensor, k: int) -> Tensor:
    """The positions of the k largest scores of each row, ties to the lower index.

    Args:
        scores: ``[B, N]``, any real dtype; NaN counts as minus infinity.
        k: how many to keep, in 0 .. N.

    Returns:
        int64 ``[B, k]``, ascending.

    Raises:
        ValueError: k is not in 0 .. N.
    """
    whole = all_or_none(scores, k)
    if whole is not None:
        return whole
    if scores.device.type == "cpu":
        return top_by_sorting(scores, k)
    return top_by_counting(scores, k)


def top_by_sorting(scores: Tensor, k: int) -> Tensor:
    """`select_global` for the CPU, where two sorts beat the quadratic count by far."""
    order = torch.sort(_without_nan(scores), dim=1, descending=True, stable=True).indices
    return torch.sort(order[:, :k], dim=1).values


def top_by_counting(scores: Tensor, k: int) -> Tensor:
    """`select_global` for accelerators: ranks by comparison, compaction by cumsum."""
    return mask_to_index(descending_rank(_without_nan(scores)) < k, k)


def select_blocks(scores: Tensor, k: int, grid: tuple[int, int] | None) -> Tensor:
    """The position of the largest score of each of k blocks of neighbours, ties to the lower index.

    With a `grid` of even sides and N = 4 k the blocks are its 2 x 2 squares. Else they are k runs:
    token i belongs to block floor(i k / N).

    Args:
        scores: floating ``[B, N]``; NaN counts as minus infinity.
        k: how many to keep, in 0 .. N.
        grid: ``(H, W)`` when the N tokens are one whole row-major grid or several stacked; else
            None.

    Returns:
        int64 ``[B, k]``, ascending.

    Raises:
        ValueError: k is not in 0 .. N, or N is no multiple of H W.
    """
    tokens = scores.shape[1]
    if grid is not None and (min(grid) < 1 or tokens % (grid[0] * grid[1])):
        raise ValueError(
            f"grid is {grid!r}; allowed: sides of at least 1 whose product divides {tokens} tokens"
        )
    whole = all_or_none(scores, k)
    if whole is not None:
        return whole
    scores = _without_nan(scores)
    if grid is not None and tokens == 4 * k and grid[0] % 2 == 0 and grid[1] % 2 == 0:
        return _select_squares(scores, k, grid[1])
    return _select_runs(scores, k)


def all_or_none(rows: Tensor, k: int) -> Tensor | None:
    """The positions when there is nothing to choose (k = 0 or k = N), else None.

    Args:
        rows: ``[B, N, ...]``; only its shape and device count.

    Returns:
        int64 ``[B, k]`` or None.

    Raises:
        ValueError: k is not in 0 .. N.
    """
    batch, tokens = rows.shape[:2]
    if not 0 <= k <= tokens:
        raise ValueError(f"k is {k!r}; allowed: 0 to {tokens}, the tokens there are")
    if 0 < k < tokens:
        return None
    return torch.arange(k, device=rows.device).expand(batch, k)


def _without_nan(scores: Tensor) -> Tensor:
    if not scores.is_floating_point():
        return scores
    return torch.where(torch.isnan(scores), float("-inf"), scores)


def _select_squares(scores: Tensor, k: int, width: int) -> Tensor:
    """One winner of each 2 x 2 square of a grid `width` wide."""
    batch, tokens = scores.shape
    square = (batch, tokens // width // 2, width // 2, 2, 2)
    cells = scores.reshape(batch, square[1], 2, square[2], 2).permute(0, 1, 3, 2, 4).reshape(batch, k, 4)
    winner = _first_largest(cells)
    won = winner.unsqueeze(-1) == torch.arange(4, device=scores.device)
    # Square by square the winners are not ascending (two rows interleave), so back to the raster.
    mask = won.reshape(square).permute(0, 1, 3, 2, 4).reshape(batch, tokens)
    return mask_to_index(mask, k)


def _select_runs(scores: Tensor, k: int) -> Tensor:
    """One winner of each of k runs, which differ by one token at most: padded to the longest."""
    batch, tokens = scores.shape
    longest = -(-tokens // k)
    block = torch.arange(k, device=scores.device)
    start, end = ((b * tokens + k - 1) // k for b in (block, block + 1))
    place = start.unsqueeze(1) + torch.arange(longest, device=scores.device)
    cells = scores.index_select(1, place.clamp(max=tokens - 1).flatten()).reshape(batch, k, longest)
    # Padding comes last, so at equal (-inf) scores a real token still wins.
    cells = torch.where(place < end.unsqueeze(1), cells, float("-inf"))
    return start + _first_largest(cells)


def _first_largest(cells: Tensor) -> Tensor:
    """Index of the first maximum of the last axis; argmax promises no order among equals."""
    width = cells.shape[-1]
    largest = cells == cells.amax(-1, keepdim=True)
    return torch.where(largest, torch.arange(width, device=cells.device), width - 1).amin(-1)
