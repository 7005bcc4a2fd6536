"""SPU: rank the tokens by their energy under a low-pass along the sequence."""

from __future__ import annotations

from torch import Tensor

from luvc_fx.ops.spu import spectral_energy
from luvc_fx.registry import Site
from luvc_fx.schedule import Prune


def select_spectrum(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """Scores: `prune.energy` of each token, filtered over the row or by image (`prune.per_image`).

    Arguments are those of `luvc_fx.selectors.Selector`; of `site` the number of images plays a part.
    """
    return spectral_energy(
        x,
        prune.cutoff,
        prune.energy,
        normalize=prune.normalize,
        images=site.images if prune.per_image else 1,
        realization=prune.realization,
    )
