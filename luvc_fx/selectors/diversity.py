"""Diversity in parallel: the tokens that are least like a few pivots among them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luvc_fx.registry import Site
from luvc_fx.schedule import Prune


def select_diversity(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """Scores: minus the largest cosine with a pivot; pivots themselves come first.

    As DART (Wen et al., arXiv 2502.11494) does, with evenly spaced pivots, as many as the root of
    `count`: no step waits for another, where farthest-point search picks one token after the other.

    Arguments are those of `luvc_fx.selectors.Selector`.
    """
    tokens = x.shape[1]
    pivots = math.isqrt(count)
    unit = torch.nn.functional.normalize(x.to(torch.float32), dim=-1)
    places = (2 * torch.arange(pivots, device=x.device) + 1) * tokens // (2 * pivots)
    chosen = unit.index_select(1, places)
    likeness = (unit.unsqueeze(2) * chosen.unsqueeze(1)).sum(-1).amax(2)
    is_pivot = (torch.arange(tokens, device=x.device).unsqueeze(1) == places).any(1)
    return (-likeness).masked_fill(is_pivot, 2.0)
