"""Packings by hand: what is padding, where patches went, and which separators are left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.anatomy.tiles import Packing
from luvc_fx.anatomy.token_origins import SEPARATOR


def lines(height: int, width: int, first: int = 0) -> list[int]:
    """The patches of a grid line by line, a separator behind each line."""
    return [n for y in range(height) for n in [*range(first + y * width, first + (y + 1) * width), SEPARATOR]]


def cropped(rows: tuple[int, int], columns: tuple[int, int], width: int, first: int = 0) -> list[int]:
    return [first + y * width + x for y in range(*rows) for x in range(*columns)]


def test_runs_are_the_places_that_became_features() -> None:
    packing = Packing(tuple(range(12)), tiles=1, grid=(3, 4))
    assert packing.runs(0) == [(0, 3)] and packing.runs(1) == [(0, 4)]
    numbers = [*cropped((0, 4), (0, 4), 4), *cropped((1, 4), (0, 4), 4, 16), SEPARATOR]
    numbers += cropped((0, 4), (1, 3), 4, 32)
    packing = Packing(tuple(numbers), tiles=3, grid=(4, 4))
    assert packing.runs(0) == [(0, 4), (1, 4), (0, 4)]
    assert packing.runs(1) == [(0, 4), (0, 4), (1, 3)]


def test_a_tile_of_padding_has_no_run() -> None:
    packing = Packing(tuple(range(4)), tiles=2, grid=(2, 2))
    assert packing.runs(0) is None and packing.runs(1) is None
    assert packing.firsts() == [0, 0]


def test_places_and_firsts() -> None:
    """Two tiles of two lines, the second one first; of the first only the lower line is there."""
    packing = Packing((4, 5, SEPARATOR, 6, 7, SEPARATOR, 2, 3, SEPARATOR), tiles=2, grid=(2, 2))
    assert packing.places() == [0, 0, 6, 7, 0, 1, 3, 4]
    assert packing.firsts() == [6, 0]


@pytest.mark.parametrize(
    ("height", "left", "numbers"),
    [
        (4, 4, [0, 1, 2, 3]),
        (4, 2, [1, 3]),
        (4, 3, [0, 1, 3]),
        (4, 1, [3]),
        (5, 3, [0, 2, 4]),
        (6, 4, [0, 2, 3, 5]),
        (7, 2, [2, 6]),
    ],
)
def test_separators_keep_the_last_of_their_share(height: int, left: int, numbers: list[int]) -> None:
    packing = Packing(tuple(lines(height, 3)), tiles=1, grid=(height, 3))
    merged = lines(left, 3)
    found = packing.separators(merged, left * 3)
    assert [found[place] for place in range(3, len(merged), 4)] == [4 * n + 3 for n in numbers]
    assert all(found[place] == -1 for place, number in enumerate(merged) if number != SEPARATOR)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.data())
def test_shares_are_even(heights: list[int], data: st.DataObject) -> None:
    """Of each tile its own, in order, the last for the last, and none stands for two more than another."""
    tallest = max(heights)
    left = [data.draw(st.integers(1, height)) for height in heights]
    before = [n for tile, h in enumerate(heights) for n in lines(h, 2, tile * tallest * 2)]
    after = [n for tile, h in enumerate(left) for n in lines(h, 2, tile * max(left) * 2)]
    packing = Packing(tuple(before), len(heights), (tallest, 2))
    found = packing.separators(after, max(left) * 2)
    places = [found[place] for place, number in enumerate(after) if number == SEPARATOR]
    assert all(before[place] == SEPARATOR for place in places)
    start = 0
    for tile, (height, remaining) in enumerate(zip(heights, left, strict=True)):
        first = 3 * sum(heights[:tile])
        own = [(place - first - 2) // 3 for place in places[start : start + remaining]]
        assert own == sorted(set(own)) and own[-1] == height - 1
        shares = [b - a for a, b in zip([-1, *own], own, strict=False)]
        assert max(shares) - min(shares) <= 1 and sum(shares) == height
        start += remaining


def test_separators_of_tiles_side_by_side_belong_to_the_last_of_them() -> None:
    side = [0, 1, 8, 9, SEPARATOR, 2, 3, 10, 11, SEPARATOR, 4, 5, 12, 13, SEPARATOR, 6, 7, 14, 15, SEPARATOR]
    packing = Packing(tuple(side), tiles=2, grid=(4, 2))
    merged = [0, 1, 4, 5, SEPARATOR, 2, 3, 6, 7, SEPARATOR]
    found = packing.separators(merged, 4)
    assert (found[4], found[9]) == (9, 19)
