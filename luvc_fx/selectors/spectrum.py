"""SPU: rank the tokens by their energy under a low-pass along the sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from luvc_fx.methods.checks import ABOVE_ZERO, check_choice, check_flag, set_number
from luvc_fx.ops.lowpass import REALIZATIONS, chosen, passing_bins
from luvc_fx.ops.spu import ENERGIES, NORMALIZATIONS, spectral_energy
from luvc_fx.selectors.base import SELECTORS, Selector, Site


@SELECTORS.add
@dataclass(frozen=True, slots=True)
class Spectrum(Selector):
    """Scores: the energy of each token under a Hamming low-pass along the sequence.

    After LUVC's Spectrum Pruning Unit (arXiv 2512.09010); formulas are in `luvc_fx.ops.spu`.

    Args:
        energy: ``"residual"``, what the low-pass cannot rebuild; ``"lowpass"``, what passes, which is LUVC's
            own reading; or ``"ratio"``, what passes over all.
        cutoff: sigma in (0, 1], the fraction of the frequency bins that pass.
        normalize: what happens to the tokens before they are filtered. ``"mean"`` subtracts each channel's
            mean over the tokens that are filtered together, ``"rms"`` divides each token by the root of its
            mean square over the channels, ``"none"`` does neither.
        per_image: filter each image's tokens by themselves while all of them are there.
        realization: how the filter is computed: ``"fft"``, ``"basis"`` (the same as two thin matrix
            products), ``"fir"`` (a short convolution) or ``"auto"`` (see `luvc_fx.ops.lowpass`).

    Raises:
        ValueError: naming the parameter, its value and what is allowed.
    """

    name = "spectrum"

    energy: str = "residual"
    cutoff: float = 0.25
    normalize: str = "none"
    per_image: bool = False
    realization: str = "auto"

    def __post_init__(self) -> None:
        check_filter(self)

    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        return spectral_energy(
            x,
            self.cutoff,
            self.energy,
            normalize=self.normalize,
            images=site.images if self.per_image else 1,
            realization=self.realization,
            bins=site.sizes.get("bins"),
        )

    def sizes(self, tokens: int, count: int, images: int) -> dict[str, int]:
        """The frequency bins that pass."""
        return {"bins": passing_bins(tokens // (images if self.per_image else 1), self.cutoff)}

    def settled(self, x: Tensor, images: int) -> Spectrum:
        """With the realization that ``"auto"`` is for `x`."""
        if self.realization != "auto":
            return self
        return replace(self, realization=chosen(x, self.cutoff, images if self.per_image else 1))


def check_filter(item: Any) -> None:
    """Check the parameters of `Spectrum` in a frozen dataclass that has them; the cutoff becomes a float.

    Raises:
        ValueError: naming the parameter, its value and what is allowed.
    """
    owner = type(item).__name__
    check_choice(owner, "energy", item.energy, ENERGIES)
    set_number(item, "cutoff", ABOVE_ZERO, 1.0, "a number in (0, 1]")
    check_choice(owner, "normalize", item.normalize, NORMALIZATIONS)
    check_flag(item, "per_image")
    check_choice(owner, "realization", item.realization, REALIZATIONS)
