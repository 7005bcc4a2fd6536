"""Which visual tokens stay before a decoder layer: the selectors, as the rules state them."""

from __future__ import annotations

import math

import numpy as np
import torch
from oracle_merge import note
from torch import Tensor

from luvc_fx.schedule import Prune, round_half_up

_MOD = 1 << 32


def energies(x: Tensor, energy: str, cutoff: float) -> np.ndarray:
    """The spectrum's score of each token, [B, N] float64. `x` is [B, N, D], N >= 1.

    The rules say float32; double precision is their exact value, so whoever computes in float32 may
    differ where `OracleResult.gap` is at rounding level, and nowhere else.
    """
    values = x.detach().double().cpu().numpy()
    count = values.shape[1]
    bins = count // 2 + 1
    passing = max(1, round_half_up(cutoff * bins))
    window = np.zeros(bins)
    for f in range(min(passing, bins)):
        window[f] = 0.54 + 0.46 * math.cos(math.pi * f / passing)
    low = np.fft.irfft(np.fft.rfft(values, axis=1) * window[None, :, None], n=count, axis=1)
    lowpass = (low**2).sum(axis=-1)
    if energy == "lowpass":
        return lowpass
    if energy == "residual":
        return ((values - low) ** 2).sum(axis=-1)
    return lowpass / np.maximum((values**2).sum(axis=-1), 1e-12)


def mix32(x: int) -> int:
    """murmur3's finaliser, modulo 2^32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % _MOD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % _MOD
    return x ^ (x >> 16)


def random_scores(count: int, seed: int, layer: int) -> list[int]:
    """The random selector's score of each of `count` tokens before decoder layer `layer`."""
    stream = 0x9E3779B9 * (seed * 1000003 + layer + 1) % _MOD
    return [mix32((i + stream) % _MOD) for i in range(count)]


def _largest(scores: np.ndarray, keep: int, gaps: list[float]) -> list[int]:
    """The `keep` largest, ties to the lower index, as ascending positions; notes the gap."""
    order = np.argsort(-scores, kind="stable")
    if 0 < keep < len(scores):
        scale = max(float(np.abs(scores).max()), 1e-300)
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


def select(
    x: Tensor, prune: Prune, keep: int, layer: int, grid: tuple[int, int] | None, gaps: list[float]
) -> Tensor:
    """The SPU step (or a control): which `keep` of the visual rows `x` [B, N, D] stay, ascending.

    Args:
        layer: the resolved decoder layer.
        grid: (h, w) of one image where the N tokens are whole row-major grids, stacked; else None.

    Returns:
        [B, keep] int64.
    """
    batch, count = x.shape[:2]
    if keep == count:
        chosen = [list(range(count))] * batch
    elif keep == 0:
        chosen = [[] for _ in range(batch)]
    elif prune.selector == "uniform":
        chosen = [[(2 * i + 1) * count // (2 * keep) for i in range(keep)]] * batch
    elif prune.selector == "random":
        scores = random_scores(count, prune.seed, layer)
        order = sorted(range(count), key=lambda i: (-scores[i], i))
        chosen = [sorted(order[:keep])] * batch
    else:
        chosen = []
        for row in energies(x, prune.energy, prune.cutoff):
            if prune.coverage == "global":
                chosen.append(_largest(row, keep, gaps))
                continue
            scale = max(float(np.abs(row).max()), 1e-300)
            winners = []
            for block in _blocks(count, keep, grid):
                ranked = sorted(block, key=lambda i: (-row[i], i))
                winners.append(ranked[0])
                if len(ranked) > 1:
                    note(gaps, float(row[ranked[0]] - row[ranked[1]]) / scale)
            chosen.append(sorted(winners))
    return torch.tensor(chosen, dtype=torch.int64, device=x.device).reshape(batch, keep)
