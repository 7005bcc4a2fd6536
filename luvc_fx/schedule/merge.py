"""A merge of visual tokens inside the encoder, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luvc_fx.mergers import MERGERS, Merger
from luvc_fx.methods.checks import (
    ABOVE_ZERO,
    BELOW_ONE,
    check_choice,
    check_either,
    check_whole,
    is_whole,
    refuse,
    set_integer,
    set_number,
)
from luvc_fx.ops.oim import AXES
from luvc_fx.ops.rounding import round_half_up
from luvc_fx.schedule.places import parameter_of, resolve_layer


@dataclass(frozen=True, slots=True, init=False)
class Merge:
    """Merge visual tokens along one axis of their grid, after one encoder block.

    ``Merge("width", keep=0.75, depth=0.5, pairing="shared")`` is the same as
    ``Merge("width", keep=0.75, depth=0.5, method=Oim(pairing="shared"))``, and a parameter of the merger can
    be read from the merge itself, as ``merge.pairing``.

    Args:
        axis: ``"width"`` or ``"height"``: the axis that gets shorter.
        keep: fraction of that axis, as it then is, that is left; in (0, 1]. Or `length`.
        length: number of positions left on that axis, at least 1.
        layer: the encoder block after which tokens merge; negative counts from the end. Or `depth`.
        depth: fraction in (0, 1) of the encoder blocks that run before the merge.
        method: how tokens merge: the name of a merger, ``"oim"`` or ``"tome"`` (one file each in
            `luvc_fx.mergers`), or a merger. As an attribute it is the merger; ``merge.method.name`` its name.
        parameters: of the merger: `pairing` and `feature` of `luvc_fx.mergers.oim.Oim`, `feature` of
            `luvc_fx.mergers.tome.Tome`.

    Raises:
        ValueError: naming the field, its value and what is allowed; for a parameter that the merger does not
            have, too.
    """

    axis: str
    keep: float | None
    length: int | None
    layer: int | None
    depth: float | None
    method: Merger

    def __init__(
        self,
        axis: str,
        keep: float | None = None,
        length: int | None = None,
        layer: int | None = None,
        depth: float | None = None,
        *,
        method: str | Merger = "oim",
        **parameters: Any,
    ) -> None:
        given = {"axis": axis, "keep": keep, "length": length, "layer": layer, "depth": depth}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        check_choice("Merge", "axis", axis, AXES)
        object.__setattr__(self, "method", MERGERS.make("Merge", "method", method, parameters))
        check_either("Merge", ("keep", keep), ("length", length))
        check_either("Merge", ("layer", layer), ("depth", depth))
        set_number(self, "keep", ABOVE_ZERO, 1.0, "a number in (0, 1]", optional=True)
        set_number(self, "depth", ABOVE_ZERO, BELOW_ONE, "a number in (0, 1)", optional=True)
        set_integer(self, "length", 1, "a whole number of at least 1", optional=True)
        set_integer(self, "layer", -(1 << 31), "a whole number", optional=True)

    def __getattr__(self, name: str) -> Any:
        return parameter_of(self, "method", name)

    def block(self, blocks: int) -> int:
        """The index of the encoder block after which this merge happens, out of `blocks`.

        Raises:
            ValueError: there is no such block.
        """
        check_whole("Merge", "blocks", blocks, 1)
        if self.layer is not None:
            return resolve_layer("Merge", self.layer, blocks, "encoder blocks")
        assert self.depth is not None
        return min(max(round_half_up(self.depth * blocks) - 1, 0), blocks - 1)

    def target(self, length: int) -> int:
        """The length of the axis after the merge, when it is `length` before it.

        Raises:
            ValueError: this merge would make it longer.
        """
        if not is_whole(length):
            refuse("Merge", "length", length, "a whole number")
        if self.length is None:
            assert self.keep is not None
            return max(1, round_half_up(self.keep * length))
        if self.length > length:
            refuse("Merge", "length", self.length, f"at most {length}, the {self.axis} of the grid there")
        return self.length
