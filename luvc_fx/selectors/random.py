"""A control: tokens at random, the same ones in every run, row and process."""

from __future__ import annotations

import torch
from torch import Tensor

from luvc_fx.ops.select import select_global
from luvc_fx.registry import Site
from luvc_fx.schedule import Prune

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def select_random(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """Positions: the largest hashes of position, `prune.seed` and `site.layer`.

    A hash and no generator: a compiled graph then holds no random state, and every device agrees.
    Arguments and result are those of `luvc_fx.selectors.Selector`; the values of `x` play no part.
    """
    return select_global(hashes(x, prune, site).unsqueeze(0), count).expand(x.shape[0], count)


def hashes(x: Tensor, prune: Prune, site: Site) -> Tensor:
    """Of the positions of `x` ``[B, N, D]``: int64 ``[N]``, each in 0 .. 2^32 - 1."""
    offset = _GOLDEN * (prune.seed * 1000003 + site.layer + 1) & _WORD
    place = torch.arange(x.shape[1], device=x.device)
    return _mix32((place + offset) & _WORD)


def _mix32(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Austin Appleby, public domain), on words held in int64."""
    x = _times(x ^ (x >> 16), 0x85EBCA6B)
    x = _times(x ^ (x >> 13), 0xC2B2AE35)
    return x ^ (x >> 16)


def _times(x: Tensor, factor: int) -> Tensor:
    """``x factor`` modulo 2^32 in halves, as the whole product would overflow int64."""
    high = ((x >> 16) * factor) & 0xFFFF
    return ((x & 0xFFFF) * factor + (high << 16)) & _WORD
