"""SPU's energies: how much of each token a low-pass along the token axis holds, or leaves out.

The method is LUVC's Spectrum Pruning Unit (arXiv 2512.09010): FFT over the tokens, a Hamming window
up to a cutoff, the energy of each token. The full text was not available to us; the formulas are
ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luvc_fx.schedule import ENERGIES, round_half_up

_SMALLEST_TOTAL = 1e-12


def spectral_energy(x: Tensor, cutoff: float, energy: str) -> Tensor:
    """The energy of each token under a Hamming low-pass along the token axis.

    ``L = irfft(w rfft(x))`` over the tokens, with the first half of a Hamming window as ``w`` below
    the cutoff and 0 above. Then, summed over the channels: ``lowpass`` is L^2, ``residual`` is (x -
    L)^2 and ``ratio`` is lowpass / max(x^2, 1e-12). All of it in float32.

    Args:
        x: ``[B, N, D]``, N at least 1, any floating dtype.
        cutoff: sigma in (0, 1], the fraction of the frequency bins that pass.
        energy: ``"lowpass"``, ``"residual"`` or ``"ratio"``.

    Returns:
        float32 ``[B, N]``; NaN or infinity where `x` holds such values or its squares overflow.

    Raises:
        ValueError: for a cutoff or energy that is not allowed, or no token.
    """
    tokens = x.shape[1]
    if tokens < 1:
        raise ValueError(f"x has {tokens} tokens; allowed: at least 1")
    if not 0.0 < cutoff <= 1.0:
        raise ValueError(f"cutoff is {cutoff!r}; allowed: a number in (0, 1]")
    if energy not in ENERGIES:
        raise ValueError(f"energy is {energy!r}; allowed: {', '.join(map(repr, ENERGIES))}")
    x = x.to(torch.float32)
    low = _lowpass(x, cutoff)
    if energy == "residual":
        return (x - low).square().sum(-1)
    lowpass = low.square().sum(-1)
    if energy == "lowpass":
        return lowpass
    return lowpass / x.square().sum(-1).clamp(min=_SMALLEST_TOTAL)


def _lowpass(x: Tensor, cutoff: float) -> Tensor:
    """float32 ``[B, N, D]`` -> the same: the part of `x` below the cutoff."""
    tokens = x.shape[1]
    bins = tokens // 2 + 1
    edge = max(1, round_half_up(cutoff * bins))
    frequency = torch.arange(bins, device=x.device, dtype=torch.float32)
    window = torch.where(frequency < edge, 0.54 + 0.46 * torch.cos(frequency * (math.pi / edge)), 0.0)
    # As pairs of reals: Inductor generates no complex arithmetic, and this product is its own.
    spectrum = torch.view_as_real(torch.fft.rfft(x, dim=1))
    passed = torch.view_as_complex(spectrum * window.reshape(1, bins, 1, 1))
    return torch.fft.irfft(passed, n=tokens, dim=1)
