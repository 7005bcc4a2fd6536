"""Which rows of a value went into which row of a shorter one, by the gradient of what was computed."""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE = 0.05
"""How far the weights of a mean may be from 1 in all; half precision is within it, a wrong owner never."""


def owners(source: Tensor, result: Tensor) -> Tensor:
    """Per row of `source` the row of `result` that it went into, or -1 for one that was dropped.

    Each row of `result` is a mean of rows of `source`, whose weights are its derivatives. Rows are told
    apart by the bits of their numbers: one backward pass a bit, over all rows at once.

    Args:
        source: ``[..., n, C]``, a leaf that requires a gradient.
        result: ``[..., m, C]``, computed of it. Comparisons that decided it have no gradient.

    Returns:
        int64 ``[..., n]``.

    Raises:
        RuntimeError: some row of `result` is no mean of rows that went into no other.
    """
    left = result.shape[-2]
    numbers = torch.arange(1, left + 1, device=source.device)

    def weights(chosen: Tensor) -> Tensor:
        direction = torch.zeros_like(result)
        direction[..., 0] = chosen.to(result.dtype)
        (found,) = torch.autograd.grad(result, source, direction, retain_graph=True)
        return found[..., 0]

    owner = torch.zeros(source.shape[:-1], dtype=torch.int64, device=source.device)
    for bit in range(left.bit_length()):
        owner += (weights(numbers >> bit & 1) != 0).long() << bit
    share = weights(torch.ones_like(numbers)).float()
    whole = share.new_zeros(*owner.shape[:-1], left + 1).scatter_add(-1, owner.clamp(max=left), share)
    if owner.max() > left or ((whole[..., 1:] - 1).abs() > _TOLERANCE).any():
        raise RuntimeError("a token is not the mean of tokens that went into it alone")
    return owner - 1
