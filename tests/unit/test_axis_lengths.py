"""Axes as products and rows of token counts: lengths, normal forms, and what reshapes make of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import fx

from luvc_fx.anatomy.axes.lengths import (
    CONSTANT,
    HEIGHT,
    TOKENS,
    WIDTH,
    Axis,
    ConcatenatedAxes,
    Extent,
    Factor,
    align,
    axis_of,
    axis_of_blocks,
    concatenated,
    pieces_of,
)
from luvc_fx.report import Reason, Refused

NODE = fx.Graph().placeholder("x")
GRID = axis_of(HEIGHT, WIDTH)
SIDES = ("height 4x6", "width 4x6")
OTHERS = ("height 2x8", "width 2x8")
COUNTS = dict(zip((*SIDES, *OTHERS, HEIGHT, WIDTH, TOKENS), (4, 6, 2, 8, 3, 5, 7), strict=True))


def number(size: int) -> Factor:
    return Factor(CONSTANT, Fraction(size))


FRAMES = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([SIDES, OTHERS])), min_size=1, max_size=4)
BIGGER = st.tuples(*[st.integers(1, 5)] * 4).map(
    lambda sizes: dict(zip((*SIDES, *OTHERS), (2 * size for size in sizes), strict=True))
)
"""Other counts of the sides, of whole blocks of 2 x 2."""


def packed(frames: list[tuple[int, tuple[str, str]]], unit: int = 2) -> Axis:
    return concatenated([axis_of_blocks(count, sides, unit) for count, sides in frames])


# ------------------------------------------------------------------------------------------- lengths


def test_a_length_is_rows_in_front_tokens_and_rows_behind() -> None:
    assert axis_of(TOKENS).length(COUNTS) == 7
    assert axis_of(HEIGHT, WIDTH, rows_before=1).length(COUNTS) == 16
    assert Extent((Factor(HEIGHT), number(4)), rows_before=-2, rows_after=3).length(COUNTS) == 13
    assert Extent((Factor(SIDES[1], Fraction(1, 2)), number(2))).length(COUNTS) == 6
    assert Extent(()).length(COUNTS) == 1


def test_a_factor_may_be_an_axis() -> None:
    """Lines with a separator behind each: height times (width + 1)."""
    lines = Extent((Factor(HEIGHT), Extent((Factor(WIDTH),), rows_after=1)))
    assert lines.length(COUNTS) == 3 * 6
    assert lines.symbols() == [HEIGHT, WIDTH]
    assert not lines.splits
    assert axis_of(HEIGHT, WIDTH).splits and not axis_of(HEIGHT, WIDTH, rows_before=1).splits
    cropped = Extent((lines, number(2)), rows_before=-1, rows_after=-1)
    assert cropped.length(COUNTS) == 34


def test_a_row_is_as_long_as_its_parts() -> None:
    row = ConcatenatedAxes((axis_of(TOKENS), axis_of(HEIGHT, WIDTH), axis_of(HEIGHT, rows_before=2)))
    assert row.length(COUNTS) == 7 + 15 + 5
    assert row.symbols() == [TOKENS, HEIGHT, WIDTH]
    assert (row.splits, row.rows_before) == (False, 0)
    assert row.times(3, outer=True) == Extent((number(3), row))
    assert row.times(3, outer=False).length(COUNTS) == 3 * 27
    assert Extent((row,), rows_before=1, rows_after=4).length(COUNTS) == 32


def test_sides_that_do_not_divide_raise() -> None:
    halves = axis_of_blocks(1, (HEIGHT, WIDTH), 2).without_inner(4)
    assert halves is not None and halves.length({HEIGHT: 4, WIDTH: 6}) == 6
    with pytest.raises(ValueError, match="do not divide"):
        halves.length({HEIGHT: 3, WIDTH: 6})
    assert halves.length({HEIGHT: 3, WIDTH: 4}) == 3, "only the product has to be whole"


@given(FRAMES, BIGGER, st.sampled_from([1, 2]))
def test_blocks_hold_all_patches(
    frames: list[tuple[int, tuple[str, str]]], counts: dict[str, int], unit: int
) -> None:
    axis = packed(frames, unit)
    patches = sum(count * counts[sides[0]] * counts[sides[1]] for count, sides in frames)
    assert axis.length(counts) == patches
    features = axis.without_inner(unit * unit) if unit > 1 else axis
    assert features is not None and features.length(counts) == patches // unit**2
    assert axis.without_inner(3) is None


def test_blocks_exactly() -> None:
    halves = tuple(Factor(side, Fraction(1, 2)) for side in SIDES)
    assert axis_of_blocks(3, SIDES, 2) == Extent((number(3), *halves, number(4)))
    assert axis_of_blocks(1, SIDES, 2) == Extent((*halves, number(4)))
    assert axis_of_blocks(1, SIDES, 1) == axis_of(*SIDES)


# -------------------------------------------------------------------------------------- normal forms


def test_constants_beside_each_other_are_one() -> None:
    assert GRID.times(2, outer=True).times(3, outer=True) == Extent((number(6), *GRID.factors))
    assert GRID.times(2, outer=False).times(1, outer=True) == Extent((*GRID.factors, number(2)))
    assert GRID.times(2, outer=True).times(3, outer=False) == Extent((number(2), *GRID.factors, number(3)))
    led = Extent(GRID.factors, rows_before=1, rows_after=-2)
    assert led.times(3, outer=True) == Extent((number(3), *GRID.factors), rows_before=3, rows_after=-6)


@pytest.mark.parametrize("outer", [False, True])
@given(st.integers(1, 4), st.integers(-2, 2), st.integers(-2, 2))
def test_times_multiplies_the_length(outer: bool, by: int, rows_before: int, rows_after: int) -> None:
    for axis in (
        GRID,
        Extent(GRID.factors, rows_before, rows_after),
        ConcatenatedAxes((GRID, axis_of(TOKENS))),
    ):
        assert axis.times(by, outer).length(COUNTS) == by * axis.length(COUNTS)


def test_without_inner_takes_an_innermost_constant_only() -> None:
    twelve = GRID.times(12, outer=False)
    assert twelve.without_inner(4) == GRID.times(3, outer=False)
    assert twelve.without_inner(12) == GRID
    assert twelve.without_inner(5) is None
    assert GRID.times(12, outer=True).without_inner(4) is None
    assert GRID.without_inner(5) is None, "the width may be 5 now, but need not stay so"
    assert Extent(twelve.factors, rows_before=12).without_inner(4) is None
    assert Extent(()).without_inner(2) is None
    assert Extent((twelve,)).without_inner(4) is None, "a nested axis is not looked into"
    row = ConcatenatedAxes((twelve, axis_of(TOKENS).times(4, outer=False)))
    assert row.without_inner(4) == ConcatenatedAxes((GRID.times(3, outer=False), axis_of(TOKENS)))
    assert row.without_inner(12) is None


def test_pieces_are_what_a_split_may_separate() -> None:
    frame, other = axis_of(*SIDES), axis_of(*OTHERS)
    assert pieces_of(frame) == [frame]
    assert pieces_of(frame.times(3, outer=True)) == [frame] * 3
    assert pieces_of(frame.times(3, outer=False)) == [frame.times(3, outer=False)]
    led = Extent(frame.times(3, outer=True).factors, rows_before=1)
    assert pieces_of(led) == [led]
    row = ConcatenatedAxes((frame.times(2, outer=True), other))
    assert pieces_of(row) == [frame, frame, other]
    assert pieces_of(row.times(2, outer=True)) == [Extent((row,))] * 2


def test_equal_neighbours_become_one() -> None:
    frame, other = axis_of(*SIDES), axis_of(*OTHERS)
    assert concatenated([frame]) == frame
    assert concatenated([frame, frame.times(2, outer=True)]) == frame.times(3, outer=True)
    assert concatenated([frame, other, frame]) == ConcatenatedAxes((frame, other, frame))
    assert concatenated([frame, ConcatenatedAxes((frame, other)), other]) == ConcatenatedAxes(
        (frame.times(2, outer=True), other.times(2, outer=True))
    )
    lead = Extent(frame.factors, rows_before=1)
    assert concatenated([lead, lead]) == Extent((number(2), *frame.factors), rows_before=2)


@given(FRAMES, FRAMES, BIGGER)
def test_rows_have_one_form(
    front: list[tuple[int, tuple[str, str]]], back: list[tuple[int, tuple[str, str]]], counts: dict[str, int]
) -> None:
    whole = packed([*front, *back])
    assert concatenated([packed(front), packed(back)]) == whole
    assert concatenated([whole]) == concatenated(pieces_of(whole)) == whole
    pieces = pieces_of(whole)
    assert len(pieces) == sum(count for count, _ in (*front, *back))
    assert sum(piece.length(counts) for piece in pieces) == whole.length(counts)
    one_by_one = [(1, sides) for count, sides in (*front, *back) for _ in range(count)]
    assert packed(one_by_one) == whole


# ---------------------------------------------------------------------------------------- reshaping

Sizes = tuple[int, ...]
Reshape = Callable[[int, int], Sizes]
"""``(length of the token axis, channels) -> sizes``."""

RESHAPES: dict[str, Reshape] = {
    "as it is": lambda n, c: (n, c),
    "heads": lambda n, c: (n, 2, c // 2),
    "three heads of qkv": lambda n, c: (n, 3, c // 3),
    "ones": lambda n, c: (1, n, 1, c),
    "blocks to the channels": lambda n, c: (n // 4, 4 * c),
    "blocks": lambda n, c: (n // 4, 4, c),
    "half blocks": lambda n, c: (n // 2, 2, c),
    "rows and columns of blocks": lambda n, c: (n // 4, 2, 2, c),
    "with the channels": lambda n, c: (n * c,),
}


@given(FRAMES, BIGGER, st.sampled_from(sorted(RESHAPES)), st.sampled_from([6, 12]), st.booleans())
def test_reshapes_of_packed_patches(
    frames: list[tuple[int, tuple[str, str]]], counts: dict[str, int], name: str, channels: int, lone: bool
) -> None:
    """What is found on one image's sizes gives, for others, the sizes that the reshape means there."""
    axis, reshape = packed(frames), RESHAPES[name]
    length = axis.length(COUNTS)
    front = (1,) if lone else ()
    old, new = (*front, length, channels), (*front, *reshape(length, channels))
    found = align(old, {len(front): axis}, new, COUNTS, NODE)
    other = axis.length(counts)
    want = (*front, *reshape(other, channels))
    sizes = [found[i].length(counts) if i in found else size for i, size in enumerate(new)]
    labels = torch.arange(other).repeat_interleave(channels).reshape(*front, other, channels)
    assert tuple(labels.reshape(sizes).shape) == want


