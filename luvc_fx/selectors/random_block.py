"""A baseline for coverage by blocks: a random token of each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luvc_fx.selectors.base import SELECTORS, Site
from luvc_fx.selectors.random import Random, hashes


@SELECTORS.add
@dataclass(frozen=True, slots=True)
class RandomBlock(Random):
    """Scores: the hashes that `Random` ranks by, so that the prune's coverage picks as from any scores.

    Of their 32 bits the upper 24, which float32 holds exactly. The parameter is that of `Random`.
    """

    name = "random-block"

    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        scores = (hashes(x, self.seed, site.layer) >> 8).to(torch.float32)
        return scores.unsqueeze(0).expand(x.shape[:2])
