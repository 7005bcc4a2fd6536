"""ToMe: merge similar tokens wherever they stand in a row, the baseline beside OIM.

Bipartite soft matching (Bolya et al., arXiv 2210.09461), written from its description: tokens at even
places propose to the most similar token at an odd place, and the most similar pairs merge. The result is
not in the order of the picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.ops.compact import gather_rows, mask_to_index
from luvc_fx.ops.select import descending_rank

_SMALLEST_NORM = 1e-12
_COSINE_OF_NAN = -2.0


def sequence_merge(
    x: Tensor, sizes: Tensor, representatives: Tensor, length: int, feature: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Shorten rows of tokens to `length` by merging similar pairs over the whole row.

    Each token at an even place proposes to the odd one with the largest cosine (the first of equals); the
    best proposals happen, ties to the lower place, and the odd one becomes the mean weighted by size of
    itself and all that joined it. What is left stands in ToMe's order: first the even ones that merged
    with nobody, then all odd ones. At most half of the row goes in one round; further rounds follow.

    Args:
        x: ``[B, n, C]``, any floating dtype; float64 is computed in float64, all else in float32.
        sizes: float32 ``[B, n]``, how many original tokens each token stands for.
        representatives: int64 ``[B, n]``, the original index of each token; a merged one has the odd one's.
        length: of the rows after the merge, at least 1 and at most n.
        feature: ``[B, n, F]``, compared in place of `x` and merged as `x` is.

    Returns:
        `x`, `sizes` and `representatives`, and `feature` where it was given, with `length` tokens each; the
        arguments themselves where the rows have that length already.

    Raises:
        ValueError: for a length that is not allowed, or a feature of other rows.
    """
    if not 1 <= length <= x.shape[1]:
        raise ValueError(f"length is {length!r}; allowed: 1 to {x.shape[1]}, the tokens there are")
    if feature is not None and (feature.dim() != 3 or feature.shape[:2] != x.shape[:2]):
        raise ValueError(
            f"feature has shape {list(feature.shape)}; allowed: {list(x.shape[:2])} and channels, as x has"
        )
    parts: tuple[Tensor, ...] = (
        (x, sizes, representatives) if feature is None else (x, sizes, representatives, feature)
    )
    while parts[0].shape[1] > length:
        now = parts[0].shape[1]
        parts = _merge_round(parts, min(now // 2, now - length))
    return parts


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _merge_round(parts: tuple[Tensor, ...], merges: int) -> tuple[Tensor, ...]:
    """``[B, n, ...]`` -> ``[B, n - merges, ...]`` each; `merges` is at most n // 2."""
    x, sizes, representatives, *feature = parts
    tokens = x.shape[1]
    places = torch.arange(tokens, device=x.device)
    even = places.narrow(0, 0, (tokens + 1) // 2) * 2
    odd = places.narrow(0, 0, tokens // 2) * 2 + 1
    wide = _wide(feature[0] if feature else x)
    unit = wide / wide.square().sum(-1, keepdim=True).sqrt().clamp(min=_SMALLEST_NORM)
    cosine = torch.matmul(unit.index_select(1, even), unit.index_select(1, odd).transpose(1, 2))
    cosine = torch.where(torch.isnan(cosine), _COSINE_OF_NAN, cosine)
    goes = descending_rank(cosine.amax(-1)) < merges
    to = cosine.argmax(-1)
    number = torch.arange(odd.shape[0], device=x.device).unsqueeze(-1)
    joins = (to.unsqueeze(1) == number) & goes.unsqueeze(1)  # [B, odd, even]

    weights = torch.where(joins, sizes.index_select(1, even).unsqueeze(1), 0.0)
    own = sizes.index_select(1, odd)
    total = weights.sum(-1) + own
    rest = mask_to_index(goes.logical_not(), even.shape[0] - merges)
    # A token that nobody joined stays as it is to the last bit.
    joined = joins.any(-1, keepdim=True)

    def merged(values: Tensor) -> Tensor:
        goers, stayers = _wide(values.index_select(1, even)), values.index_select(1, odd)
        summed = torch.matmul(weights.to(goers.dtype), goers) + _wide(stayers) * own.unsqueeze(-1)
        mean = (summed / total.unsqueeze(-1)).to(values.dtype)
        return torch.cat([left(values), torch.where(joined, mean, stayers)], dim=1)

    def left(values: Tensor) -> Tensor:
        return gather_rows(values.index_select(1, even), rest, 1)

    sizes = torch.cat([left(sizes), total], dim=1)
    representatives = torch.cat([left(representatives), representatives.index_select(1, odd)], dim=1)
    return merged(x), sizes, representatives, *map(merged, feature)
