"""The rows that enter a decoder layer, and the place where visual features enter the prompt.

Shapes: B prompts, S their length, V placeholders in each (of all its images and videos together), N
visual tokens in each row at the fusion (after merging).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.oracle.rows import VisualRows


@dataclass
class Sequence:
    """The rows that enter a decoder layer; every field has [B, S_l] first.

    `position_ids` is [B, S_l], and [B, S_l, 3] for M-RoPE (time, row, column).
    """

    hidden: Tensor
    position_ids: Tensor
    valid: Tensor
    visual: Tensor
    rows: Tensor

    def take(self, index: Tensor) -> Sequence:
        """Rows `index` [B, S'] of each."""
        at = torch.arange(len(index), device=index.device)[:, None]
        return Sequence(*(getattr(self, f.name)[at, index] for f in dataclasses.fields(self)))


def visual_index(visual: Tensor, count: int) -> Tensor:
    """[B, count] int64: the places of the visual rows, `visual` is [B, S] bool."""
    if not bool((visual.sum(dim=1) == count).all()):
        raise ValueError(f"every row needs {count} visual rows, got {visual.sum(dim=1).tolist()}")
    return visual.nonzero()[:, 1].reshape(len(visual), count)


def drop(seq: Sequence, places: Tensor, kept: Tensor) -> Sequence:
    """Without the visual rows, at `places` [B, N], that are not in `kept` [B, k] of N."""
    stays = ~seq.visual
    stays.scatter_(1, places.gather(1, kept), True)
    return seq.take(stays.nonzero()[:, 1].reshape(len(stays), -1))


def fuse(seq: Sequence, placeholders: Tensor, tokens: VisualRows) -> Sequence:
    """Put the features into the prompt and take out the placeholders that lost their token.

    The j-th feature goes to the j-th placeholder that is left, with the position id (on every axis)
    and the row of its representative.

    Args:
        seq: the prompt, [B, S]; placeholders: [B, S] bool, V in each row.
    """
    places = [mask.nonzero()[:, 0] for mask in placeholders]  # V of one row need not be another's
    representative = torch.stack([place[slots] for place, slots in zip(places, tokens.slots, strict=True)])
    stays = ~placeholders
    stays.scatter_(1, representative, True)
    lengths = stays.sum(dim=1)
    if not bool((lengths == lengths[0]).all()):
        raise ValueError(f"every row needs as many rows left as the others, got {lengths.tolist()}")
    full = dataclasses.replace(seq, visual=placeholders)
    short = full.take(stays.nonzero()[:, 1].reshape(len(stays), -1))
    target = visual_index(short.visual, tokens.slots.shape[1])
    at = torch.arange(len(target), device=target.device)[:, None]
    hidden, position_ids, rows = (values.clone() for values in (short.hidden, short.position_ids, short.rows))
    hidden[at, target] = tokens.features.to(hidden.dtype)
    position_ids[at, target] = seq.position_ids[at, representative]
    rows[at, target] = representative
    return dataclasses.replace(short, hidden=hidden, position_ids=position_ids, rows=rows)
