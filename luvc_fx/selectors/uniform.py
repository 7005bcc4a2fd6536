"""A control: evenly spaced tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.registry import Site
from luvc_fx.schedule import Prune


def select_uniform(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """Positions: the middle of each of `count` equal stretches, floor((2 i + 1) N / (2 count)).

    Arguments and result are those of `luvc_fx.selectors.Selector`; only the shape and device of `x`
    play a part.
    """
    batch, tokens = x.shape[:2]
    place = (2 * torch.arange(count, device=x.device) + 1) * tokens // (2 * count)
    return place.expand(batch, count)
