"""From what the tower made of single grids to the visual tokens of each row of the batch.

Shapes: B prompts, V placeholders in each (of all its images and videos together), N visual tokens in
each row at the fusion (after merging), D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Piece:
    """The visual tokens of one image or of one frame of a video: one after another in their row.

    Attributes:
        features: [n, D].
        slots: [n] int64, each one's representative, among the placeholders of its row (0 .. V - 1); of a
            pooled feature, which has none, the placeholder whose place it takes.
        sizes: [n] float32, how many placeholders each one stands for; pooled ones share them evenly.
        grid: (h, w) of the n features, or None where they are not a grid.
        deep: each [n, D], what is added to the tokens after each of the first decoder layers.
    """

    features: Tensor
    slots: Tensor
    sizes: Tensor
    grid: tuple[int, int] | None = None
    deep: Sequence[Tensor] = ()


@dataclass
class VisualRows:
    """The visual tokens of each row, in the order in which they stand in the prompt.

    Attributes:
        features: [B, N, D]; slots: [B, N] int64; sizes: [B, N] float32: as in `Piece`.
        grid: (h, w) where the N tokens are grids of that shape, stacked; else None.
        deep: each [B, N, D], as in `Piece`.
    """

    features: Tensor
    slots: Tensor
    sizes: Tensor
    grid: tuple[int, int] | None
    deep: Sequence[Tensor] = ()


def placeholders(model: nn.Module, input_ids: Tensor) -> Tensor:
    """[B, S] bool: the places of `input_ids` that a feature replaces."""
    tokens = (getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
    return torch.isin(input_ids, torch.tensor([t for t in tokens if t is not None], device=input_ids.device))


def shared_out(
    visual: Tensor, mine: Tensor, counts: Sequence[int], kind: str = "image"
) -> list[tuple[int, Tensor]]:
    """Where each image (or video) belongs: its row, and its placeholders among the row's V, [count].

    Features fill the placeholders of their kind in the order of the batch, as in the stock model.

    Args:
        visual: [B, S] bool, all placeholders; mine: [B, S] bool, those of this kind.
        counts: the placeholders of each image.
    """
    among = visual.long().cumsum(dim=1) - 1
    taken = [0] * len(mine)
    free = [among[row][mine[row]] for row in range(len(mine))]
    out, row = [], 0
    for count in counts:
        while row < len(mine) and taken[row] == len(free[row]):
            row += 1
        if row == len(mine) or taken[row] + count > len(free[row]):
            raise ValueError(f"{kind} features and placeholders do not match: {list(counts)} for {free}")
        out.append((row, free[row][taken[row] : taken[row] + count]))
        taken[row] += count
    if any(len(places) != done for places, done in zip(free, taken, strict=True)):
        raise ValueError(f"{kind} features and placeholders do not match: {list(counts)} for {free}")
    return out


def assemble(batch: int, pieces: Sequence[tuple[int, Piece]]) -> VisualRows:
    """The rows of a batch from their (row, piece), which may come in any order."""
    rows: list[list[Piece]] = [[] for _ in range(batch)]
    for row, piece in pieces:
        rows[row].append(piece)
    counts = [sum(len(piece.slots) for piece in row) for row in rows]
    if len(set(counts)) != 1:
        raise ValueError(f"every row needs as many visual tokens as the others, got {counts}")
    for row_pieces in rows:
        row_pieces.sort(key=lambda piece: int(piece.slots.min()))
    grids = {piece.grid for _, piece in pieces}
    return VisualRows(
        torch.stack([torch.cat([piece.features for piece in row]) for row in rows]),
        torch.stack([torch.cat([piece.slots for piece in row]) for row in rows]),
        torch.stack([torch.cat([piece.sizes for piece in row]) for row in rows]),
        grids.pop() if len(grids) == 1 else None,
        [
            torch.stack([torch.cat([piece.deep[layer] for piece in row]) for row in rows])
            for layer in range(len(pieces[0][1].deep))
        ],
    )