@given(FRAMES, BIGGER, st.lists(st.sampled_from(sorted(RESHAPES)), min_size=2, max_size=4))
def test_reshapes_one_after_the_other(
    frames: list[tuple[int, tuple[str, str]]], counts: dict[str, int], names: list[str]
) -> None:
    """Each from the last one's axes; a way back may be refused, but what is found is right."""
    axis, channels = packed(frames), 12
    lengths = axis.length(COUNTS), axis.length(counts)
    old: Sizes = (lengths[0], channels)
    found: dict[int, Axis] = {0: axis}
    for name in names:
        new, want = (RESHAPES[name](length, channels) for length in lengths)
        try:
            found = align(old, found, new, COUNTS, NODE)
        except Refused as refused:
            assert refused.refusal.reason is Reason.TOKEN_AXIS
            return
        assert [found[i].length(counts) if i in found else size for i, size in enumerate(new)] == list(want)
        old = new


def test_a_side_of_one_stays_beside_the_other() -> None:
    """An image that is one block wide, whose blocks go to the channels."""
    axis = axis_of_blocks(1, SIDES, 2)
    narrow = dict(zip(SIDES, (8, 2), strict=True))
    halves = axis.without_inner(4)
    assert align((16, 8), {0: axis}, (4, 32), narrow, NODE) == {0: halves}
    assert align((16, 8), {0: axis}, (16, 2, 4), narrow, NODE) == {0: axis}


