"""What a token's neighbours do not say of it, and no pivot either: spectrum times diversity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luvc_fx.selectors.base import SELECTORS, Site
from luvc_fx.selectors.diversity import Diversity
from luvc_fx.selectors.spectrum import Spectrum


@SELECTORS.add
@dataclass(frozen=True, slots=True)
class Distinct(Spectrum):
    """Scores: the energy of `Spectrum` times ``1 - the largest cosine with a pivot``, a pivot's times 3.

    The product needs no weight between the two, whose scales differ from layer to layer. Pivots are those
    of `Diversity`; 3 is above 2, the most that another token gets. Ours; no published method. Parameters
    are those of `Spectrum`.
    """

    name = "distinct"

    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        energy = Spectrum.__call__(self, x, count, site)  # `super()` is of the class without slots
        return energy * (1.0 + Diversity()(x, count, site))

    def sizes(self, tokens: int, count: int, images: int) -> dict[str, int]:
        """Those of both."""
        both = Diversity().sizes(tokens, count, images)
        return {**Spectrum.sizes(self, tokens, count, images), **both}
