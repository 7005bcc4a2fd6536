"""PACT: the centres of clusters among the tokens that matter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luvc_fx.ops.compact import gather_rows
from luvc_fx.ops.select import select_global
from luvc_fx.registry import Site
from luvc_fx.schedule import Prune

_SMALLEST_NORM = 1e-12


def select_pact(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """Positions: `count` cluster centres, by density peaks among the tokens with the best scores.

    After PACT (arXiv 2504.08966). A token's score is the attention that the mean query of the layer pays
    it (`Site.attended`) times the norm of its hidden state. The best of them are clustered by the cosine
    distance d of their rotated keys (`Site.keys`): a token's density is the sum of exp(-(d / 2)^2), its
    delta the distance to the nearest denser token, and centres are where delta is large.

    PACT's number of centres follows from a cutoff, and so from the picture. A static graph needs a fixed
    one: here the `count` largest deltas are the centres, of ceil(sqrt(count N)) tokens that the scores
    let through, so that scores and clusters drop the same share each. With ``Prune(absorb=True)`` the
    others are averaged into the centres, by their hidden states and however far they are. PACT's third
    part, log(cluster size) added to attention in later layers, is left out: it would need a mask beside
    the fused attention. `prune.coverage` plays no part; the distances of m tokens take m^2 numbers.

    Arguments are those of `luvc_fx.selectors.Selector`.

    Raises:
        ValueError: where the layer's queries and keys are not known.
    """
    if site.attended is None or site.keys is None:
        raise ValueError(f"selector 'pact' before decoder layer {site.layer}: its keys are not known")
    tokens = x.shape[1]
    scores = site.attended * x.to(torch.float32).square().sum(-1).sqrt()
    best = select_global(scores, max(count, math.isqrt(count * tokens - 1) + 1))
    centres = select_global(_peaks(gather_rows(site.keys, best, 1)), count)
    return best.gather(1, centres)


def _peaks(keys: Tensor) -> Tensor:
    """``[B, m, C]`` -> float32 ``[B, m]``: distance to the nearest denser one, infinite for the densest."""
    wide = keys.to(torch.float32)
    unit = wide / wide.square().sum(-1, keepdim=True).sqrt().clamp(min=_SMALLEST_NORM)
    distance = 1.0 - torch.matmul(unit, unit.transpose(1, 2))
    density = torch.exp(-(distance / 2).square()).sum(-1)
    mine, other = density.unsqueeze(2), density.unsqueeze(1)
    place = torch.arange(keys.shape[1], device=keys.device)
    earlier = place.unsqueeze(0) < place.unsqueeze(1)
    denser = (other > mine) | ((other == mine) & earlier)
    return torch.where(denser, distance, float("inf")).amin(-1)
