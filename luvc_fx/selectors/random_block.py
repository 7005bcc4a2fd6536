"""A control for coverage by blocks: a random token of each block."""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.registry import Site
from luvc_fx.schedule import Prune
from luvc_fx.selectors.random import hashes


def select_random_block(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """Scores: the hashes that `select_random` ranks by, so that `prune.coverage` picks as from any scores.

    Of 32 bits the upper 24, which float32 holds exactly. Arguments are those of
    `luvc_fx.selectors.Selector`; only the shape and device of `x` play a part.
    """
    scores = (hashes(x, prune, site) >> 8).to(torch.float32)
    return scores.unsqueeze(0).expand(x.shape[:2])
