"""FastV: the tokens to which the last token of the prompt pays most attention."""

from __future__ import annotations

from torch import Tensor

from luvc_fx.registry import Site
from luvc_fx.schedule import Prune


def select_fastv(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """Scores: the attention that the last query pays in the layer before, mean over heads.

    Arguments are those of `luvc_fx.selectors.Selector`. FastV (Chen et al., arXiv 2403.06764) keeps the
    best of all, once: ``Prune(keep=0.5, layer=2, selector="fastv", coverage="global")``.

    Raises:
        ValueError: before the first layer, where nobody has paid any attention yet.
    """
    if site.paid is None:
        raise ValueError(f"selector 'fastv' before decoder layer {site.layer}: no layer lies before it")
    return site.paid
