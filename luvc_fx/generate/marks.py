"""Sizes that Dynamo is to take for symbols."""

from __future__ import annotations

import torch
from torch import Tensor


def marked_axes(tensor: Tensor, *axes: int) -> Tensor:
    """An alias whose `axes` are symbols: marks stay on a tensor, and this one may be the user's."""
    alias = tensor.view(tensor.shape)
    for axis in axes:
        torch._dynamo.maybe_mark_dynamic(alias, axis)
    return alias
