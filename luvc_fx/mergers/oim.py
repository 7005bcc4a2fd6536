"""OIM: neighbours on the grid merge along one axis at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luvc_fx.mergers.base import FEATURES, MERGERS, Merger, Shortening
from luvc_fx.methods.checks import check_choice
from luvc_fx.ops.oim import PAIRINGS, orthogonal_merge


@MERGERS.add
@dataclass(frozen=True, slots=True)
class Oim(Merger):
    """LUVC's Orthogonal Iterative Merger (arXiv 2512.09010); the rule is in `luvc_fx.ops.oim`.

    Args:
        pairing: ``"line"`` lets each line along the axis choose its own pairs; ``"shared"`` chooses on the
            similarity averaged over an image's lines, so that whole columns (or rows) merge.
        feature: what similarity compares: the ``"hidden"`` states after the block, or the ``"keys"`` of its
            attention, those of all heads in a row.

    Raises:
        ValueError: naming the parameter, its value and what is allowed.
    """

    name = "oim"

    pairing: str = "line"
    feature: str = "hidden"

    def __post_init__(self) -> None:
        check_choice("Oim", "pairing", self.pairing, PAIRINGS)
        check_choice("Oim", "feature", self.feature, FEATURES)

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
        blocks = tokens.shape[2 if shortening.axis == "width" else 1]
        tokens, sizes, representatives, *_ = orthogonal_merge(
            tokens,
            sizes,
            representatives,
            shortening.axis,
            blocks * shortening.after // shortening.before,
            self.pairing,
            feature,
            shortening.runs,
            shortening.shortest,
        )
        return tokens, sizes, representatives
