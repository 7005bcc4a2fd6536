"""PACT: the centres of clusters among the tokens that matter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from luvc_fx.ops.compact import gather_rows
from luvc_fx.ops.select import select_global
from luvc_fx.selectors.base import SELECTORS, Selector, Site

_SMALLEST_NORM = 1e-12


@SELECTORS.add
@dataclass(frozen=True, slots=True)
class Pact(Selector):
    """Positions: cluster centres, by density peaks among the tokens with the best scores.

    After PACT (arXiv 2504.08966). A token's score is the attention that the mean query of the layer pays
    it (`Site.mean_query_attention`) times the norm of its hidden state. The best tokens are clustered by the
    cosine distance d of their rotated keys (`Site.keys`): a token's density is the sum of exp(-(d / 2)^2)
    over the others, its delta the distance to the nearest denser token, and centres are where delta is large.

    PACT's number of centres follows from a cutoff, and so from the picture. A static graph needs a fixed
    one: here the `count` largest deltas are the centres, of ceil(sqrt(count N)) tokens that the scores
    let through, so that scores and clusters drop the same share each. With ``Prune(absorb=True)`` the
    others are averaged into the centres, by their hidden states and however far they are. PACT's third
    part, log(cluster size) added to attention in later layers, is left out: it would need a mask beside
    the fused attention. The prune's coverage plays no part; the distances of m tokens take m^2 numbers.

    Raises:
        ValueError: when it is asked where the layer's queries and keys are not known.
    """

    name = "pact"
    needs_keys = True

    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        if site.mean_query_attention is None or site.keys is None:
            raise ValueError(f"selector 'pact' before decoder layer {site.layer}: its keys are not known")
        tokens = x.shape[1]
        scores = site.mean_query_attention * x.to(torch.float32).square().sum(-1).sqrt()
        let_through = site.sizes.get("let_through") or _let_through(tokens, count)
        best = select_global(scores, let_through)
        centres = select_global(_deltas(gather_rows(site.keys, best, 1)), count)
        return best.gather(1, centres)

    def sizes(self, tokens: int, count: int, images: int) -> dict[str, int]:
        """How many tokens the scores let through."""
        return {"let_through": _let_through(tokens, count)}


def _let_through(tokens: int, count: int) -> int:
    return max(count, math.isqrt(count * tokens - 1) + 1)


def _deltas(keys: Tensor) -> Tensor:
    """How far each token is from the nearest denser one; the densest of all from none, so infinitely.

    Args:
        keys: ``[B, m, C]``.

    Returns:
        float32 ``[B, m]``.
    """
    wide = keys.to(torch.float32)
    unit = wide / wide.square().sum(-1, keepdim=True).sqrt().clamp(min=_SMALLEST_NORM)
    distance = 1.0 - torch.matmul(unit, unit.transpose(1, 2))
    density = torch.exp(-(distance / 2).square()).sum(-1)
    mine, other = density.unsqueeze(2), density.unsqueeze(1)
    place = torch.arange(keys.shape[1], device=keys.device)
    earlier = place.unsqueeze(0) < place.unsqueeze(1)
    denser = (other > mine) | ((other == mine) & earlier)
    return torch.where(denser, distance, float("inf")).amin(-1)
