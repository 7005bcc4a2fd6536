"""ToMe as the rules state it: one pair after another over the whole row of patches, in numpy, float32.

Single patches merge, also where several of them later become one feature. What is left is read as a grid
again, in ToMe's order. A feature of one patch has that patch's place. One of several takes a place by the
order of the first patches: the r-th of n' features, of n places, has place floor((2 r + 1) n / (2 n')).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.support.oracle.merge import note


@dataclass
class Patches:
    """Rows of patches in the tower's order.

    Attributes:
        x: [n, T, C]; sizes: [n, T] float32; slots: [n, T] int64, numbers block by block.
        keys: [n, T, d], the keys of the block, mean over the heads, or None; angles: [n, T, R] or None.
    """

    x: Tensor
    sizes: Tensor
    slots: Tensor
    keys: Tensor | None = None
    angles: Tensor | None = None


def _pairs(compared: np.ndarray, merged: int, gaps: list[float]) -> list[tuple[int, int]]:
    """The `merged` pairs (even place, odd place) of one round over a row [T, F]."""
    units = compared / np.maximum(np.sqrt((compared * compared).sum(-1, keepdims=True)), np.float32(1e-12))
    proposals = []
    for even in range(0, len(units), 2):
        likeness = [float((units[even] * units[odd]).sum()) for odd in range(1, len(units), 2)]
        best = max(range(len(likeness)), key=lambda i: (likeness[i], -i))
        others = likeness[:best] + likeness[best + 1 :]
        margin = likeness[best] - max(others) if others else np.inf
        proposals.append((likeness[best], even, 2 * best + 1, margin))
    ranked = sorted(proposals, key=lambda p: (-p[0], p[1]))
    if merged < len(ranked):
        note(gaps, ranked[merged - 1][0] - ranked[merged][0])
    for proposal in ranked[:merged]:
        note(gaps, proposal[3])
    return [(even, odd) for _, even, odd, _ in ranked[:merged]]


def merge_patches(patches: Patches, target: int, gaps: list[float], feature: str) -> Patches:
    """Rows of `target` patches, in rounds that take at most half of them."""
    while patches.x.shape[1] > target:
        tokens = patches.x.shape[1]
        patches = _round(patches, min(tokens // 2, tokens - target), gaps, feature)
    return patches


def _round(patches: Patches, merged: int, gaps: list[float], feature: str) -> Patches:
    compared = patches.keys if feature == "keys" else patches.x
    assert compared is not None
    rows: list[dict[str, list[Tensor]]] = []
    for n in range(len(patches.x)):
        pairs = _pairs(compared[n].float().cpu().numpy(), merged, gaps)
        goers = {even for even, _ in pairs}
        tokens = patches.x.shape[1]
        order = [i for i in range(0, tokens, 2) if i not in goers] + list(range(1, tokens, 2))
        row: dict[str, list[Tensor]] = {name: [] for name in ("x", "sizes", "slots", "keys", "angles")}
        for place in order:
            group = [place, *(even for even, odd in pairs if odd == place)]
            weights = patches.sizes[n, group]
            row["sizes"].append(weights.sum())
            row["slots"].append(patches.slots[n, place])
            for name in ("x", "keys", "angles"):
                values = getattr(patches, name)
                if values is not None:
                    mean = (weights[:, None] * values[n, group].float()).sum(0) / weights.sum()
                    row[name].append(mean.to(values.dtype) if len(group) > 1 else values[n, place])
        rows.append(row)
    names = [name for name, values in rows[0].items() if values]
    return Patches(**{name: torch.stack([torch.stack(row[name]) for row in rows]) for name in names})


def placed(first: Tensor, places: int, single: bool) -> Tensor:
    """[n, F'] int64: the place of each feature among `places`, from the number of its first patch.

    Args:
        single: whether a feature is one patch, whose number is its place.
    """
    if single:
        return first
    out = torch.empty_like(first)
    for n, row in enumerate(first.tolist()):
        for rank, feature in enumerate(sorted(range(len(row)), key=row.__getitem__)):
            out[n, feature] = (2 * rank + 1) * places // (2 * len(row))
    return out
