"""A baseline: evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luvc_fx.selectors.base import SELECTORS, Selector, Site


@SELECTORS.add
@dataclass(frozen=True, slots=True)
class Uniform(Selector):
    """Positions: the middle of each of `count` equal stretches, floor((2 i + 1) N / (2 count))."""

    name = "uniform"

    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        batch, tokens = x.shape[:2]
        place = (2 * torch.arange(count, device=x.device) + 1) * tokens // (2 * count)
        return place.expand(batch, count)
