"""What was inserted at one site of a graph, as data; the text for people is its `str`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["merge", "prune"]


@dataclass(frozen=True, slots=True)
class MergeStep:
    """One axis of the patch grid shortened by merging.

    Attributes:
        method: "oim" or another of the schedule's merge methods.
        axis: "width" or "height".
        before, after: length of the axis in patches. Grids of one graph that differ in size have an entry
            each, in the order of their patches; images or tiles of one size share an entry.
    """

    method: str
    axis: str
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __str__(self) -> str:
        name = self.axis if self.method == "oim" else f"{self.method}, {self.axis}"
        lengths = dict.fromkeys(zip(self.before, self.after, strict=True))
        return f"{name} " + ", ".join(f"{before} -> {after}" for before, after in lengths)


@dataclass(frozen=True, slots=True)
class Insertion:
    """What was inserted at one site: merge steps behind an encoder block, or a prune before a decoder layer.

    Attributes:
        layer: number of the encoder block (``"merge"``) or of the decoder layer (``"prune"``), from 0.
        method: the merge method of the first step, or the selector's name.
        before, after: tokens on both sides. For a merge, patches of one image or tile, None where those of
            one graph differ in size; for a prune, visual tokens of one row of the batch.
        steps: of a merge, in the order in which they run; empty for a prune.
        absorbs: of a prune, whether dropped tokens are averaged into those that stay.
    """

    kind: Kind
    layer: int
    method: str
    before: int | None
    after: int | None
    steps: tuple[MergeStep, ...] = ()
    absorbs: bool = False

    @property
    def site(self) -> str:
        """The place, as "after encoder block 2" or "before decoder layer 6"."""
        place = "after encoder block" if self.kind == "merge" else "before decoder layer"
        return f"{place} {self.layer}"

    @property
    def name(self) -> str:
        """Kind and site; inserted nodes carry it in the graph."""
        return f"{self.kind} {self.site}"

    def __str__(self) -> str:
        if self.kind == "merge":
            return f"{self.name}: {'; '.join(map(str, self.steps))}"
        rest = ", the others averaged into them" if self.absorbs else ""
        return f"{self.name}: {self.method} {self.before} -> {self.after}{rest}"
