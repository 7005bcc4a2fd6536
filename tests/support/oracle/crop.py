"""Which positions of a tile are image and which are padding, before and after merges.

LLaVA-NeXT and OneVision cut an image into tiles, put their features together to one composite, and
crop the padding that the image's shape left at both ends of one axis: `p` positions at each, as
`unpad_image` computes them from the features that nothing merged in. In a tile, the positions that
stay are its valid run [a, b) on that axis. A tile is partly padded (0 < b - a < side), wholly padded
(b = a) or not at all.

Padding never merges with image. Along the cropped axis, in a partly padded tile, only neighbours that
are both in the valid run pair, and afterwards the run is [a, b - merged): the padding stays as it is.
Rows stay rectangular, so every line of every tile loses as many tokens as the others; where the
shortest valid run v would not survive the target, i.e. target < side - v + 1, the target is raised to
that. Wholly padded tiles, tiles without padding and the whole-image tile merge freely.

The crop keeps each tile's valid run: p positions that lie in partly padded tiles stay p, and wholly
padded tiles go with the length that they then have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.image_processing_utils import select_best_resolution

from luvc_fx.schedule import Merge

Run = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """One tile and what of it survives the crop.

    Attributes:
        image: which image (or video) of the batch it belongs to.
        place: its (row, column) in the composite, or None for the whole image (frame) in one tile.
        valid: of the height and of the width, the run [a, b) of positions that stay.
        sides: positions along the height and the width, as merged so far.
    """

    image: int
    place: tuple[int, int] | None
    valid: tuple[Run, Run]
    sides: tuple[int, int]

    def partly(self, axis: int) -> Run | None:
        """The valid run along `axis` where the tile is partly padded there."""
        a, b = self.valid[axis]
        return (a, b) if 0 < b - a < self.sides[axis] else None


def _axis(merge: Merge) -> int:
    return {"height": 0, "width": 1}[merge.axis]


def crop(composite: tuple[int, int], original: tuple[int, int]) -> tuple[int, int]:
    """Positions that go at either end of a composite (height, width) of an image of `original` size."""
    high, wide = composite
    height, width = original
    if width / height > wide / high:
        return (high - int(round(height * (wide / width), 7))) // 2, 0
    return 0, (wide - int(round(width * (high / height), 7))) // 2


def tiles_of(
    image_sizes: Sequence[tuple[int, int]],
    tiled: Sequence[bool],
    pinpoints: Sequence[Sequence[int]],
    size: int,
    side: int,
) -> list[Tile]:
    """The tiles of all images in the order of the tower.

    Args:
        image_sizes: (height, width) of each image in pixels; tiled: whether it is cut into tiles.
        pinpoints: the resolutions in pixels; size: of a tile in pixels; side: in patches.
    """
    whole = ((0, side), (0, side))
    tiles = []
    for image, (original, several) in enumerate(zip(image_sizes, tiled, strict=True)):
        tiles.append(Tile(image, None, whole, (side, side)))
        if not several:
            continue
        high, wide = (edge // size for edge in select_best_resolution(original, list(pinpoints)))
        gone = crop((high * side, wide * side), original)
        runs = []  # of each axis, of each tile along it
        for count, p in zip((high, wide), gone, strict=True):
            low, top = p, count * side - p
            ends = [(max(low - t * side, 0), min(top - t * side, side)) for t in range(count)]
            runs.append([(a, b) if a < b else (0, 0) for a, b in ends])
        tiles += [
            Tile(image, (row, column), (runs[0][row], runs[1][column]), (side, side))
            for row in range(high)
            for column in range(wide)
        ]
    return tiles


def target(tiles: Sequence[Tile], merge: Merge) -> int:
    """To how many positions `merge` shortens its axis of all tiles."""
    axis = _axis(merge)
    side = tiles[0].sides[axis]
    runs = [run for tile in tiles if (run := tile.partly(axis)) is not None]
    shortest = min((b - a for a, b in runs), default=side)
    return max(merge.target(side), side - shortest + 1)


def shortened(tiles: Sequence[Tile], merge: Merge) -> list[Tile]:
    """The tiles after `merge`."""
    axis = _axis(merge)
    left = target(tiles, merge)
    out = []
    for tile in tiles:
        a, b = tile.valid[axis]
        b = max(b - (tile.sides[axis] - left), a)  # a wholly padded tile has nothing to lose
        valid, sides = list(tile.valid), list(tile.sides)
        valid[axis], sides[axis] = (a, b), left
        out.append(dataclasses.replace(tile, valid=tuple(valid), sides=tuple(sides)))
    return out


def tokens_of(tiles: Sequence[Tile], image: int) -> int:
    """The visual tokens of an image, newlines too."""
    own = [tile for tile in tiles if tile.image == image]
    base = own[0].sides[0] * own[0].sides[1]
    if len(own) == 1:
        return base + 1
    lengths = [[b - a for a, b in tile.valid] for tile in own[1:]]
    content = sum(rows * columns for rows, columns in lengths)
    newlines = sum(rows for tile, (rows, _) in zip(own[1:], lengths, strict=True) if tile.place[1] == 0)
    return base + content + newlines
