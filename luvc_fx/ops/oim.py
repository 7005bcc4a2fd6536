"""OIM: merge neighbouring tokens of a grid along one axis at a time, line by line.

The method is LUVC's Orthogonal Iterative Merger (arXiv 2512.09010), whose full text was not
available to us; the matching is ToMe's bipartite soft matching (arXiv 2210.09461) confined to
neighbours on a line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.ops.select import descending_rank

AXES = ("width", "height")
PAIRINGS = ("line", "shared")

_SMALLEST_NORM = 1e-12
# Below every cosine, above the -inf of a neighbour that is not there.
_COSINE_OF_NAN = -2.0


def orthogonal_merge(
    x: Tensor,
    sizes: Tensor,
    representatives: Tensor,
    axis: str,
    length: int,
    pairing: str = "line",
    feature: Tensor | None = None,
    runs: Tensor | None = None,
    shortest: int | None = None,
) -> tuple[Tensor, ...]:
    """Shorten one axis of a token grid to `length` by merging similar neighbours.

    Every line along the axis loses the same number of tokens, so the grid stays rectangular and in
    raster order. A token at an even place proposes to its more similar neighbour; the best proposals
    happen, and the neighbour becomes the mean weighted by size. At most half of the axis goes in one
    round; further rounds follow as needed. Gradients reach `x` through the means.

    Args:
        x: ``[B, H, W, C]``, any floating dtype; float64 is computed in float64, all else in
            float32.
        sizes: float32 ``[B, H, W]``, how many original tokens each token stands for.
        representatives: int64 ``[B, H, W]``, the original raster index of each token's representative.
        axis: ``"width"`` (each row is a line) or ``"height"`` (each column is).
        length: of the axis after the merge, at least 1 and at most what it is.
        pairing: ``"line"``: each line chooses for itself; ``"shared"``: all lines of a grid merge at
            the places that the mean of their cosines chooses.
        feature: ``[B, H, W, F]``, compared in place of `x` and merged as `x` is.
        runs: int64 ``[B, 2]``, first and last + 1 of the places on the axis that may merge: those that
            show the picture and not its padding. Tokens outside of a run stay as they are.
        shortest: length of the shortest of `runs` that is not the whole axis; at least
            1 + (what the axis loses).

    Returns:
        `x`, `sizes` and `representatives`, and `feature` where it was given, with the axis shortened:
        contiguous, or the arguments themselves when the axis has that length already.

    Raises:
        ValueError: for an axis, length or pairing that is not allowed, or a feature of another grid.
    """
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; allowed: {', '.join(map(repr, AXES))}")
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing is {pairing!r}; allowed: {', '.join(map(repr, PAIRINGS))}")
    before = x.shape[2 if axis == "width" else 1]
    if not 1 <= length <= before:
        raise ValueError(f"length is {length!r}; allowed: 1 to {before}, the {axis} of the grid")
    if feature is not None and (feature.dim() != 4 or feature.shape[:3] != x.shape[:3]):
        raise ValueError(
            f"feature has shape {list(feature.shape)}; allowed: {list(x.shape[:3])} and channels, as x has"
        )
    parts: tuple[Tensor, ...] = (
        (x, sizes, representatives) if feature is None else (x, sizes, representatives, feature)
    )
    if length == before:
        return parts
    if axis == "height":
        parts = tuple(t.transpose(1, 2) for t in parts)
    while parts[0].shape[2] > length:
        now = parts[0].shape[2]
        merges = min(now // 2, now - length)
        if shortest is not None:
            merges = min(merges, shortest // 2)
            shortest -= merges
        parts = _merge_round(parts, merges, pairing == "shared", runs)
        if runs is not None:
            # A run loses what every line loses.
            runs = torch.stack([runs.select(1, 0), runs.select(1, 1) - merges], dim=1)
    if axis == "height":
        parts = tuple(t.transpose(1, 2).clone(memory_format=torch.contiguous_format) for t in parts)
    return parts


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _neighbour_cosine(x: Tensor) -> Tensor:
    """``[B, L, n, C]`` -> ``[B, L, n - 1]``, the cosine of each token with the next on its line."""
    wide = _wide(x)
    norm = wide.square().sum(-1, keepdim=True).sqrt()
    unit = wide / norm.clamp(min=_SMALLEST_NORM)
    pairs = x.shape[2] - 1
    cosine = (unit.narrow(2, 0, pairs) * unit.narrow(2, 1, pairs)).sum(-1)
    return torch.where(torch.isnan(cosine), _COSINE_OF_NAN, cosine)


def _merge_round(
    parts: tuple[Tensor, ...], merges: int, shared: bool, runs: Tensor | None
) -> tuple[Tensor, ...]:
    """``[B, L, n, ...]`` -> ``[B, L, n - merges, ...]`` each; `merges` is at most n // 2."""
    x, sizes, representatives, *feature = parts
    length = x.shape[2]
    goes = _proposals(feature[0] if feature else x, merges, shared, runs)

    # Output place j holds the token that has j survivors before it.
    survivors = (goes == 0).cumsum(-1)
    place = torch.arange(length - merges, device=x.device).unsqueeze(-1)
    here = (survivors.unsqueeze(-2) <= place).sum(-1)
    # At an end of the line the clamp makes a survivor its own neighbour, and a survivor goes
    # nowhere.
    left, right = (here - 1).clamp(min=0), (here + 1).clamp(max=length - 1)
    # Bit 0: the left neighbour joins; bit 1: the right one does. As one tensor Inductor stores it, and does
    # not compute the proposals again for each use.
    joins = torch.where(goes.gather(2, left) > 0, 1, 0) + torch.where(goes.gather(2, right) < 0, 2, 0)
    from_left, from_right = joins % 2 == 1, joins > 1

    size = sizes.gather(2, here)
    size_left = torch.where(from_left, sizes.gather(2, left), 0.0)
    size_right = torch.where(from_right, sizes.gather(2, right), 0.0)
    total = size_left + size + size_right
    # A token that nobody joined stays as it is to the last bit.
    joined = (joins > 0).unsqueeze(-1)

    def merged(tokens: Tensor) -> Tensor:
        own = _tokens(tokens, here)
        weighted = _weighted(_tokens(tokens, left), size_left) + _wide(own) * size.unsqueeze(-1)
        weighted = weighted + _weighted(_tokens(tokens, right), size_right)
        return torch.where(joined, (weighted / total.unsqueeze(-1)).to(tokens.dtype), own)

    return merged(x), total, representatives.gather(2, here), *map(merged, feature)


