"""Diversity in parallel: the tokens that are least like a few pivots among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from luvc_fx.selectors.base import SELECTORS, Selector, Site


@SELECTORS.add
@dataclass(frozen=True, slots=True)
class Diversity(Selector):
    """Scores: minus the largest cosine with a pivot; a pivot itself scores 2, above all others.

    After DART (Wen et al., arXiv 2502.11494), but with evenly spaced pivots, as many as the root of the
    tokens that stay: no step waits for another, where farthest-point search picks one token after the other.
    """

    name = "diversity"

    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        tokens = x.shape[1]
        pivots = site.sizes.get("pivots") or math.isqrt(count)
        unit = torch.nn.functional.normalize(x.to(torch.float32), dim=-1)
        places = (2 * torch.arange(pivots, device=x.device) + 1) * tokens // (2 * pivots)
        chosen = unit.index_select(1, places)
        likeness = (unit.unsqueeze(2) * chosen.unsqueeze(1)).sum(-1).amax(2)
        is_pivot = (torch.arange(tokens, device=x.device).unsqueeze(1) == places).any(1)
        return (-likeness).masked_fill(is_pivot, 2.0)

    def sizes(self, tokens: int, count: int, images: int) -> dict[str, int]:
        """How many pivots there are."""
        return {"pivots": math.isqrt(count)}
