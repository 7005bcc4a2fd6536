"""The low-pass along the token axis, in three ways that compute the same.

It passes the first `edge` frequency bins of a sequence, weighted by the falling half of a Hamming
window: ``w[f] = 0.54 + 0.46 cos(pi f / edge)``, and 0 from `edge` on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luvc_fx.ops.rounding import round_half_up

REALIZATIONS = ("auto", "fft", "fir", "basis")

_MOST_BINS_ON_CPU, _MOST_BINS_OF_MANY = 64, 128
_MANY = 1 << 22
_MOST_PRODUCTS = 1 << 29
# A window of 257 / sigma taps, cut off in longer sequences. There up to 2.2 % of the kept tokens of a
# trained model differ, as the step at the edge (0.08 to 0) lets the impulse response fall off as 1 / t.
_REACH_IN_BINS = 128


def lowpass(x: Tensor, cutoff: float, realization: str = "auto", bins: int | None = None) -> Tensor:
    """The part of each channel that varies slowly along the tokens.

    ``"fft"`` is the definition, ``irfft(w rfft(x))``. ``"basis"`` multiplies by the cosines and sines
    of the bins that pass, twice: the same up to rounding, without complex numbers, which Inductor
    hands to ATen with a warning. ``"fir"`` convolves with the impulse response, cut off where the
    sequence is much longer than it; on an accelerator Inductor generates all of it, with no call of a
    library, and an eager call holds ``N * taps * D`` numbers in memory.

    ``"auto"`` follows measurements (examples/research/benchmarks/realisations.py). On a CPU (one
    thread, float32) it is the basis up to 64 bins, or 128 where `x` has 2^22 numbers and the FFT misses
    the caches, and the FFT above. On an accelerator it is the FIR where its window is whole, up to 2^29
    products, and else the basis, whose two matrix products are then the only calls of a library. Not
    where the window is cut off: as few as 97.8 % of a trained model's kept tokens are the same. Not
    above 2^29 products: what Inductor writes for one is 15 instructions of an H100 at best and nothing
    for its tensor cores, so 2^29 take 0.3 ms, and the 2^35 of 8,192 tokens of 3,584 channels 15 ms. The
    basis takes 4 times as many there, but a library does them at 50 TFLOPS in 5 ms (all this counted, not
    measured), and sooner in TF32, where `torch.set_float32_matmul_precision` allows it: then 99.1 % of
    the kept tokens are the same. In bfloat16 it is 93.8 %, so under autocast, which rounds the products
    of the basis (and of the FIR on a CPU), ``"auto"`` is the FFT instead of those.

    Args:
        x: float32 ``[B, N, D]``, N at least 1.
        cutoff: sigma in (0, 1], the fraction of the ``N // 2 + 1`` bins that pass; one at least.
        realization: ``"auto"``, ``"fft"``, ``"basis"`` or ``"fir"``.
        bins: `passing_bins` of N and the cutoff, in a graph in which both numbers are symbols: a symbol
            cannot be rounded there as a number is.

    Returns:
        float32 ``[B, N, D]``.

    Raises:
        ValueError: for a cutoff or realization that is not allowed (beside `bins`, ``"auto"``), or no token.
    """
    tokens = x.shape[1]
    if tokens < 1:
        raise ValueError(f"x has {tokens} tokens; allowed: at least 1")
    if not 0.0 < cutoff <= 1.0:
        raise ValueError(f"cutoff is {cutoff!r}; allowed: a number in (0, 1]")
    if realization not in REALIZATIONS:
        allowed = ", ".join(map(repr, REALIZATIONS))
        raise ValueError(f"realization is {realization!r}; allowed: {allowed}")
    if bins is not None and realization == "auto":
        raise ValueError("realization is 'auto'; allowed beside bins: what `chosen` says of real sizes")
    edge = passing_bins(tokens, cutoff) if bins is None else bins
    if realization == "auto":
        realization = chosen(x, cutoff)
    by = {"fft": _by_fft, "basis": _by_basis, "fir": _by_fir}[realization]
    over = _number_over if bins is None else _tensor_over
    return by(x, edge, over).to(torch.float32)


def passing_bins(tokens: int, cutoff: float) -> int:
    """How many of the ``tokens // 2 + 1`` frequency bins pass."""
    return max(1, round_half_up(cutoff * (tokens // 2 + 1)))


def products(x: Tensor, cutoff: float, realization: str) -> int:
    """How many multiplications ``"basis"`` or ``"fir"`` takes for `x` ``[B, N, D]``; 0 for ``"fft"``."""
    edge = passing_bins(x.shape[1], cutoff)
    left, right = _reach(x.shape[1], edge)
    return x.numel() * {"fft": 0, "basis": 4 * edge, "fir": left + 1 + right}[realization]


def chosen(x: Tensor, cutoff: float, images: int = 1) -> str:
    """What ``"auto"`` is for `x` ``[B, N, D]``, whose N tokens are those of as many images, one by one."""
    device, tokens = x.device.type, x.shape[1] // images
    left, right = _reach(tokens, passing_bins(tokens, cutoff))
    whole = left + 1 + right == tokens
    if device != "cpu" and whole and x.numel() * tokens <= _MOST_PRODUCTS:
        return "fir"
    if torch.is_autocast_enabled(device):
        return "fft"
    most = _MOST_BINS_OF_MANY if x.numel() >= _MANY else _MOST_BINS_ON_CPU
    return "basis" if device != "cpu" or passing_bins(tokens, cutoff) <= most else "fft"


Over = Callable[[float, int, torch.device], Any]
"""A number over a size, in float64, to multiply a float32 tensor with."""


def _number_over(number: float, size: int, device: torch.device) -> float:
    """The quotient of numbers."""
    return number / size


def _tensor_over(number: float, size: int, device: torch.device) -> Tensor:
    """The same as a tensor ``[]``, for a size that is a symbol: Inductor has no floating symbols.

    As a float32, to which a number would be rounded beside a float32 tensor.
    """
    return torch.full((), number, dtype=torch.float64, device=device).div(size).to(torch.float32)


def _window(edge: int, device: torch.device, over: Over) -> Tensor:
    """float32 ``[edge]``."""
    frequency = torch.arange(edge, device=device, dtype=torch.float32)
    return 0.54 + 0.46 * torch.cos(frequency * over(math.pi, edge, device))


def _by_fft(x: Tensor, edge: int, over: Over) -> Tensor:
    tokens = x.shape[1]
    passed = torch.fft.rfft(x, dim=1).narrow(1, 0, edge)
    # As pairs of reals: Inductor generates no complex arithmetic, and this product is its own.
    weighted = torch.view_as_real(passed) * _window(edge, x.device, over).reshape(1, edge, 1, 1)
    rest = tokens // 2 + 1 - edge
    padded = torch.nn.functional.pad(weighted, (0, 0, 0, 0, 0, rest))
    return torch.fft.irfft(torch.view_as_complex(padded), n=tokens, dim=1)


def _weights(frequency: Tensor, tokens: int, edge: int, over: Over) -> Tensor:
    """float32: what the amplitudes of a bin's cosine and sine are multiplied by."""
    # A bin stands for its mirror image too, save for 0 and the highest of an even number of tokens.
    alone = (frequency == 0) | (2 * frequency == tokens)
    # Of two numbers, the result has the default dtype, which may be set to another.
    device = frequency.device
    share = torch.where(alone, over(1.0, tokens, device), over(2.0, tokens, device)).to(torch.float32)
    return (0.54 + 0.46 * torch.cos(frequency.to(torch.float32) * over(math.pi, edge, device))) * share


def _by_basis(x: Tensor, edge: int, over: Over) -> Tensor:
    tokens = x.shape[1]
    row = torch.arange(2 * edge, device=x.device).unsqueeze(1)
    frequency = row % edge
    if over is _number_over:
        quarter = torch.where(row < edge, 0, tokens)
    else:  # no branch of `where` may be a symbol
        quarter = (row >= edge).to(torch.int64) * tokens
    # A sine is a cosine a quarter of a turn earlier. Whole turns are taken off while the numbers are
    # exact; float32 would lose them in long sequences.
    turns = 4 * (frequency * torch.arange(tokens, device=x.device)).remainder(tokens) - quarter
    basis = torch.cos(turns.to(torch.float32) * over(math.pi, 2 * tokens, x.device))
    weighted = basis * _weights(frequency, tokens, edge, over)
    return torch.matmul(weighted.t(), torch.matmul(basis, x))


def _reach(tokens: int, edge: int) -> tuple[int, int]:
    """How many taps there are on the left and on the right of a token."""
    reach = math.ceil(_REACH_IN_BINS * (tokens // 2 + 1) / edge)
    return (reach, reach) if 2 * reach + 1 < tokens else ((tokens - 1) // 2, tokens // 2)


def _by_fir(x: Tensor, edge: int, over: Over) -> Tensor:
    batch, tokens, channels = x.shape
    left, right = _reach(tokens, edge)
    offsets = torch.arange(-left, right + 1, device=x.device)
    taps = _impulse_response(offsets, tokens, edge, over)
    if left + 1 + right < tokens:
        taps = taps / taps.sum()  # a constant passes whole, through a window that was cut off too
    if x.device.type != "cpu":
        return sum_of_windows(x, offsets, taps)
    ring = torch.cat([x.narrow(1, tokens - left, left), x, x.narrow(1, 0, right)], 1)
    lines = ring.transpose(1, 2).reshape(batch * channels, 1, left + tokens + right)
    low = torch.nn.functional.conv1d(lines, taps.reshape(1, 1, -1))
    return low.reshape(batch, channels, tokens).transpose(1, 2)


def _impulse_response(offsets: Tensor, tokens: int, edge: int, over: Over) -> Tensor:
    """float32 ``[T]``: the filter's answer to a one, at int64 `offsets` ``[T]`` from it.

    In closed form, so that an accelerator needs no kernel for it: the window is a constant and a cosine,
    the sum of the bins below `edge` is a Dirichlet kernel, and the cosine moves it to either side by
    half a turn over `edge`.
    """
    middle = _dirichlet(2 * edge * offsets, tokens, edge, over)
    right = _dirichlet(2 * edge * offsets + tokens, tokens, edge, over)
    left = _dirichlet(2 * edge * offsets - tokens, tokens, edge, over)
    total = 0.54 * middle + 0.23 * (left + right)
    if 2 * (edge - 1) == tokens:
        # The highest of an even number of bins is its own mirror image, and was counted twice.
        highest = 0.54 - 0.46 * _cosine(over(math.pi, edge, offsets.device))
        total = total - highest * (1.0 - 2.0 * offsets.remainder(2).to(torch.float32))
    return total / tokens


def _cosine(angle: float | Tensor) -> float | Tensor:
    return torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle)


def _dirichlet(turn: Tensor, tokens: int, edge: int, over: Over) -> Tensor:
    """``sum over |f| < edge of cos(2 pi f v)``, v being `turn` over ``2 edge tokens``.

    It is ``sin((2 edge - 1) pi v) / sin(pi v)``, and ``(2 edge - 1) v`` is `turn` over `tokens` less v.
    Whole turns are taken off while the numbers are whole, so the quotient is right next to its gaps as
    well. No number here passes 2^31 below 65,000 tokens: Inductor counts in 32 bits on an accelerator.
    """
    whole = 2 * edge * tokens
    turn = _around_zero(turn, whole)
    half = turn.to(torch.float32) * over(math.pi, whole, turn.device)
    angle = _around_zero(turn, 2 * tokens).to(torch.float32) * over(math.pi, tokens, turn.device)
    above, below = torch.sin(angle - half), torch.sin(half)
    middle = torch.full_like(turn, 2 * edge - 1).to(torch.float32)
    return torch.where(turn == 0, middle, above / torch.where(turn == 0, 1.0, below))


def _around_zero(turn: Tensor, whole: int) -> Tensor:
    """`turn` modulo `whole`, in ``-whole / 2 .. whole / 2 - 1``."""
    return (turn + whole // 2).remainder(whole) - whole // 2


def sum_of_windows(x: Tensor, offsets: Tensor, taps: Tensor) -> Tensor:
    """``sum_t taps[t] x[:, n + offsets[t]]`` around the ring, in a spelling that Inductor fuses on a GPU.

    Args:
        x: ``[B, N, D]``.
        offsets: int64 ``[T]``.
        taps: ``[T]``.

    Returns:
        ``[B, N, D]``.
    """
    tokens = x.shape[1]
    places = (torch.arange(tokens, device=x.device).unsqueeze(1) + offsets).remainder(tokens)
    windows = x.index_select(1, places.flatten()).unflatten(1, places.shape)
    return (windows * taps.unsqueeze(-1)).sum(2)
