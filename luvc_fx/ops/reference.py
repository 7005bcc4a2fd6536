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
    representatives: Array,
    axis: str,
    length: int,
    pairing: str = "line",
    feature: Array | None = None,
    cast: Callable[[Array], Array] = lambda token: token,
    runs: Array | None = None,
) -> tuple[Array, ...]:
    """Twin of `luvc_fx.ops.orthogonal_merge` for float32 or float64 `x` ``[B, H, W, C]``.

    `cast` rounds one token ``[C]`` to the values that a narrower dtype can hold. The shortest of `runs`
    ``[B, 2]`` is found here.
    """
    parts = [x, sizes, representatives] if feature is None else [x, sizes, representatives, feature]
    if axis == "height":
        turn = [np.swapaxes(part, 1, 2) for part in parts]
        last = None if feature is None else turn[3]
        merged = orthogonal_merge(turn[0], turn[1], turn[2], "width", length, pairing, last, cast, runs)
        return tuple(np.swapaxes(part, 1, 2) for part in merged)
    out = [np.empty((*part.shape[:2], length, *part.shape[3:]), part.dtype) for part in parts]
    compared = x if feature is None else feature
    padding = [0] * len(x) if runs is None else [x.shape[2] - (end - first) for first, end in runs.tolist()]
    for b in range(len(x)):
        lines = [
            list(zip(x[b, row], sizes[b, row], representatives[b, row], compared[b, row], strict=True))
            for row in range(x.shape[1])
        ]
        while len(lines[0]) > length:
            now = len(lines[0])
            # All grids lose equally many places, each only from its own run.
            merges = min(now - length, *((now - outside) // 2 for outside in padding))
            first = 0 if runs is None else int(runs[b, 0])
            end = first + now - padding[b]
            cosines = [[_cosine(a[3], b[3]) for a, b in itertools.pairwise(line)] for line in lines]
            if pairing == "shared":
                mean = [float(np.mean(np.array(column, x.dtype))) for column in zip(*cosines, strict=True)]
                cosines = [mean] * len(lines)
            lines = [
                _merge_line(line, _targets(cosine, merges, first, end), cast)
                for line, cosine in zip(lines, cosines, strict=True)
            ]
        for row, line in enumerate(lines):
            for i, token in enumerate(line):
                for part, value in zip(out, token, strict=False):
                    part[b, row, i] = value
    return tuple(out)


def _targets(cosine: list[float], merges: int, first: int, end: int) -> dict[int, int]:
    """Which even place goes to which neighbour, from the cosine of each place with the next.

    Only places of the run ``first .. end - 1`` take part.
    """
    proposals = []
    for i in (place for place in range(first, end) if place % 2 == 0):
        options = []
        if i + 1 < end:
            options.append((cosine[i], i + 1))
        if i > first:
            options.append((cosine[i - 1], i - 1))
        if not options:
            continue
        score, to = max(options, key=lambda option: option[0])  # the first of equals: right
        proposals.append((score, i, to))
    best = sorted(proposals, key=lambda proposal: (-proposal[0], proposal[1]))[:merges]
    return {i: to for _, i, to in best}


def _merge_line(line: list, target_of: dict[int, int], cast: Callable[[Array], Array]) -> list:
    out = []
    for i, (token, size, representative, compared) in enumerate(line):
        if i in target_of:
            continue
        joined = [j for j in (i - 1, i, i + 1) if j == i or target_of.get(j) == i]
        if len(joined) > 1:
            size = sum((line[j][1] for j in joined), np.float32(0))
            token, compared = (
                cast(sum((line[j][k] * line[j][1] for j in joined), np.zeros_like(line[i][k])) / size)
                for k in (0, 3)
            )
        out.append((token, size, representative, compared))
    return out


def _cosine(a: Array, b: Array) -> float:
    smallest = a.dtype.type(1e-12)
    with np.errstate(all="ignore"):
        unit_a = a / np.maximum(np.sqrt((a * a).sum()), smallest)
        unit_b = b / np.maximum(np.sqrt((b * b).sum()), smallest)
        cosine = float((unit_a * unit_b).sum())
    return -2.0 if math.isnan(cosine) else cosine


def sequence_merge(
    x: Array, sizes: Array, representatives: Array, length: int, feature: Array | None = None
) -> tuple[Array, ...]:
    """Twin of `luvc_fx.ops.sequence_merge` for float32 or float64 `x` ``[B, n, C]``."""
    out: list[list[Array]] = []
    for b in range(len(x)):
        row = list(
            zip(x[b], sizes[b], representatives[b], x[b] if feature is None else feature[b], strict=True)
        )
        while len(row) > length:
            merges = min(len(row) // 2, len(row) - length)
            proposals = []
            for even in range(0, len(row), 2):
                likeness = {odd: _cosine(row[even][3], row[odd][3]) for odd in range(1, len(row), 2)}
                to = max(likeness, key=likeness.__getitem__)  # the first of equals
                proposals.append((likeness[to], even, to))
            best = sorted(proposals, key=lambda proposal: (-proposal[0], proposal[1]))[:merges]
            target_of = {even: to for _, even, to in best}
            order = [even for even in range(0, len(row), 2) if even not in target_of]
            row = [_merge_into(row, i, target_of) for i in (*order, *range(1, len(row), 2))]
        out.append([np.array(values) for values in zip(*row, strict=True)])
    merged = tuple(np.stack(values) for values in zip(*out, strict=True))
    return merged[:3] if feature is None else merged


def _merge_into(row: list, i: int, target_of: dict[int, int]) -> tuple:
    token, size, representative, compared = row[i]
    joined = [i, *(even for even, to in target_of.items() if to == i)]
    if len(joined) > 1:
        size = sum((row[j][1] for j in joined), np.float32(0))
        token, compared = (sum(row[j][k] * row[j][1] for j in joined) / size for k in (0, 3))
    return token, size, representative, compared


def absorb(x: Array, kept: Array) -> Array:
    """Twin of `luvc_fx.ops.absorb`, in float64: ``[B, N, D]`` and ``[B, k]`` -> ``[B, k, D]``."""
    x = x.astype(np.float64)
    out = []
    for row, stay in zip(x, kept.tolist(), strict=True):
        groups = {i: [i] for i in stay}
        for token in range(len(row)):
            if token not in groups:
                likeness = {i: _cosine(row[token], row[i]) for i in stay}
                groups[max(likeness, key=likeness.__getitem__)].append(token)
        out.append([row[groups[i]].mean(axis=0) for i in stay])
    return np.array(out)


def lowpass(x: Array, cutoff: float) -> Array:
    """Twin of `luvc_fx.ops.lowpass`, a Fourier sum in float64: ``[B, N, D]``."""
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
    return low


def spectral_energy(x: Array, cutoff: float, energy: str, normalize: str = "none", images: int = 1) -> Array:
    """Twin of `luvc_fx.ops.spectral_energy`, in float64: ``[B, N]``."""
    if images > 1:
        parts = np.split(x, images, axis=1)
        return np.concatenate([spectral_energy(p, cutoff, energy, normalize) for p in parts], axis=1)
    x = x.astype(np.float64)
    if normalize == "mean":
        x = x - x.mean(axis=1)[:, None, :]
    if normalize == "rms":
        x = np.stack([[token / math.sqrt((token**2).mean() + 1e-6) for token in row] for row in x])
    low = lowpass(x, cutoff)
    if energy == "residual":
        return ((x - low) ** 2).sum(-1)
    energies = (low**2).sum(-1)
    return energies if energy == "lowpass" else energies / np.maximum((x**2).sum(-1), 1e-12)


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


def surviving_rows(visual: Array, representatives: Array, placeholders: int) -> tuple[Array, Array]:
    """Twin of `luvc_fx.ops.surviving_rows`."""
    batch, length = visual.shape
    all_of = [(b, row) for b in range(batch) for row in range(length) if visual[b, row]]
    assert len(all_of) == placeholders
    places: list[list[int]] = [[] for _ in range(batch)]
    ascending: list[list[int]] = [[] for _ in range(batch)]
    chosen = [all_of[representative] for representative in representatives.flatten()]
    for b in range(batch):
        tokens = iter([row for owner, row in chosen if owner == b])
        for row in range(length):
            if not visual[b, row]:
                places[b].append(row)
                ascending[b].append(row)
            elif (b, row) in chosen:
                places[b].append(next(tokens))
                ascending[b].append(row)
    return _index(places, len(places[0])), _index(ascending, len(ascending[0]))


def random_positions(tokens: int, count: int, seed: int, layer: int) -> Array:
    """Twin of `luvc_fx.selectors.random.Random` for one row: ``[count]``."""
    return select_global(np.array([[_hash(i, seed, layer) for i in range(tokens)]]), count)[0]


def _hash(i: int, seed: int, layer: int) -> int:
    word = (i + 0x9E3779B9 * (seed * 1000003 + layer + 1)) % 2**32
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)


def uniform_positions(tokens: int, count: int) -> Array:
    """Twin of `luvc_fx.selectors.uniform.Uniform` for one row: ``[count]``."""
    return np.array([(2 * i + 1) * tokens // (2 * count) for i in range(count)], np.int64)


def norm_scores(x: Array) -> Array:
    """Twin of `luvc_fx.selectors.norm.Norm`: ``[B, N]``."""
    return np.array([[sum(float(value) ** 2 for value in token) for token in row] for row in x])


def pact_positions(x: Array, attention: Array, keys: Array, count: int) -> Array:
    """Twin of `luvc_fx.selectors.pact.Pact`, in float64: ``[B, count]``."""
    rows = []
    for tokens, weights, compared in zip(
        x.astype(np.float64), attention, keys.astype(np.float64), strict=True
    ):
        scores = weights * np.sqrt((tokens**2).sum(-1))
        best = sorted(_best_first(scores, range(len(scores)))[: math.ceil(math.sqrt(count * len(scores)))])
        apart = np.array([[1.0 - _cosine(compared[i], compared[j]) for j in best] for i in best])
        density = np.exp(-((apart / 2) ** 2)).sum(-1)
        delta = np.empty(len(best))
        for i in range(len(best)):
            denser = [j for j in range(len(best)) if (-density[j], j) < (-density[i], i)]
            delta[i] = min((apart[i, j] for j in denser), default=math.inf)
        rows.append(sorted(best[i] for i in _best_first(delta, range(len(best)))[:count]))
    return _index(rows, count)


def positions(scores: Array, count: int, coverage: str, grid: tuple[int, int] | None) -> Array:
    """What `luvc_fx.selectors.choose` makes of scores: ``[B, N]`` -> ``[B, count]``."""
    return select_blocks(scores, count, grid) if coverage == "block" else select_global(scores, count)
