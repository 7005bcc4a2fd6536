"""ToMe: the most similar pairs of the whole grid merge, whatever the axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luvc_fx.mergers.base import FEATURES, MERGERS, Merger, PatchGrid, Shortening
from luvc_fx.methods.checks import check_choice
from luvc_fx.ops.tome import sequence_merge


@MERGERS.add
@dataclass(frozen=True, slots=True)
class Tome(Merger):
    """Token Merging (Bolya et al., arXiv 2210.09461) as a baseline; the rule is in `luvc_fx.ops.tome`.

    It leaves as many tokens as OIM does, on a grid of the same shape, but in ToMe's order: where that grid is
    read afterwards, neighbours on it are none in the picture. ToMe's proportional attention is left out:
    later blocks do not weigh a token by its size.

    Its tokens are single patches in the encoder's order, ``[n, T, C]``, with sizes and representatives
    ``[n, T]``. Patches are numbered block by block, so that those of one block are neighbours in number.

    Args:
        feature: what similarity compares: the ``"hidden"`` states after the block, or the ``"keys"`` of its
            attention, their mean over the heads, which is what ToMe's authors compare.

    Raises:
        ValueError: for another feature.
    """

    name = "tome"
    keeps_places = False

    feature: str = "hidden"

    def __post_init__(self) -> None:
        check_choice("Tome", "feature", self.feature, FEATURES)

    @property
    def needs_keys(self) -> bool:
        return self.feature == "keys"

    def merge(
        self,
        tokens: Tensor,
        sizes: Tensor,
        representatives: Tensor,
        shortening: Shortening,
        feature: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        left = tokens.shape[1] // shortening.before * shortening.after
        tokens, sizes, representatives, *_ = sequence_merge(tokens, sizes, representatives, left, feature)
        return tokens, sizes, representatives

    def to_tokens(self, rows: Tensor, grid: PatchGrid) -> Tensor:
        return rows

    def to_rows(self, tokens: Tensor, grid: PatchGrid) -> Tensor:
        return tokens

    def keys_to_compare(self, keys: Tensor) -> Tensor:
        return keys.mean(1)

    def unmerged(self, tokens: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
        shape = tokens.shape[:-1]
        numbers = torch.arange(shape[1], device=tokens.device).reshape(1, *grid.blocks, -1)
        sizes = torch.ones(shape, dtype=torch.float32, device=tokens.device)
        return sizes, grid.to_rows(numbers).reshape(1, -1).expand(shape)

    def feature_representatives(self, representatives: Tensor, before: PatchGrid, after: PatchGrid) -> Tensor:
        """Those of patches where one feature is one patch.

        Else a feature holds patches of all over the picture, and two may begin with patches of one block:
        features are put in the order of their first patches, and spread evenly over the blocks that there
        were.
        """
        blocks = after.to_blocks(representatives.unsqueeze(-1))
        first = blocks.select(-1, 0)
        if before.unit == (1, 1):
            return first
        flat = first.flatten(1)
        rank = (flat.unsqueeze(2) > flat.unsqueeze(1)).sum(-1)
        places = before.blocks[0] * before.blocks[1]
        spread = (2 * rank + 1) * places // (2 * flat.shape[1])
        return spread.reshape(first.shape)
