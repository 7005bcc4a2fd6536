"""Slow, obvious NumPy twins of the ops and selectors, from the rules: what tests compare with.

They share no code with the torch versions, loop where the rule says "each", and take NumPy arrays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np

Array = np.ndarray


def orthogonal_merge(
    x: Array,
    sizes: Array,
    slots: Array,
    axis: str,
    length: int,
    cast: Callable[[Array], Array] = lambda token: token,
) -> tuple[Array, Array, Array]:
    """Twin of `luvc_fx.ops.orthogonal_merge` for float32 or float64 `x` ``[B, H, W, C]``.

    `cast` rounds one token ``[C]`` to the values that a narrower dtype can hold.
    """
    if axis == "height":
        x, sizes, slots = (np.swapaxes(a, 1, 2) for a in (x, sizes, slots))
        x, sizes, slots = orthogonal_merge(x, sizes, slots, "width", length, cast)
        return np.swapaxes(x, 1, 2), np.swapaxes(sizes, 1, 2), np.swapaxes(slots, 1, 2)
    batch, rows = x.shape[:2]
    out_x = np.empty((batch, rows, length, x.shape[3]), x.dtype)
    out_sizes = np.empty((batch, rows, length), np.float32)
    out_slots = np.empty((batch, rows, length), np.int64)
    for b in range(batch):
        for row in range(rows):
            line = [(x[b, row, i], sizes[b, row, i], slots[b, row, i]) for i in range(x.shape[2])]
            while len(line) > length:
                line = _merge_line(line, min(len(line) // 2, len(line) - length), cast)
            for i, (token, size, slot) in enumerate(line):
                out_x[b, row, i], out_sizes[b, row, i], out_slots[b, row, i] = token, size, slot
    return out_x, out_sizes, out_slots


def _merge_line(line: list, merges: int, cast: Callable[[Array], Array]) -> list:
    cosine = [_cosine(a[0], b[0]) for a, b in itertools.pairwise(line)]
    proposals = []
    for i in range(0, len(line), 2):
        options = []
        if i + 1 < len(line):
            options.append((cosine[i], i + 1))
        if i > 0:
            options.append((cosine[i - 1], i - 1))
        score, to = max(options, key=lambda option: option[0])  # the first of equals: right
        proposals.append((score, i, to))
    best = sorted(proposals, key=lambda proposal: (-proposal[0], proposal[1]))[:merges]
    target_of = {i: to for _, i, to in best}
    out = []
    for i, (token, size, slot) in enumerate(line):
        if i in target_of:
            continue
        joined = [j for j in (i - 1, i, i + 1) if j == i or target_of.get(j) == i]
        if len(joined) > 1:
            size = sum((line[j][1] for j in joined), np.float32(0))
            total = sum((line[j][0] * line[j][1] for j in joined), np.zeros_like(token))
            token = cast(total / size)
        out.append((token, size, slot))
    return out


def _cosine(a: Array, b: Array) -> float:
    smallest = a.dtype.type(1e-12)
    with np.errstate(all="ignore"):
        unit_a = a / np.maximum(np.sqrt((a * a).sum()), smallest)
        unit_b = b / np.maximum(np.sqrt((b * b).sum()), smallest)
        cosine = float((unit_a * unit_b).sum())
    return -2.0 if math.isnan(cosine) else cosine


def spectral_energy(x: Array, cutoff: float, energy: str) -> Array:
    """Twin of `luvc_fx.ops.spectral_energy`, a Fourier sum in float64: ``[B, N]``."""
    x = x.astype(np.float64)
    tokens = x.shape[1]
    bins = tokens // 2 + 1
    edge = max(1, math.floor(cutoff * bins + 0.5))
    time = np.arange(tokens)
    low = np.zeros_like(x)
    for f in range(min(edge, bins)):
        weight = 0.54 + 0.46 * math.cos(math.pi * f / edge)
        # A real signal's bin f comes with its mirror image, save for f = 0 and the highest of even
        # N.
        twice = 1 if f == 0 or 2 * f == tokens else 2
        for wave in (np.cos, np.sin):
            basis = wave(2 * math.pi * f * time / tokens)
            amplitude = np.einsum("t,btd->bd", basis, x) * (twice / tokens)
            low += weight * basis[None, :, None] * amplitude[:, None, :]
    if energy == "residual":
        return ((x - low) ** 2).sum(-1)
    lowpass = (low**2).sum(-1)
    return lowpass if energy == "lowpass" else lowpass / np.maximum((x**2).sum(-1), 1e-12)


def _best_first(scores: Array, among: Iterable[int]) -> list[int]:
    values = {i: -math.inf if math.isnan(scores[i]) else scores[i] for i in among}
    return sorted(values, key=lambda i: (-values[i], i))


def _index(rows: list[list[int]], count: int) -> Array:
    return np.array(rows, np.int64).reshape(len(rows), count)


def select_global(scores: Array, k: int) -> Array:
    """Twin of `luvc_fx.ops.select_global`: ``[B, N]`` -> ``[B, k]``."""
    return _index([sorted(_best_first(row, range(len(row)))[:k]) for row in scores], k)


def select_blocks(scores: Array, k: int, grid: tuple[int, int] | None) -> Array:
    """Twin of `luvc_fx.ops.select_blocks`: ``[B, N]`` -> ``[B, k]``."""
    tokens = scores.shape[1]
    blocks: dict[tuple[int, ...], list[int]] = {}
    squares = grid is not None and tokens == 4 * k and grid[0] % 2 == 0 and grid[1] % 2 == 0
    for i in range(tokens if k else 0):
        if squares and grid is not None:
            block: tuple[int, ...] = (i // grid[1] // 2, i % grid[1] // 2)
        else:
            block = (i * k // tokens,)
        blocks.setdefault(block, []).append(i)
    return _index([sorted(_best_first(row, block)[0] for block in blocks.values()) for row in scores], k)


def mask_to_index(mask: Array, count: int) -> Array:
    """Twin of `luvc_fx.ops.mask_to_index`; a short row is filled up with zeros."""
    rows = [[i for i, kept in enumerate(row) if kept][:count] for row in mask]
    return _index([row + [0] * (count - len(row)) for row in rows], count)


def gather_rows(x: Array, index: Array, dim: int) -> Array:
    """Twin of `luvc_fx.ops.gather_rows`."""
    if x.ndim == 1:
        x, dim = x[None], 1
    rows = [x[b if x.shape[0] > 1 else 0] for b in range(len(index))]
    return np.stack([np.take(row, i, axis=dim - 1) for row, i in zip(rows, index, strict=True)])


def compact(x: Array, mask: Array, count: int) -> Array:
    """Twin of `luvc_fx.ops.compact`."""
    return gather_rows(x, mask_to_index(mask, count), 1)


def random_positions(tokens: int, count: int, seed: int, layer: int) -> Array:
    """Twin of `luvc_fx.selectors.select_random` for one row: ``[count]``."""
    return select_global(np.array([[_hash(i, seed, layer) for i in range(tokens)]]), count)[0]


def _hash(i: int, seed: int, layer: int) -> int:
    word = (i + 0x9E3779B9 * (seed * 1000003 + layer + 1)) % 2**32
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)


def uniform_positions(tokens: int, count: int) -> Array:
    """Twin of `luvc_fx.selectors.select_uniform` for one row: ``[count]``."""
    return np.array([(2 * i + 1) * tokens // (2 * count) for i in range(count)], np.int64)


def spectrum_positions(
    x: Array,
    cutoff: float,
    energy: str,
    coverage: str,
    count: int,
    grid: tuple[int, int] | None,
) -> Array:
    """Twin of `luvc_fx.selectors.select_spectrum`: ``[B, N, D]`` -> ``[B, count]``."""
    scores = spectral_energy(x, cutoff, energy)
    return select_blocks(scores, count, grid) if coverage == "block" else select_global(scores, count)
