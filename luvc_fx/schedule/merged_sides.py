"""How long the sides of an image's grid are behind each merge, computed before its graph runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luvc_fx.schedule.merge import Merge
    from luvc_fx.schedule.schedule import Schedule

UNCHANGED, MERGED = "=", "m"
"""What a merge does to a grid: nothing, or one of its sides gets shorter."""

Grid = tuple[int, int]


def merged_side(merge: Merge, before: int, unit: int) -> int:
    """The length of a side after a merge, in patches: whole blocks of `unit` patches merge.

    Raises:
        ValueError: this merge would make it longer.
    """
    if merge.length is None:
        return merge.target(before // unit) * unit  # a fraction is one of blocks
    return -(-merge.target(before) // unit) * unit


@dataclass(frozen=True, slots=True)
class MergedSides:
    """One grid, and what each merge of a schedule makes of it. The counterpart of `RowCounts` for merges.

    Attributes:
        grid: height and width in patches.
        sides: the length of the side that it shortens, behind each merge, in the order of the blocks.
        axes: which side that is, ``"height"`` or ``"width"``.
    """

    grid: Grid
    sides: tuple[int, ...]
    axes: tuple[str, ...]

    @classmethod
    def of(cls, schedule: Schedule, blocks: int, grid: Grid, unit: int) -> MergedSides:
        """Those of a schedule for an encoder of so many blocks, whose features are `unit` x `unit` patches.

        Raises:
            ValueError: the encoder cannot follow it, or it leaves more than there is.
        """
        sides, now = [], {"height": grid[0], "width": grid[1]}
        sites = schedule.merges_at(blocks)
        for _, merge in sites:
            now[merge.axis] = merged_side(merge, now[merge.axis], unit)
            sides.append(now[merge.axis])
        return cls(grid, tuple(sides), tuple(merge.axis for _, merge in sites))

    @property
    def form(self) -> str:
        """What each merge does, one character for each.

        >>> MergedSides((8, 12), (10, 8), ("width", "height")).form
        'm='
        """
        now, form = {"height": self.grid[0], "width": self.grid[1]}, ""
        for axis, side in zip(self.axes, self.sides, strict=True):
            form += UNCHANGED if now[axis] == side else MERGED
            now[axis] = side
        return form

    @property
    def numbers(self) -> list[int]:
        """Height and width, and the sides behind the merges that do something.

        >>> MergedSides((8, 12), (10, 8), ("width", "height")).numbers
        [8, 12, 10]
        """
        pairs = zip(self.form, self.sides, strict=True)
        return [*self.grid, *(side for kind, side in pairs if kind == MERGED)]