def test_a_row_is_split_at_its_blocks_only() -> None:
    axis = packed([(2, SIDES), (1, OTHERS)])
    length = axis.length(COUNTS)
    assert length == 64
    fourth = align((length, 8), {0: axis}, (length // 4, 32), COUNTS, NODE)
    assert fourth == {0: axis.without_inner(4)}
    for new in ((length // 8, 64), (4, 16, 8), (2, 32, 8)):
        with pytest.raises(Refused) as caught:
            align((length, 8), {0: axis}, new, COUNTS, NODE)
        assert "splits the token axis" in caught.value.refusal.text


def test_images_of_a_batch_and_a_row_of_grids() -> None:
    """A constant in front goes around the whole row: all images of the first element come first."""
    axis = packed([(1, SIDES), (1, OTHERS)])
    length = axis.length(COUNTS)
    (found,) = align((3, length, 8), {1: axis}, (3 * length, 8), COUNTS, NODE).values()
    assert found == Extent((number(3), axis))
    with pytest.raises(Refused):
        align((3 * length, 8), {0: found}, (3, length, 8), COUNTS, NODE)


def test_lines_with_separators() -> None:
    """`[H, W + 1, C]` becomes rows and nothing takes it apart again."""
    lines: dict[int, Axis] = {0: axis_of(HEIGHT), 1: Extent((Factor(WIDTH),), rows_after=1)}
    found = align((3, 6, 8), lines, (18, 8), COUNTS, NODE)
    assert found == {0: Extent((Factor(HEIGHT), Extent((Factor(WIDTH),), rows_after=1)))}
    assert found[0].length({HEIGHT: 2, WIDTH: 9}) == 20
    with pytest.raises(Refused):
        align((18, 8), found, (3, 6, 8), COUNTS, NODE)
    # Beside them any axis may be reshaped.
    assert align((18, 8), found, (1, 18, 2, 4), COUNTS, NODE) == {1: found[0]}


@given(st.integers(1, 3), st.integers(-2, 2), st.integers(0, 2), st.integers(3, 9), st.integers(3, 9))
def test_rows_around_the_tokens_go_along(
    batch: int, rows_before: int, rows_after: int, old: int, new: int
) -> None:
    """An axis with rows in front and behind, flattened with the batch, for another count."""
    axis = Extent((Factor(TOKENS),), rows_before, rows_after)
    size, other = axis.length({TOKENS: old}), axis.length({TOKENS: new})
    assume(size > 1)  # one row has no place of its own
    found = align((batch, size, 4), {1: axis}, (batch * size, 2, 2), {TOKENS: old}, NODE)
    assert {i: extent.length({TOKENS: new}) for i, extent in found.items()} == {0: batch * other}


@given(
    st.lists(st.sampled_from([2, 2, 3, 4]), min_size=1, max_size=3),
    st.lists(st.sampled_from([1, 2, 3]), max_size=3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_a_grid_in_any_company(front: Sizes, back: Sizes, sides: Sizes, others: Sizes) -> None:
    """Constants of any sizes, equal ones too, around a grid that is opened and closed."""
    front, back = tuple(front), tuple(back)
    counts, other = ({HEIGHT: side[0], WIDTH: side[1]} for side in (sides, others))

    def flat(c: dict[str, int]) -> Sizes:
        return (*front, c[HEIGHT] * c[WIDTH], *back)

    def open_(c: dict[str, int]) -> Sizes:
        return (*front, c[HEIGHT], c[WIDTH], *back)

    def closed(c: dict[str, int]) -> Sizes:
        return (math.prod(flat(c)[: len(front) + 1]), *back)

    found: dict[int, Axis] = {len(front): GRID}
    for before, after in ((flat, open_), (open_, flat), (flat, closed)):
        try:
            found = align(before(counts), found, after(counts), counts, NODE)
        except Refused:
            # Sizes of one may belong to either side; another grid tells.
            assert 1 in (*sides, *front, *back)
            return
        lengths = [found[i].length(other) if i in found else n for i, n in enumerate(after(counts))]
        if 1 not in sides:
            assert tuple(lengths) == after(other)
