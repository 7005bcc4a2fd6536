"""SPU: keep the tokens by their energy under a low-pass along the sequence."""

from __future__ import annotations

from torch import Tensor

from luvc_fx.ops.select import all_or_none, select_blocks, select_global
from luvc_fx.ops.spu import spectral_energy
from luvc_fx.schedule import Prune


def select_spectrum(x: Tensor, prune: Prune, count: int, layer: int, grid: tuple[int, int] | None) -> Tensor:
    """The tokens with the largest `prune.energy`, overall or of each block (`prune.coverage`).

    Arguments, result and errors are those of `luvc_fx.selectors.Selector`; `layer` plays no part.
    """
    whole = all_or_none(x, count)
    if whole is not None:  # no transform for a choice that does not depend on it
        return whole
    scores = spectral_energy(x, prune.cutoff, prune.energy)
    if prune.coverage == "block":
        return select_blocks(scores, count, grid)
    return select_global(scores, count)
