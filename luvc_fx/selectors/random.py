"""A baseline: tokens at random, the same ones in every run, row and process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luvc_fx.methods.checks import set_integer
from luvc_fx.ops.select import select_global
from luvc_fx.selectors.base import SELECTORS, Selector, Site

_WORD = 0xFFFFFFFF  # arithmetic is modulo 2^32
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: streams of neighbouring seeds and layers lie far apart


@SELECTORS.add
@dataclass(frozen=True, slots=True)
class Random(Selector):
    """Positions: those with the largest hashes of position, seed and decoder layer.

    A hash and no generator: a compiled graph then holds no random state, and every device agrees.

    Args:
        seed: a whole number of at least 0.

    Raises:
        ValueError: for another seed.
    """

    name = "random"
    reads_place = True

    seed: int = 0

    def __post_init__(self) -> None:
        set_integer(self, "seed", 0, "a whole number of at least 0")

    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        return select_global(hashes(x, self.seed, site.layer).unsqueeze(0), count).expand(x.shape[0], count)


def hashes(x: Tensor, seed: int, layer: int) -> Tensor:
    """One number for each position of `x` ``[B, N, D]``: int64 ``[N]``, in 0 .. 2^32 - 1."""
    offset = _GOLDEN * (seed * 1000003 + layer + 1) & _WORD
    place = torch.arange(x.shape[1], device=x.device)
    return _mix32((place + offset) & _WORD)


def _mix32(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Austin Appleby, public domain), on 32-bit words held in int64."""
    x = _times(x ^ (x >> 16), 0x85EBCA6B)
    x = _times(x ^ (x >> 13), 0xC2B2AE35)
    return x ^ (x >> 16)


def _times(x: Tensor, factor: int) -> Tensor:
    """``x factor`` modulo 2^32, by the halves of `x`, as the whole product would overflow int64."""
    high = ((x >> 16) * factor) & 0xFFFF
    return ((x & 0xFFFF) * factor + (high << 16)) & _WORD
