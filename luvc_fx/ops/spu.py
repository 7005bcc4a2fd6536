"""SPU's energies: how much of each token a low-pass along the token axis holds, or leaves out.

The method is LUVC's Spectrum Pruning Unit (arXiv 2512.09010): FFT over the tokens, a Hamming window
up to a cutoff, the energy of each token. The full text was not available to us; the formulas are
ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.ops.lowpass import lowpass

ENERGIES = ("residual", "lowpass", "ratio")
NORMALIZATIONS = ("none", "mean", "rms")

_SMALLEST_TOTAL = 1e-12
_RMS_EPS = 1e-6


def spectral_energy(
    x: Tensor,
    cutoff: float,
    energy: str,
    *,
    normalize: str = "none",
    images: int = 1,
    realization: str = "auto",
    bins: int | None = None,
) -> Tensor:
    """The energy of each token under a Hamming low-pass along the token axis.

    With ``L = lowpass(x)`` (see `luvc_fx.ops.lowpass`), summed over the channels: ``lowpass`` is L^2,
    ``residual`` is (x - L)^2 and ``ratio`` is lowpass / max(x^2, 1e-12). All of it in float32, and of
    the normalised tokens.

    Args:
        x: ``[B, N, D]``, N at least 1, any floating dtype.
        cutoff: sigma in (0, 1], the fraction of the frequency bins that pass.
        energy: ``"lowpass"``, ``"residual"`` or ``"ratio"``.
        normalize: ``"none"``; ``"mean"`` subtracts each channel's mean over the tokens; ``"rms"``
            divides each token by sqrt(mean of its squares + 1e-6).
        images: that many runs of N / images tokens are filtered, and their mean taken, each by itself.
        realization, bins: of the filter, as of `luvc_fx.ops.lowpass`.

    Returns:
        float32 ``[B, N]``; NaN or infinity where `x` holds such values or its squares overflow.

    Raises:
        ValueError: for an argument that is not allowed, or no token.
    """
    batch, tokens, channels = x.shape
    if energy not in ENERGIES:
        raise ValueError(f"energy is {energy!r}; allowed: {', '.join(map(repr, ENERGIES))}")
    if images < 1 or tokens % images:
        raise ValueError(f"images is {images!r}; allowed: a divisor of {tokens}, the tokens there are")
    x = _normalized(x.to(torch.float32).reshape(batch * images, tokens // images, channels), normalize)
    return _energy(x, lowpass(x, cutoff, realization, bins), energy).reshape(batch, tokens)


def _normalized(x: Tensor, normalize: str) -> Tensor:
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize is {normalize!r}; allowed: {', '.join(map(repr, NORMALIZATIONS))}")
    if normalize == "mean":
        return x - x.mean(1, keepdim=True)
    if normalize == "rms":
        return x / (x.square().mean(-1, keepdim=True) + _RMS_EPS).sqrt()
    return x


def _energy(x: Tensor, low: Tensor, energy: str) -> Tensor:
    if energy == "residual":
        return (x - low).square().sum(-1)
    passed = low.square().sum(-1)
    if energy == "lowpass":
        return passed
    return passed / x.square().sum(-1).clamp(min=_SMALLEST_TOTAL)
