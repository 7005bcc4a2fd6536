"""Merging (OIM) as the rules state it: one line after another, in numpy, float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def note(gaps: list[float], gap: float) -> None:
    """Remember how far a decision was from its runner-up."""
    if not math.isnan(gap):
        gaps.append(abs(gap))


@dataclass
class Grid:
    """What merges: tokens, or whole blocks of patches where some later become one feature.

    Attributes:
        x: [n, H, W, C], n images.
        sizes: [n, H, W] float32, how many original tokens each one stands for.
        slots: [n, H, W] int64, each one's representative: its raster index on the unmerged grid.
        keys: [n, H, W, F], the keys of the block after which tokens merge, or None where no merge
            there asks for them; they merge as the tokens do.
        angles: [n, H, W, R] float32, the angles by which a rotary tower turns the tokens, or None;
            they merge as the tokens do.
    """

    x: Tensor
    sizes: Tensor
    slots: Tensor
    keys: Tensor | None = None
    angles: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, keys: Tensor | None = None, angles: Tensor | None = None) -> Grid:
        """Tokens [n, H, W, C] of which none has merged."""
        images, height, width = x.shape[:3]
        slots = torch.arange(height * width, device=x.device).reshape(1, height, width)
        return cls(x, torch.ones(x.shape[:3], device=x.device), slots.repeat(images, 1, 1), keys, angles)

    def transposed(self) -> Grid:
        """Height and width change places."""
        values = (self.x, self.sizes, self.slots, self.keys, self.angles)
        x, sizes, slots, keys, angles = (None if t is None else t.transpose(1, 2) for t in values)
        assert x is not None and sizes is not None and slots is not None
        return Grid(x, sizes, slots, keys, angles)


def cosines(feature: np.ndarray) -> np.ndarray:
    """[n - 1] float32: the similarity of neighbours j and j + 1 of `feature` [n, F] float32."""
    norms = np.sqrt((feature * feature).sum(axis=-1, keepdims=True))
    units = feature / np.maximum(norms, np.float32(1e-12))
    similarity = (units[:-1] * units[1:]).sum(axis=-1)
    return np.where(np.isnan(similarity), np.float32(-2), similarity)


def choose(similarity: np.ndarray, merged: int, gaps: list[float]) -> list[tuple[int, int]]:
    """The `merged` pairs (even position, the odd neighbour it goes to) of one round on one line.

    Args:
        similarity: [n - 1], of neighbours j and j + 1.
        gaps: gets the distance of every decision from its runner-up, in cosine.
    """
    n = len(similarity) + 1
    proposals = []  # (score, even position, the odd one it goes to, margin over the other one)
    for even in range(0, n, 2):
        left = similarity[even - 1] if even > 0 else None
        right = similarity[even] if even + 1 < n else None
        if right is None or (left is not None and left > right):
            assert left is not None
            margin = math.inf if right is None else float(left - right)
            proposals.append((float(left), even, even - 1, margin))
        else:
            margin = math.inf if left is None else 0.0 if left == right else float(right - left)
            proposals.append((float(right), even, even + 1, margin))
    ranked = sorted(proposals, key=lambda p: (-p[0], p[1]))
    if merged < len(ranked):
        note(gaps, ranked[merged - 1][0] - ranked[merged][0])
    for proposal in ranked[:merged]:
        note(gaps, proposal[3])
    return [(even, odd) for _, even, odd, _ in ranked[:merged]]


def join(
    pairs: list[tuple[int, int]], sizes: np.ndarray, slots: np.ndarray, *values: np.ndarray
) -> tuple[np.ndarray, ...]:
    """One line after its `pairs` became one token each, at the odd one's place.

    Args:
        sizes: [n] float32; slots: [n] int64; values: each [n, C] float32.

    Returns:
        Sizes, slots and values, shorter by the number of pairs.
    """
    sources: dict[int, list[int]] = {}
    for even, odd in pairs:
        sources.setdefault(odd, []).append(even)
    gone = {even for even, _ in pairs}
    rest = [i for i in range(len(sizes)) if i not in gone]
    out_sizes, out_values = sizes[rest], [value[rest] for value in values]
    for place, i in enumerate(rest):
        if i in sources:
            group = sorted([i, *sources[i]])
            weights = sizes[group]
            for value, out in zip(values, out_values, strict=True):
                out[place] = (weights[:, None] * value[group]).sum(axis=0) / weights.sum()
            out_sizes[place] = weights.sum()
    return out_sizes, slots[rest], *out_values


def merge_grid(
    grid: Grid,
    axis: str,
    target: int,
    gaps: list[float],
    pairing: str = "line",
    feature: str = "hidden",
    runs: Sequence[tuple[int, int] | None] | None = None,
) -> Grid:
    """An OIM step: the lines along `axis` go down to `target` tokens each, in rounds.

    Args:
        pairing: ``"line"``: each line chooses for itself; ``"shared"``: all lines of an image choose
            together, by the mean of their similarities.
        feature: whose cosine counts, the tokens' (``"hidden"``) or the keys' (``"keys"``).
        runs: of each image, the run [a, b) of positions on `axis` that may merge with each other while
            the others stay as they are; None for all of them. Long enough for the target.
    """
    if axis == "height":
        return merge_grid(grid.transposed(), "width", target, gaps, pairing, feature, runs).transposed()
    free = list(runs) if runs is not None else [None] * len(grid.x)
    while grid.x.shape[2] > target:
        length = grid.x.shape[2]
        most = min((run[1] - run[0] for run in free if run is not None), default=length)
        merged = min(length // 2, length - target, most // 2)
        grid = _round(grid, merged, gaps, pairing, feature, free)
        free = [None if run is None else (run[0], run[1] - merged) for run in free]
    return grid


def _within(similarity: np.ndarray, run: tuple[int, int] | None) -> np.ndarray:
    """[n - 1]: minus infinity for neighbours that are not both in `run`."""
    if run is None:
        return similarity
    first = np.arange(len(similarity))
    return np.where((first >= run[0]) & (first + 1 < run[1]), similarity, np.float32(-np.inf))


def _round(
    grid: Grid,
    merged: int,
    gaps: list[float],
    pairing: str,
    feature: str,
    runs: Sequence[tuple[int, int] | None],
) -> Grid:
    """Every line along the width loses `merged` tokens, at most half of them."""
    carried = {"x": grid.x, "keys": grid.keys, "angles": grid.angles}
    values = {name: value for name, value in carried.items() if value is not None}
    arrays = {name: value.float().cpu().numpy() for name, value in values.items()}
    sizes, slots = grid.sizes.cpu().numpy(), grid.slots.cpu().numpy()
    compared = arrays[{"hidden": "x", "keys": "keys"}[feature]]
    images = []  # of lists of lines, each (sizes, slots, *values)
    for n, image in enumerate(compared):
        similarities = [cosines(line) for line in image]
        if pairing == "shared":
            mean = _within(np.stack(similarities).mean(axis=0), runs[n])
            pairs = [choose(mean, merged, gaps)] * len(image)
        else:
            pairs = [choose(_within(similarity, runs[n]), merged, gaps) for similarity in similarities]
        lines = [
            join(pairs[row], sizes[n, row], slots[n, row], *(array[n, row] for array in arrays.values()))
            for row in range(len(image))
        ]
        images.append(lines)
    out = [
        np.stack([np.stack([line[i] for line in lines]) for lines in images]) for i in range(2 + len(arrays))
    ]
    device = grid.x.device
    new_sizes, new_slots = (torch.from_numpy(array).to(device) for array in out[:2])
    merged_values = {
        name: torch.from_numpy(array).to(device=device, dtype=value.dtype)
        for array, (name, value) in zip(out[2:], values.items(), strict=True)
    }
    return Grid(sizes=new_sizes, slots=new_slots, **merged_values)
