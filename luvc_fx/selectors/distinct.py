"""What a token's neighbours do not say of it, where no pivot says it either: spectrum times diversity."""

from __future__ import annotations

from torch import Tensor

from luvc_fx.registry import Site
from luvc_fx.schedule import Prune
from luvc_fx.selectors.diversity import select_diversity
from luvc_fx.selectors.spectrum import select_spectrum


def select_distinct(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """Scores: `select_spectrum`'s energy times ``1 - the largest cosine with a pivot``, a pivot's times 3.

    The product needs no weight between the two, whose scales differ from layer to layer. Pivots are
    `select_diversity`'s; 3 is above 2, the most that another token gets. Ours; no published method.

    Arguments are those of `luvc_fx.selectors.Selector`.
    """
    return select_spectrum(x, prune, count, site) * (1.0 + select_diversity(x, prune, count, site))
