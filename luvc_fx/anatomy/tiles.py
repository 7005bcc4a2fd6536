"""Image features that are not plain grids: tiles that a model lays out, crops and separates by rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luvc_fx.anatomy.token_origins import SEPARATOR


@dataclass(frozen=True, slots=True)
class Packing:
    """Which patch each feature is, as captured.

    Attributes:
        numbers: per feature ``tile * height * width + patch``, or `SEPARATOR` for a row that no patch became.
        tiles: how many; grid: height and width of each, in patches.
        pooled: whether a feature is made of several patches; its number is that of the first.
    """

    numbers: tuple[int, ...]
    tiles: int
    grid: tuple[int, int]
    pooled: bool = False

    def runs(self, along: int) -> list[tuple[int, int]] | None:
        """Per tile the first and last + 1 of the places on axis 0 (height) or 1 (width) that are no padding.

        None where a tile is nothing but padding.
        """
        if self.pooled:
            return [(0, self.grid[along])] * self.tiles
        height, width = self.grid
        seen: list[set[int]] = [set() for _ in range(self.tiles)]
        for number in self.numbers:
            if number != SEPARATOR:
                tile, patch = divmod(number, height * width)
                seen[tile].add(patch // width if along == 0 else patch % width)
        if not all(seen):
            return None
        return [(min(places), max(places) + 1) for places in seen]

    def places(self) -> list[int]:
        """Per patch of all tiles the feature that it became, 0 for padding."""
        feature_of = [0] * (self.tiles * self.grid[0] * self.grid[1])
        for place, number in enumerate(self.numbers):
            if number != SEPARATOR:
                feature_of[number] = place
        return feature_of

    def firsts(self) -> list[int]:
        """Per tile the first feature that is one of its patches."""
        size = self.grid[0] * self.grid[1]
        first_of: dict[int, int] = {}
        for place, number in enumerate(self.numbers):
            if number != SEPARATOR:
                first_of.setdefault(number // size, place)
        return [first_of.get(tile, 0) for tile in range(self.tiles)]

    def separators(self, numbers: Sequence[int], per_tile: int) -> list[int]:
        """Per row of the features after a merge the captured separator that it stands for, or -1.

        Separators end the lines of a row of tiles. Of n' that are left of n there the j-th takes the
        place of the last in its share, number floor((j + 1) n / n') - 1.

        Args:
            numbers: as `Packing.numbers`, of the merged features; per_tile: tokens of a merged tile.
        """
        before = _by_tile(self.numbers, self.grid[0] * self.grid[1])
        stands_for = [-1] * len(numbers)
        for tile, places in _by_tile(numbers, per_tile).items():
            old = before[tile]
            for j, place in enumerate(places):
                stands_for[place] = old[(j + 1) * len(old) // len(places) - 1]
        return stands_for

    def shares(self, numbers: Sequence[int], merged: tuple[int, int]) -> list[int]:
        """Per pooled feature after a merge, the captured one whose place it takes; separators as above.

        No pooled feature is one token, so none represents it: the n' lines (and the n' columns) that are
        left of n of a tile take places at even distance, the i-th that of floor((2 i + 1) n / 2 n').

        Args:
            numbers: as `Packing.numbers`, of the merged features; merged: the grid of a merged tile.
        """
        before, after = _grids(self.numbers, self.grid), _grids(numbers, merged)
        stands_for = self.separators(numbers, merged[0] * merged[1])
        for tile, lines in after.items():
            old = before[tile]
            for i, line in enumerate(lines):
                source = old[(2 * i + 1) * len(old) // (2 * len(lines))]
                for j, place in enumerate(line):
                    stands_for[place] = source[(2 * j + 1) * len(source) // (2 * len(line))]
        return stands_for


def _grids(numbers: Sequence[int], grid: tuple[int, int]) -> dict[int, list[list[int]]]:
    """Per tile its lines of features, as places in `numbers`."""
    lines_of: dict[int, dict[int, list[int]]] = {}
    for place, number in enumerate(numbers):
        if number != SEPARATOR:
            tile, patch = divmod(number, grid[0] * grid[1])
            lines_of.setdefault(tile, {}).setdefault(patch // grid[1], []).append(place)
    return {tile: list(lines.values()) for tile, lines in lines_of.items()}


def _by_tile(numbers: Sequence[int], per_tile: int) -> dict[int, list[int]]:
    """Where the separators are, by the tile of the token before each."""
    separators_of: dict[int, list[int]] = {}
    tile = 0
    for place, number in enumerate(numbers):
        if number != SEPARATOR:
            tile = number // per_tile
        else:
            separators_of.setdefault(tile, []).append(place)
    return separators_of
