"""A baseline: the tokens with the largest norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luvc_fx.selectors.base import SELECTORS, Selector, Site


@SELECTORS.add
@dataclass(frozen=True, slots=True)
class Norm(Selector):
    """Scores: the sum of squares over the channels, in float32."""

    name = "norm"

    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        return x.to(torch.float32).square().sum(-1)