def _proposals(compared: Tensor, merges: int, shared: bool, runs: Tensor | None) -> Tensor:
    """Where each token goes: int32 ``[B, L, n]``, -1 to its left neighbour, 1 to its right one, 0 stays."""
    lines = compared.shape[:3]
    cosine = _neighbour_cosine(compared)
    if shared:
        cosine = cosine.mean(1, keepdim=True)
    if runs is not None:
        pair = torch.arange(lines[2] - 1, device=compared.device).reshape(1, 1, -1)
        first, end = runs.select(1, 0).reshape(-1, 1, 1), runs.select(1, 1).reshape(-1, 1, 1)
        cosine = torch.where((pair >= first) & (pair + 1 < end), cosine, float("-inf"))
    # Not padded: Inductor makes a pad of one column a kernel of its own.
    place = torch.arange(lines[2], device=compared.device)
    first, last = place == 0, place == lines[2] - 1
    left = torch.where(first, float("-inf"), cosine.index_select(2, torch.where(first, 0, place - 1)))
    right = torch.where(last, float("-inf"), cosine.index_select(2, torch.where(last, 0, place)))
    even = place % 2 == 0
    # Odd places never propose: their -inf ranks behind all n // 2 or more even ones.
    score = torch.where(even, torch.maximum(left, right), float("-inf"))
    aside = torch.where(right < left, -1, 1).to(torch.int32)
    return torch.where(descending_rank(score) < merges, aside, 0).expand(lines)


def _tokens(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def _weighted(tokens: Tensor, size: Tensor) -> Tensor:
    """`tokens` times `size`, and 0 at size 0 even where the token that stays away is not finite."""
    size = size.unsqueeze(-1)
    return torch.where(size > 0, _wide(tokens) * size, 0.0)
