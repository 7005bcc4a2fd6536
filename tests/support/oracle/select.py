"""Which visual tokens stay before a decoder layer: the selectors, as the rules state them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luvc_fx.schedule import Prune, round_half_up
from tests.support.oracle.looks import centres
from tests.support.oracle.merge import note

_MOD = 1 << 32


@dataclass
class Seen:
    """What attention says about N visual tokens, for the selectors that ask.

    Attributes:
        paid: [B, N], by the last query of the layer before; attended: [B, N], by the mean query of this
            layer; keys: [B, N, C], its turned keys.
    """

    paid: np.ndarray | None = None
    attended: np.ndarray | None = None
    keys: np.ndarray | None = None


def normalised(values: np.ndarray, normalize: str) -> np.ndarray:
    """Tokens [B, N, D] as the filter takes them."""
    if normalize == "mean":
        return values - values.mean(axis=1, keepdims=True)
    if normalize == "rms":
        return values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + 1e-6)
    return values


def _spectrum(
    values: np.ndarray, energy: str, cutoff: float, normalize: str
) -> tuple[np.ndarray, np.ndarray]:
    """The scores and their units, each [B, N], of tokens [B, N, D] that are filtered together.

    A unit times a few roundings is how wrong float32 may be about a score: the filter sums numbers as
    large as the tokens, however little is left of them.
    """
    plain = values if normalize == "mean" else normalised(values, normalize)
    largest = (plain**2).sum(axis=-1).max(axis=1, keepdims=True)
    values = normalised(values, normalize)
    count = values.shape[1]
    bins = count // 2 + 1
    passing = max(1, round_half_up(cutoff * bins))
    window = np.zeros(bins)
    for f in range(min(passing, bins)):
        window[f] = 0.54 + 0.46 * math.cos(math.pi * f / passing)
    low = np.fft.irfft(np.fft.rfft(values, axis=1) * window[None, :, None], n=count, axis=1)
    lowpass = (low**2).sum(axis=-1)
    if energy == "ratio":
        total = np.maximum((values**2).sum(axis=-1), 1e-12)
        return lowpass / total, np.sqrt(lowpass / total * np.maximum(largest / total, 1.0))
    score = lowpass if energy == "lowpass" else ((values - low) ** 2).sum(axis=-1)
    return score, np.sqrt(score * np.maximum(score, largest))


def energies(x: Tensor, energy: str, cutoff: float, normalize: str = "none") -> np.ndarray:
    """The spectrum's score of each token, [B, N] float64. `x` is [B, N, D], N >= 1, filtered together.

    The rules say float32; double precision is their exact value, so whoever computes in float32 may
    differ where `OracleResult.gap` is at rounding level, and nowhere else.
    """
    return _spectrum(x.detach().double().cpu().numpy(), energy, cutoff, normalize)[0]


def _unlike_pivots(values: np.ndarray, keep: int) -> np.ndarray:
    """Minus the largest cosine with a pivot, [B, N] of [B, N, D]; of a pivot itself 2."""
    count, pivots = values.shape[1], math.isqrt(keep)
    places = [(2 * number + 1) * count // (2 * pivots) for number in range(pivots)]
    unit = values / np.linalg.norm(values, axis=-1, keepdims=True)
    score = -np.stack([(unit * unit[:, place, None]).sum(axis=-1) for place in places]).max(axis=0)
    score[:, places] = 2.0
    return score


def _scores(
    x: Tensor, prune: Prune, grid: tuple[int, int] | None, seen: Seen, keep: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `prune` ranks the tokens [B, N, D] by, and the units, each [B, N]."""
    values = x.detach().double().cpu().numpy()
    batch, count, channels = values.shape
    if prune.selector.name == "norm":
        score = (values**2).sum(axis=-1)
        return score, score
    if prune.selector.name == "fastv" and seen.paid is not None:
        return seen.paid, seen.paid
    if prune.selector.name == "diversity":
        score = _unlike_pivots(values, keep)
        return score, np.ones_like(score)
    if prune.selector.name not in ("spectrum", "distinct"):
        raise NotImplementedError(f"the oracle does not know the selector {prune.selector.name!r}")
    if prune.per_image and grid is not None:
        values = values.reshape(-1, grid[0] * grid[1], channels)
    score, unit = (
        e.reshape(batch, count) for e in _spectrum(values, prune.energy, prune.cutoff, prune.normalize)
    )
    if prune.selector.name == "distinct":
        factor = 1.0 + _unlike_pivots(values.reshape(batch, count, channels), keep)
        return score * factor, np.maximum(unit * factor, score)
    return score, unit


