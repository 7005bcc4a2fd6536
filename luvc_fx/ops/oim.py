"""OIM: merge neighbouring tokens of a grid along one axis at a time, line by line.

The method is LUVC's Orthogonal Iterative Merger (arXiv 2512.09010), whose full text was not
available to us; the matching is ToMe's bipartite soft matching (arXiv 2210.09461) confined to
neighbours on a line.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luvc_fx.ops.select import descending_rank
from luvc_fx.schedule import AXES

_SMALLEST_NORM = 1e-12
# Below every cosine, above the -inf of a neighbour that is not there.
_COSINE_OF_NAN = -2.0


def orthogonal_merge(
    x: Tensor, sizes: Tensor, slots: Tensor, axis: str, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shorten one axis of a token grid to `length` by merging similar neighbours.

    Each line along the axis chooses for itself and loses the same number of tokens, so the grid
    stays rectangular and in raster order. A token at an even place proposes to its more similar
    neighbour; the best proposals happen, and the neighbour becomes the mean weighted by size. At
    most half of the axis goes in one round; further rounds follow as needed. Gradients reach `x`
    through the means.

    Args:
        x: ``[B, H, W, C]``, any floating dtype; float64 is computed in float64, all else in
            float32.
        sizes: float32 ``[B, H, W]``, how many original tokens each token stands for.
        slots: int64 ``[B, H, W]``, the original raster index of each token's representative.
        axis: ``"width"`` (each row is a line) or ``"height"`` (each column is).
        length: of the axis after the merge, at least 1 and at most what it is.

    Returns:
        `x`, `sizes` and `slots` with the axis shortened: contiguous, or the arguments themselves
        when the axis has that length already.

    Raises:
        ValueError: for an axis or length that is not allowed.
    """
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; allowed: {', '.join(map(repr, AXES))}")
    before = x.shape[2 if axis == "width" else 1]
    if not 1 <= length <= before:
        raise ValueError(f"length is {length!r}; allowed: 1 to {before}, the {axis} of the grid")
    if length == before:
        return x, sizes, slots
    if axis == "height":
        x, sizes, slots = (t.transpose(1, 2) for t in (x, sizes, slots))
    while x.shape[2] > length:
        x, sizes, slots = _merge_round(x, sizes, slots, min(x.shape[2] // 2, x.shape[2] - length))
    if axis == "height":
        x, sizes, slots = (
            t.transpose(1, 2).clone(memory_format=torch.contiguous_format) for t in (x, sizes, slots)
        )
    return x, sizes, slots


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _neighbour_cosine(x: Tensor) -> Tensor:
    """``[B, L, n, C]`` -> ``[B, L, n - 1]``, the cosine of each token with the next on its line."""
    wide = _wide(x)
    norm = wide.square().sum(-1, keepdim=True).sqrt()
    unit = wide / norm.clamp(min=_SMALLEST_NORM)
    pairs = x.shape[2] - 1
    cosine = (unit.narrow(2, 0, pairs) * unit.narrow(2, 1, pairs)).sum(-1)
    return torch.nan_to_num(cosine, nan=_COSINE_OF_NAN)


def _merge_round(x: Tensor, sizes: Tensor, slots: Tensor, merges: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, L, n, ...]`` -> ``[B, L, n - merges, ...]``; `merges` is at most n // 2."""
    length = x.shape[2]
    goes_left, goes_right = _proposals(x, merges)

    # Output place j holds the token that has j survivors before it.
    survivors = torch.logical_not(goes_left | goes_right).cumsum(-1)
    place = torch.arange(length - merges, device=x.device).unsqueeze(-1)
    here = (survivors.unsqueeze(-2) <= place).sum(-1)
    # At an end of the line the clamp makes a survivor its own neighbour, and a survivor goes
    # nowhere.
    left, right = (here - 1).clamp(min=0), (here + 1).clamp(max=length - 1)
    from_left, from_right = goes_right.gather(2, left), goes_left.gather(2, right)

    size = sizes.gather(2, here)
    size_left = torch.where(from_left, sizes.gather(2, left), 0.0)
    size_right = torch.where(from_right, sizes.gather(2, right), 0.0)
    total = size_left + size + size_right

    own = _tokens(x, here)
    weighted = _weighted(_tokens(x, left), size_left) + _wide(own) * size.unsqueeze(-1)
    weighted = weighted + _weighted(_tokens(x, right), size_right)
    mean = (weighted / total.unsqueeze(-1)).to(x.dtype)
    # A token that nobody joined stays as it is to the last bit.
    joined = (from_left | from_right).unsqueeze(-1)
    return torch.where(joined, mean, own), total, slots.gather(2, here)


def _proposals(x: Tensor, merges: int) -> tuple[Tensor, Tensor]:
    """Which tokens merge into their left, which into their right neighbour: bool ``[B, L, n]``."""
    cosine = _neighbour_cosine(x)
    left = F.pad(cosine, (1, 0), value=float("-inf"))
    right = F.pad(cosine, (0, 1), value=float("-inf"))
    even = torch.arange(x.shape[2], device=x.device) % 2 == 0
    # Odd places never propose: their -inf ranks behind all n // 2 or more even ones.
    score = torch.where(even, torch.maximum(left, right), float("-inf"))
    goes = descending_rank(score) < merges
    return goes & (right < left), goes & (right >= left)


def _tokens(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def _weighted(tokens: Tensor, size: Tensor) -> Tensor:
    """`tokens` times `size`, and 0 at size 0 even where the token that stays away is not finite."""
    size = size.unsqueeze(-1)
    return torch.where(size > 0, _wide(tokens) * size, 0.0)
