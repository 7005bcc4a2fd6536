"""A control: the tokens with the largest norm."""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.registry import Site
from luvc_fx.schedule import Prune


def select_norm(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """Scores: the sum of squares over the channels, in float32.

    Arguments are those of `luvc_fx.selectors.Selector`; only `x` plays a part.
    """
    return x.to(torch.float32).square().sum(-1)