def mix32(x: int) -> int:
    """murmur3's finaliser, modulo 2^32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % _MOD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % _MOD
    return x ^ (x >> 16)


def random_scores(count: int, seed: int, layer: int) -> list[int]:
    """The random selector's score of each of `count` tokens before decoder layer `layer`."""
    stream = 0x9E3779B9 * (seed * 1000003 + layer + 1) % _MOD
    return [mix32((i + stream) % _MOD) for i in range(count)]


def _largest(scores: np.ndarray, keep: int, scale: float, gaps: list[float]) -> list[int]:
    """The `keep` largest, ties to the lower index, as ascending positions; notes the gap over `scale`."""
    order = np.argsort(-scores, kind="stable")
    if 0 < keep < len(scores):
        note(gaps, float(scores[order[keep - 1]] - scores[order[keep]]) / scale)
    return sorted(int(i) for i in order[:keep])


def _blocks(count: int, keep: int, grid: tuple[int, int] | None) -> list[list[int]]:
    """The tokens of each block of the block coverage; [keep] lists."""
    if grid is not None and count == 4 * keep and grid[0] % 2 == 0 and grid[1] % 2 == 0:
        width = grid[1]
        corners = [
            row * width + column for row in range(0, count // width, 2) for column in range(0, width, 2)
        ]
        return [[c, c + 1, c + width, c + width + 1] for c in corners]
    blocks: list[list[int]] = [[] for _ in range(keep)]
    for i in range(count):
        blocks[i * keep // count].append(i)
    return blocks


def _pact(x: Tensor, keep: int, seen: Seen, gaps: list[float]) -> list[list[int]]:
    """Centres of clusters among the tokens with the best scores."""
    assert seen.attended is not None and seen.keys is not None
    scores = seen.attended * np.sqrt((x.detach().double().cpu().numpy() ** 2).sum(axis=-1))
    among = max(keep, math.ceil(math.sqrt(keep * x.shape[1])))
    chosen = []
    for score, keys in zip(scores, seen.keys, strict=True):
        best = _largest(score, among, float(score.max()), gaps)
        chosen.append([best[i] for i in centres(keys[best], keep, gaps)])
    return chosen


def select(
    x: Tensor,
    prune: Prune,
    keep: int,
    layer: int,
    grid: tuple[int, int] | None,
    gaps: list[float],
    seen: Seen | None = None,
) -> Tensor:
    """The SPU step (or a control): which `keep` of the visual rows `x` [B, N, D] stay, ascending.

    Args:
        layer: the resolved decoder layer.
        grid: (h, w) of one image where the N tokens are whole row-major grids, stacked; else None.
        seen: for the selectors that look at attention.

    Returns:
        [B, keep] int64.
    """
    batch, count = x.shape[:2]
    if keep == count:
        chosen = [list(range(count))] * batch
    elif keep == 0:
        chosen = [[] for _ in range(batch)]
    elif prune.selector.name == "uniform":
        chosen = [[(2 * i + 1) * count // (2 * keep) for i in range(keep)]] * batch
    elif prune.selector.name == "random":
        scores = random_scores(count, prune.seed, layer)
        order = sorted(range(count), key=lambda i: (-scores[i], i))
        chosen = [sorted(order[:keep])] * batch
    elif prune.selector.name == "pact" and seen is not None:
        chosen = _pact(x, keep, seen, gaps)
    else:
        chosen = []
        for row, units in zip(*_scores(x, prune, grid, seen or Seen(), keep), strict=True):
            scale = max(float(units.max()), 1e-300)
            if prune.coverage == "global":
                chosen.append(_largest(row, keep, scale, gaps))
                continue
            winners = []
            for block in _blocks(count, keep, grid):
                ranked = sorted(block, key=lambda i: (-row[i], i))
                winners.append(ranked[0])
                if len(ranked) > 1:
                    note(gaps, float(row[ranked[0]] - row[ranked[1]]) / scale)
            chosen.append(sorted(winners))
    return torch.tensor(chosen, dtype=torch.int64, device=x.device).reshape(batch, keep)
