"""Averaging the tokens that go into those that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.ops.compact import gather_rows

_SMALLEST_NORM = 1e-12


def absorb(x: Tensor, keep: Tensor, ahead: Tensor, kept: Tensor) -> Tensor:
    """The tokens that stay, each the plain mean of itself and of the dropped tokens that are most like it.

    Each dropped token is given to the kept token whose cosine with it is largest, the first of equals. Means
    are computed in float32; a kept token that is given none stays as it is to the last bit.

    Args:
        x: ``[B, N, D]``, any floating dtype.
        keep: bool ``[B, N]``, True k times in each row.
        ahead: int64 ``[B, N]``, how many of the tokens before each one stay.
        kept: int64 ``[B, k]``, the places of the tokens that stay, ascending.

    Returns:
        ``[B, k, D]`` of the dtype of `x`.
    """
    stay = gather_rows(x, kept, 1)
    wide = x.to(torch.float32)
    unit = wide / wide.square().sum(-1, keepdim=True).sqrt().clamp(min=_SMALLEST_NORM)
    nearest = torch.matmul(unit, gather_rows(unit, kept, 1).transpose(1, 2)).argmax(-1)
    owner = torch.where(keep, ahead, nearest)
    # A product with a table of zeros and ones: `scatter_add` would add in another order, and so round
    # differently, from run to run on a GPU.
    number = torch.arange(kept.shape[1], device=x.device).unsqueeze(-1)
    member = (owner.unsqueeze(1) == number).to(torch.float32)
    size = member.sum(-1, keepdim=True)
    mean = (torch.matmul(member, wide) / size).to(x.dtype)
    return torch.where(size > 1, mean, stay)
