"""How many rows a prompt has behind each prune, computed before its graph runs and given to it as sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luvc_fx.schedule.schedule import Schedule

UNCHANGED, PRUNED, EMPTIED = "=", "p", "0"
"""What a prune does to a prompt: nothing, or some of its visual tokens go, or the last of them."""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """The visual tokens of one row of a prompt, and how many each prune leaves.

    Which of them prune at all is the form of a graph; the numbers are not, so that prompts of many sizes,
    and schedules that keep other shares before the same layers, run through one graph.

    Attributes:
        visual: visual tokens at the fusion.
        kept: how many are left behind each prune, in the order of the layers.
        grid: height and width of each image's tokens at the fusion, None where it is not known.
    """

    visual: int
    kept: tuple[int, ...]
    grid: tuple[int, int] | None = None

    @classmethod
    def of(cls, schedule: Schedule, layers: int, visual: int, grid: tuple[int, int] | None) -> RowCounts:
        """Those of a schedule for a decoder of so many layers.

        Raises:
            ValueError: the model cannot follow it, or it keeps more tokens than there are.
        """
        sites = schedule.prunes_at(layers, visual)
        return cls(visual, tuple(prune.count(visual) for _, prune in sites), grid)

    @property
    def form(self) -> str:
        """What each prune does, one character for each.

        >>> RowCounts(64, (64, 32, 0)).form
        '=p0'
        """
        before = (self.visual, *self.kept)
        pairs = zip(before, self.kept, strict=False)
        return "".join(UNCHANGED if new == old else PRUNED if new else EMPTIED for old, new in pairs)

    def numbers(self, rows: int) -> list[int]:
        """What `read_numbers` reads, for a prompt of so many rows.

        >>> RowCounts(64, (64, 32, 0), (8, 8)).numbers(100)
        [64, 8, 8, 32, 68, 36]
        """
        numbers = [self.visual, *(self.grid or (0, 0))]
        for kind, count in zip(self.form, self.kept, strict=True):
            if kind == PRUNED:
                numbers.append(count)
            if kind != UNCHANGED:
                numbers.append(rows - self.visual + count)
        return numbers
