"""The low-pass along the token axis, in three ways that compute the same.

It passes the first `edge` frequency bins of a sequence, weighted by the falling half of a Hamming
window: ``w[f] = 0.54 + 0.46 cos(pi f / edge)``, and 0 from `edge` on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luvc_fx.schedule import REALIZATIONS, round_half_up

_MOST_BINS_ON_CPU = 128
# A window of 257 / sigma taps. With a quarter of it up to 1.4 % of the kept tokens of a trained model
# differ, as the step at the edge (0.08 to 0) lets the impulse response fall off as slowly as 1 / t.
_REACH = 128


def lowpass(x: Tensor, cutoff: float, realization: str = "auto") -> Tensor:
    """The part of each channel that varies slowly along the tokens.

    ``"fft"`` is the definition, ``irfft(w rfft(x))``. ``"basis"`` multiplies by the cosines and sines
    of the bins that pass, twice: the same up to rounding, without complex numbers, which Inductor
    hands to ATen with a warning. ``"fir"`` convolves with the impulse response, cut off where the
    sequence is much longer than it; on an accelerator Inductor fuses it into one kernel, and an eager
    call holds ``N * taps * D`` numbers in memory.

    ``"auto"`` was chosen by time on a CPU (one thread, float32): the basis takes 0.2 to 0.5 of the
    FFT's time at 10 bins, the same at 30 to 100 and 1.3 to 2.6 times it at 128; so it is the FFT above
    that. On an accelerator it is the basis. Under autocast, which rounds the products of the basis (and
    of the FIR on a CPU), it is the FFT.

    Args:
        x: float32 ``[B, N, D]``, N at least 1.
        cutoff: sigma in (0, 1], the fraction of the ``N // 2 + 1`` bins that pass; one at least.
        realization: ``"auto"``, ``"fft"``, ``"basis"`` or ``"fir"``.

    Returns:
        float32 ``[B, N, D]``.

    Raises:
        ValueError: for a cutoff or realization that is not allowed, or no token.
    """
    tokens = x.shape[1]
    if tokens < 1:
        raise ValueError(f"x has {tokens} tokens; allowed: at least 1")
    if not 0.0 < cutoff <= 1.0:
        raise ValueError(f"cutoff is {cutoff!r}; allowed: a number in (0, 1]")
    if realization not in REALIZATIONS:
        allowed = ", ".join(map(repr, REALIZATIONS))
        raise ValueError(f"realization is {realization!r}; allowed: {allowed}")
    edge = max(1, round_half_up(cutoff * (tokens // 2 + 1)))
    if realization == "auto":
        realization = _fastest(x.device.type, edge)
    by = {"fft": _by_fft, "basis": _by_basis, "fir": _by_fir}[realization]
    return by(x, edge).to(torch.float32)


def _fastest(device: str, edge: int) -> str:
    if torch.is_autocast_enabled(device):
        return "fft"
    return "basis" if device != "cpu" or edge <= _MOST_BINS_ON_CPU else "fft"


def _window(bins: int, edge: int, device: torch.device) -> Tensor:
    """float32 ``[bins]``, for at most `edge` bins."""
    frequency = torch.arange(bins, device=device, dtype=torch.float32)
    return 0.54 + 0.46 * torch.cos(frequency * (math.pi / edge))


def _by_fft(x: Tensor, edge: int) -> Tensor:
    tokens = x.shape[1]
    passed = torch.fft.rfft(x, dim=1).narrow(1, 0, edge)
    # As pairs of reals: Inductor generates no complex arithmetic, and this product is its own.
    weighted = torch.view_as_real(passed) * _window(edge, edge, x.device).reshape(1, edge, 1, 1)
    rest = tokens // 2 + 1 - edge
    padded = torch.nn.functional.pad(weighted, (0, 0, 0, 0, 0, rest))
    return torch.fft.irfft(torch.view_as_complex(padded), n=tokens, dim=1)


def _angles(places: Tensor, tokens: int, edge: int) -> Tensor:
    """``[edge, P]`` float32: the angle of each bin at each of the `places`, int64 ``[P]``."""
    frequency = torch.arange(edge, device=places.device).unsqueeze(1)
    # Whole turns are taken off while the numbers are exact; float32 would lose them in long sequences.
    return (frequency * places).remainder(tokens).to(torch.float32) * (2 * math.pi / tokens)


def _weights(tokens: int, edge: int, device: torch.device) -> Tensor:
    """float32 ``[edge, 1]``: what a bin's cosine and sine amplitudes are multiplied by."""
    frequency = torch.arange(edge, device=device)
    # A bin stands for its mirror image too, save for 0 and the highest of an even number of tokens.
    alone = (frequency == 0) | (2 * frequency == tokens)
    share = torch.where(alone, 1.0 / tokens, 2.0 / tokens)
    return (_window(edge, edge, device) * share).unsqueeze(1)


def _by_basis(x: Tensor, edge: int) -> Tensor:
    tokens = x.shape[1]
    angles = _angles(torch.arange(tokens, device=x.device), tokens, edge)
    basis = torch.cat([torch.cos(angles), torch.sin(angles)])
    weights = _weights(tokens, edge, x.device)
    amplitudes = torch.matmul(basis, x) * torch.cat([weights, weights])
    return torch.matmul(basis.t(), amplitudes)


def _by_fir(x: Tensor, edge: int) -> Tensor:
    batch, tokens, channels = x.shape
    reach = math.ceil(_REACH * (tokens // 2 + 1) / edge)
    left, right = (reach, reach) if 2 * reach + 1 < tokens else ((tokens - 1) // 2, tokens // 2)
    offsets = torch.arange(-left, right + 1, device=x.device)
    taps = (torch.cos(_angles(offsets, tokens, edge)) * _weights(tokens, edge, x.device)).sum(0)
    taps = taps / taps.sum()  # a constant passes whole, through a window that was cut off too
    ring = torch.cat([x.narrow(1, tokens - left, left), x, x.narrow(1, 0, right)], 1)
    if x.device.type == "cpu":
        lines = ring.transpose(1, 2).reshape(batch * channels, 1, left + tokens + right)
        low = torch.nn.functional.conv1d(lines, taps.reshape(1, 1, -1))
        return low.reshape(batch, channels, tokens).transpose(1, 2)
    return sum_of_windows(ring, taps)


def sum_of_windows(x: Tensor, taps: Tensor) -> Tensor:
    """``[B, N + T - 1, D]`` and ``[T]`` -> ``[B, N, D]``, in a spelling that Inductor fuses on a GPU."""
    return (x.unfold(1, taps.shape[0], 1) * taps).sum(-1)
