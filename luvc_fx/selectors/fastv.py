"""FastV: the tokens to which the last token of the prompt pays most attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luvc_fx.selectors.base import SELECTORS, Selector, Site


@SELECTORS.add
@dataclass(frozen=True, slots=True)
class FastV(Selector):
    """Scores: the attention that the last query pays in the layer before, mean over the heads.

    FastV (Chen et al., arXiv 2403.06764) keeps the best of all, once:
    ``Prune(keep=0.5, layer=2, selector="fastv", coverage="global")``.

    Raises:
        ValueError: when it is asked before the first layer, where nobody has paid any attention yet.
    """

    name = "fastv"
    needs_last_query_attention = True

    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        if site.last_query_attention is None:
            raise ValueError(f"selector 'fastv' before decoder layer {site.layer}: no layer lies before it")
        return site.last_query_attention
