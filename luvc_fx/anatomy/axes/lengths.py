"""How the length of an axis follows the token count, and what a reshape makes of it.

An axis is an ordered product of factors, outermost first: sizes that stay, and sides of the token grid
(or the count of a sequence), each times a fraction. ``view(B, H, W / 2, 2 C)`` of ``[B, H, W, C]`` gives
half the width and a constant 2 that joins the channels, whatever sizes happen to be equal. Axes that lie
one behind the other (images of other sizes in one row) are a `ConcatenatedAxes` of such products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from torch import fx

from luvc_fx.report import Reason, Refused

TOKENS, HEIGHT, WIDTH = "tokens", "height", "width"
CONSTANT = ""

Counts = Mapping[str, Any]
"""Symbol -> its size, an int or a SymInt."""


@dataclass(frozen=True, slots=True)
class Factor:
    """`scale` times the size of `symbol`; `CONSTANT` has the size 1."""

    symbol: str
    scale: Fraction = Fraction(1)

    def size(self, counts: Counts) -> Any:
        """The size for these counts, exactly: a Fraction where it does not divide."""
        if self.symbol == CONSTANT:  # beside a symbolic size only an int will do
            return int(self.scale) if self.scale.denominator == 1 else self.scale
        count = counts[self.symbol]
        if self.scale == 1:
            return count
        if not isinstance(count, int):
            return self.scale.numerator * count // self.scale.denominator
        size = self.scale * count
        return int(size) if size.denominator == 1 else size  # beside a symbolic size only an int will do

    def symbols(self) -> list[str]:
        """The symbol, or none."""
        return [] if self.symbol == CONSTANT else [self.symbol]


@dataclass(frozen=True, slots=True)
class Extent:
    """An axis of length ``rows_before + product of factors + rows_after``, the product being the tokens.

    A factor may be an axis itself (a grid with one more column, flattened). `rows_before` and `rows_after`
    are negative where rows were cut off.
    """

    factors: tuple[Any, ...]  # of Factor, Extent, ConcatenatedAxes and HalvedLength
    rows_before: int = 0
    rows_after: int = 0

    def length(self, counts: Counts) -> Any:
        """The length for these counts, an int or a SymInt.

        Raises:
            ValueError: a count that the factors do not divide.
        """
        length: Any = 1
        for factor in self.factors:
            length = length * factor.size(counts)
        if isinstance(length, Fraction):
            if length.denominator != 1:
                raise ValueError(f"{dict(counts)} do not divide into whole rows")
            length = int(length)
        return length + self.rows_before + self.rows_after

    def size(self, counts: Counts) -> Any:
        """The length, as a factor of another axis."""
        return self.length(counts)

    @property
    def splits(self) -> bool:
        """Whether a reshape may take the factors apart."""
        return (
            not self.rows_before and not self.rows_after and all(isinstance(f, Factor) for f in self.factors)
        )

    def symbols(self) -> list[str]:
        """The symbols in order, outermost first."""
        return [symbol for factor in self.factors for symbol in factor.symbols()]

    def scale_of(self, symbol: str) -> Fraction:
        """The fraction of `symbol` that this axis holds; 1 where it has none."""
        plain = (factor for factor in self.factors if isinstance(factor, Factor))
        return next((factor.scale for factor in plain if factor.symbol == symbol), Fraction(1))

    def times(self, number: int | Fraction, outer: bool) -> Extent:
        """This axis with a constant factor more, outermost or innermost."""
        constant = (Factor(CONSTANT, Fraction(number)),)
        factors = constant + self.factors if outer else self.factors + constant
        return Extent(_tidy(factors), int(self.rows_before * number), int(self.rows_after * number))

    def without_inner(self, number: int) -> Extent | None:
        """This axis without the innermost constant factor `number`, or None where it has none."""
        last = self.factors[-1] if self.factors else None
        if self.rows_before or self.rows_after or not isinstance(last, Factor) or last.symbol != CONSTANT:
            return None
        rest = last.scale / number
        if rest.denominator != 1:
            return None
        return Extent(_tidy((*self.factors[:-1], Factor(CONSTANT, rest))))


@dataclass(frozen=True, slots=True)
class ConcatenatedAxes:
    """Axes one behind the other, at least two."""

    parts: tuple[Extent, ...]

    @property
    def rows_before(self) -> int:
        """Rows in front: a row of axes has none."""
        return 0

    @property
    def splits(self) -> bool:
        """As of `Extent`."""
        return False

    def length(self, counts: Counts) -> Any:
        """As of `Extent`."""
        return sum(part.length(counts) for part in self.parts)

    def size(self, counts: Counts) -> Any:
        """The length, as a factor of another axis."""
        return self.length(counts)

    def symbols(self) -> list[str]:
        """The symbols in order, each once."""
        return list(dict.fromkeys(symbol for part in self.parts for symbol in part.symbols()))

    def times(self, number: int | Fraction, outer: bool) -> Extent:
        """This axis with a constant factor more, outermost or innermost."""
        constant = (Factor(CONSTANT, Fraction(number)),)
        return Extent((*constant, self) if outer else (self, *constant))

    def without_inner(self, number: int) -> ConcatenatedAxes | None:
        """As of `Extent`, for all of them."""
        parts = [part.without_inner(number) for part in self.parts]
        return None if None in parts else ConcatenatedAxes(tuple(part for part in parts if part is not None))


@dataclass(frozen=True, slots=True)
class HalvedLength:
    """A factor: half of an axis, rounded up, as pooling leaves it."""

    whole: Extent | ConcatenatedAxes

    def size(self, counts: Counts) -> Any:
        """The size for these counts."""
        return -(-self.whole.length(counts) // 2)

    def symbols(self) -> list[str]:
        """As of `Extent`."""
        return self.whole.symbols()


Axis = Extent | ConcatenatedAxes


def concatenated(parts: Sequence[Axis]) -> Axis:
    """`parts` one behind the other; equal neighbours become one, with a constant for their number."""
    flat: list[tuple[int, Extent]] = []
    for part in parts:
        for piece in pieces_of(part):
            if flat and flat[-1][1] == piece:
                flat[-1] = (flat[-1][0] + 1, piece)
            else:
                flat.append((1, piece))
    joined = tuple(piece.times(number, outer=True) for number, piece in flat)
    return joined[0] if len(joined) == 1 else ConcatenatedAxes(joined)


def pieces_of(axis: Axis) -> list[Extent]:
    """The parts of a row, and an outer constant taken apart: what a split may separate."""
    if isinstance(axis, ConcatenatedAxes):
        return [piece for part in axis.parts for piece in pieces_of(part)]
    first = axis.factors[0] if axis.factors else None
    if axis.rows_before or axis.rows_after or not isinstance(first, Factor) or first.symbol != CONSTANT:
        return [axis]
    return [Extent(axis.factors[1:])] * int(first.scale)


def axis_of(*symbols: str, rows_before: int = 0) -> Extent:
    """The axis that holds these symbols, each once."""
    return Extent(tuple(Factor(symbol) for symbol in symbols), rows_before)


def axis_of_blocks(count: int, sides: tuple[str, str], unit: int) -> Extent:
    """The axis of `count` grids whose patches lie block by block, `unit` x `unit` each."""
    part = Fraction(1, unit)
    grid = Extent((Factor(sides[0], part), Factor(sides[1], part)))
    return grid.times(unit * unit, outer=False).times(count, outer=True)


def _tidy(factors: Sequence[Any]) -> tuple[Any, ...]:
    """Neighbouring constants as one, ones dropped."""
    tidy: list[Any] = []
    for factor in factors:
        if _constant(factor) and tidy and _constant(tidy[-1]):
            tidy[-1] = Factor(CONSTANT, tidy[-1].scale * factor.scale)
        else:
            tidy.append(factor)
    return tuple(f for f in tidy if not _constant(f) or f.scale != 1)


def _constant(factor: object) -> bool:
    return isinstance(factor, Factor) and factor.symbol == CONSTANT


class _Piece(NamedTuple):
    """Part of an axis on its way through a reshape; `whole` holds an axis that cannot be split."""

    size: int
    factor: Factor
    whole: Axis | None = None

    @property
    def constant(self) -> bool:
        return self.whole is None and self.factor.symbol == CONSTANT


def align(
    old: tuple[int, ...],
    extents: Mapping[int, Axis],
    new: tuple[int, ...],
    counts: Counts,
    node: fx.Node,
) -> dict[int, Axis]:
    """The token axes of a reshaped value, from those of its input.

    Dimensions are matched from the left in groups of equal product, and inside a group factor by
    factor, so equal sizes cannot be mixed up.

    Args:
        counts: the sizes of the symbols in the capture.

    Raises:
        Refused: TOKEN_AXIS where the capture does not tell how another count would be reshaped.
    """
    aligned: dict[int, Axis] = {}
    for group, into in _groups(old, new):
        if any(axis in extents for axis in group):
            aligned.update(_distribute(_pieces(old, extents, group, counts), new, into, node))
    return aligned


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[range, range]]:
    """Runs of old and new axes of equal product, from the left."""
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j, left, right = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        groups.append((range(first_i, i), range(first_j, j)))
    if i < len(old) or j < len(new):
        groups.append((range(i, len(old)), range(j, len(new))))
    return groups


def _pieces(old: tuple[int, ...], extents: Mapping[int, Axis], group: range, counts: Counts) -> list[_Piece]:
    pieces: list[_Piece] = []
    for axis in group:
        extent = extents.get(axis)
        if extent is None:
            if old[axis] != 1:
                pieces.append(_Piece(old[axis], Factor(CONSTANT, Fraction(old[axis]))))
        elif isinstance(extent, ConcatenatedAxes) or not extent.splits:
            pieces.append(_Piece(old[axis], Factor(CONSTANT), extent))
        else:
            pieces += [_Piece(int(factor.size(counts)), factor) for factor in extent.factors]
    return pieces


def _distribute(pieces: list[_Piece], new: tuple[int, ...], into: range, node: fx.Node) -> dict[int, Axis]:
    """Fill the new axes with the pieces, from the left."""
    if not into:
        raise Refused(Reason.TOKEN_AXIS, "a reshape loses the token axis", node)
    taken: dict[int, list[_Piece]] = {axis: [] for axis in into}
    rest = list(pieces)
    for axis in into:
        filled = 1
        while filled < new[axis] and rest:
            piece = rest.pop(0)
            room, odd = divmod(new[axis], filled)
            if odd or (room % piece.size and piece.size % room):
                raise Refused(Reason.TOKEN_AXIS, _UNCLEAR, node)
            if room % piece.size:
                piece, inner = _split(piece, room, node)
                rest.insert(0, inner)
            taken[axis].append(piece)
            filled *= piece.size
        # A side of one lies beside the other side of its grid, and not among the channels behind.
        while rest and rest[0].size == 1 and any(not piece.constant for piece in taken[axis]):
            taken[axis].append(rest.pop(0))
    # Only pieces of size 1 are left: a count of one row. They stay where the last ones went.
    taken[into[-1]] += rest
    joined = {axis: _joined(parts, node) for axis, parts in taken.items()}
    return {axis: extent for axis, extent in joined.items() if extent is not None}


_UNCLEAR = "a reshape splits the token axis in a way that is not clear"


def _split(piece: _Piece, outer: int, node: fx.Node) -> tuple[_Piece, _Piece]:
    """`outer` of a piece, and the constant that is left inside."""
    inner = piece.size // outer
    constant = _Piece(inner, Factor(CONSTANT, Fraction(inner)))
    if piece.constant:
        return _Piece(outer, Factor(CONSTANT, Fraction(outer))), constant
    if piece.whole is not None:
        rest = piece.whole.without_inner(inner)
        if rest is None:
            raise Refused(Reason.TOKEN_AXIS, _UNCLEAR, node)
        return _Piece(outer, Factor(CONSTANT), rest), constant
    if piece.factor.symbol == TOKENS:
        raise Refused(Reason.TOKEN_AXIS, _UNCLEAR, node)
    return _Piece(outer, Factor(piece.factor.symbol, piece.factor.scale / inner)), constant


def _joined(parts: list[_Piece], node: fx.Node) -> Axis | None:
    """The axis that these pieces make up, or None where it is constant."""
    tokens = [part for part in parts if not part.constant]
    if not tokens:
        return None
    symbols = [s for part in tokens for s in (part.whole or part.factor).symbols()]
    if len(set(symbols)) < len(symbols):
        raise Refused(Reason.TOKEN_AXIS, "a reshape joins two token axes", node)
    whole = tokens[0].whole
    if len(tokens) > 1 or whole is None:
        return Extent(_tidy([part.factor if part.whole is None else part.whole for part in parts]))
    place = next(i for i, part in enumerate(parts) if part.whole is not None)
    for part in parts[place - 1 :: -1] if place else []:
        whole = whole.times(part.factor.scale, outer=True)
    for part in parts[place + 1 :]:
        whole = whole.times(part.factor.scale, outer=False)
    return whole
