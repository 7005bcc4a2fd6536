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


def keep_global(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `select_global` keeps, as the pair that `counted` returns."""
    if all_or_none(scores, k) is not None:
        return keep_alike(scores, k)
    if scores.device.type == "cpu":
        return counted(marked(top_by_sorting(scores, k), scores.shape[1]))
    return counted(descending_rank(_without_nan(scores)) < k)


def top_by_sorting(scores: Tensor, k: int) -> Tensor:
    """`select_global` for the CPU, where two sorts are far faster than comparing all pairs."""
    order = torch.sort(_without_nan(scores), dim=1, descending=True, stable=True).indices
    return torch.sort(order[:, :k], dim=1).values


def top_by_counting(scores: Tensor, k: int) -> Tensor:
    """`select_global` for accelerators: each score is compared with all others, and no library sorts."""
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
    tokens = _checked_tokens(scores, grid)
    whole = all_or_none(scores, k)
    if whole is not None:
        return whole
    if grid is not None and in_squares(tokens, k, grid):
        return mask_to_index(_keep_squares(scores, grid[1]), k)
    return _select_runs(scores, k)


def keep_blocks(
    scores: Tensor, k: int, grid: tuple[int, int] | None, longest: int | None = None
) -> tuple[Tensor, Tensor]:
    """What `select_blocks` keeps, as the pair that `counted` returns; for runs, without a sum.

    Args:
        longest: `longest_run` of N and k, in a graph in which all three are symbols.
    """
    tokens = _checked_tokens(scores, grid)
    if all_or_none(scores, k) is not None:
        return keep_alike(scores, k)
    if grid is not None and in_squares(tokens, k, grid):
        return counted(_keep_squares(scores, grid[1]))
    place = torch.arange(tokens, device=scores.device)
    block = place * k // tokens
    winner = _select_runs(scores, k, longest).index_select(1, block)
    return winner == place, block + (winner < place)


def _checked_tokens(scores: Tensor, grid: tuple[int, int] | None) -> int:
    tokens = scores.shape[1]
    if grid is not None and (min(grid) < 1 or tokens % (grid[0] * grid[1])):
        raise ValueError(
            f"grid is {grid!r}; allowed: sides of at least 1 whose product divides {tokens} tokens"
        )
    return tokens


def longest_run(tokens: int, k: int) -> int:
    """Tokens in the longest of `k` blocks that are runs."""
    return -(-tokens // k)


def in_squares(tokens: int, k: int, grid: tuple[int, int]) -> bool:
    """Whether the blocks are 2 x 2 squares of a grid ``(H, W)``, and no runs."""
    return tokens == 4 * k and grid[0] % 2 == 0 and grid[1] % 2 == 0


def marked(positions: Tensor, tokens: int) -> Tensor:
    """Distinct positions, int64 ``[B, k]`` in any order, as a mask: bool ``[B, tokens]``."""
    none = torch.zeros((positions.shape[0], tokens), dtype=torch.bool, device=positions.device)
    return none.scatter(1, positions, True)


def counted(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask, bool ``[B, N]``, and how many of its True entries come before each place, int64 ``[B, N]``."""
    return mask, mask.cumsum(1) - mask.to(torch.int64)


def keep_alike(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All of `rows` ``[B, N, ...]`` stay (k = N) or none (k = 0), as the pair that `counted` returns."""
    mask = torch.full(rows.shape[:2], k > 0, dtype=torch.bool, device=rows.device)
    place = torch.arange(rows.shape[1] if k else 1, device=rows.device)
    return mask, place.expand(rows.shape[:2])


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


def _keys(scores: Tensor) -> Tensor:
    """Distinct numbers that compare as the scores do, and of equal scores by the lower index.

    Score and index share one 64-bit word, so that a maximum of words finds both at once: one kernel on an
    accelerator, where a maximum and its index are two.

    Returns:
        int64 ``[B, N]``.
    """
    tokens = scores.shape[1]
    scores = _without_nan(scores.detach())
    if scores.dtype == torch.float64:
        scores = -descending_rank(scores)
    bits = (scores.to(torch.float32) + 0.0).view(torch.int32).to(torch.int64)  # + 0: of -0 it makes 0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ascending << 32) + (tokens - 1 - torch.arange(tokens, device=scores.device))


def _index_of(keys: Tensor, tokens: int) -> Tensor:
    """The index within the words that `_keys` makes."""
    return tokens - 1 - keys.remainder(1 << 32)


def _keep_squares(scores: Tensor, width: int) -> Tensor:
    """One winner of each 2 x 2 square of a grid `width` wide, as a mask in raster order."""
    tokens = scores.shape[1]
    keys, place = _keys(scores), torch.arange(tokens, device=scores.device)
    beside = place + 1 - 2 * (place % 2)
    down = width * (1 - 2 * (place // width % 2))
    wins = torch.ones_like(keys, dtype=torch.bool)
    for other in (beside, place + down, beside + down):
        wins = wins & (keys > keys.index_select(1, other))
    return wins


def _select_runs(scores: Tensor, k: int, longest: int | None = None) -> Tensor:
    """One winner of each of k runs, which differ by one token at most: padded to the longest."""
    batch, tokens = scores.shape
    longest = longest_run(tokens, k) if longest is None else longest
    block = torch.arange(k, device=scores.device)
    start, end = ((b * tokens + k - 1) // k for b in (block, block + 1))
    place = start.unsqueeze(1) + torch.arange(longest, device=scores.device)
    # Padding repeats the last token of a run, which changes no maximum.
    place = torch.minimum(place, end.unsqueeze(1) - 1)
    cells = _keys(scores).index_select(1, place.flatten()).reshape(batch, k, longest)
    return _index_of(cells.amax(-1), tokens)
