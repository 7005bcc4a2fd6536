"""Size buckets: the few image sizes that images are brought to, so that few graphs are compiled."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from luvc_fx.generate.families import family_of
from luvc_fx.generate.rgb import to_rgb
from luvc_fx.methods.checks import check_bool, check_whole, is_number, is_whole, refuse, shown

if TYPE_CHECKING:
    from PIL.Image import Image

HOW = ("resize", "pad")
GREY = (127, 127, 127)
"""Near the mean that image processors subtract, so that padding is close to zero."""


@dataclass(frozen=True, slots=True)
class SizeBuckets:
    """A set of image sizes, and the nearest of them for any image.

    A model that sees its images' sizes (grids of patches, tiles) is compiled once for each size. With
    every image brought to one of `n` buckets, prompts of one image, one row and one schedule cost at most

    - `n` vision graphs;
    - `n` + 1 prefill graphs after `luvc_fx.warmup`: the first bucket's is compiled a second time when a
      second prompt length makes the text axis symbolic, and all others are symbolic from the start.
      Without warm-up `2n`, if each bucket comes first with prompts as long as those before;
    - 4 decode graphs, whatever `n` is: for the first cache and for other lengths of it, and two more where
      a bucket is so small that nothing was dropped. (One more for each bucket so small that two layers
      keep the same number of tokens only by rounding.)

    Another number of images or rows in a prompt is another such set. `most_graphs` is that sum. An image
    processor that resizes may make the same grid of two buckets, or another grid than was meant:
    `spread` keeps to multiples of `granularity_of` the model, which those of the Qwen family leave as
    they are between their `min_pixels` and `max_pixels`.

    Attributes:
        sizes: (height, width) of each bucket in pixels, without repetition.

    >>> buckets = SizeBuckets(((336, 336), (224, 448), (448, 224)))
    >>> buckets.nearest(600, 1300)
    (224, 448)
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        sizes = checked_sizes("SizeBuckets.sizes", self.sizes)
        if len(set(sizes)) < len(sizes):
            twice = next(size for number, size in enumerate(sizes) if size in sizes[:number])
            raise ValueError(f"SizeBuckets.sizes holds {twice} twice; each bucket is named once")
        object.__setattr__(self, "sizes", sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def spread(
        cls,
        count: int,
        area: int,
        granularity: int,
        narrowest: float = 0.5,
        widest: float = 2.0,
    ) -> SizeBuckets:
        """Buckets of about the same area whose aspect ratios are evenly spread, as ratios are.

        Sides are multiples of `granularity`; what rounds to the same size is one bucket, so there may be
        fewer than `count`.

        Args:
            count: buckets asked for.
            area: pixels of a bucket; none is larger, so a processor's `max_pixels` may be given.
            granularity: see `granularity_of`.
            narrowest, widest: the smallest and largest width over height.

        Raises:
            ValueError: a number that is not allowed.

        >>> SizeBuckets.spread(3, area=336 * 336, granularity=28).sizes
        ((448, 224), (336, 336), (224, 448))
        """
        for name, value in (("count", count), ("area", area), ("granularity", granularity)):
            check_whole("", name, value, 1)
        count, area, granularity = map(operator.index, (count, area, granularity))
        if count > MOST_BUCKETS:
            refuse("", "count", count, f"at most {MOST_BUCKETS}")
        if not granularity**2 <= area <= MOST_CELLS * granularity**2:
            allowed = f"1 to {MOST_CELLS} times the granularity's square, which is {shown(granularity**2)}"
            refuse("", "area", area, allowed)
        if not (is_number(narrowest) and is_number(widest) and 0 < narrowest <= widest):
            refuse("", "narrowest, widest", (narrowest, widest), "two numbers, 0 < narrowest <= widest")
        low, high = math.log(narrowest), math.log(widest)
        steps = (
            [(low + high) / 2] if count == 1 else [low + (high - low) * i / (count - 1) for i in range(count)]
        )
        sizes = [_sides(math.exp(step), area, granularity) for step in steps]
        return cls(tuple(dict.fromkeys(sizes)))

    @staticmethod
    def granularity_of(model: Any) -> int:
        """Pixels of which this model's image sides are multiples: patch size times spatial merge size.

        Raises:
            ValueError: a model whose config does not tell (its processor cuts or resizes to one size,
                or to tiles; give the sizes yourself).

        >>> SizeBuckets.granularity_of(qwen2_vl)  # doctest: +SKIP
        28
        """
        granularity = family_of(model).granularity()
        if granularity is None:
            raise ValueError(
                f"the config of {type(model).__name__} has no vision_config with a patch_size and a "
                "spatial_merge_size; its image sides have no known granularity"
            )
        return granularity

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The bucket nearest to an image: by its aspect ratio and, at the same weight, its side length.

        The distance is Euclidean in (log (width / height), log sqrt(height * width)): an image twice as
        wide for its height is as far as one with twice the sides. Between buckets that are equally near
        (as far as doubles tell), the smaller area wins, then the smaller height.

        Raises:
            ValueError: a side that is no positive whole number.
        """
        ((height, width),) = checked_sizes("the image's size", [(height, width)])

        def distance(bucket: tuple[int, int]) -> tuple[float, int, int]:
            aspect = math.log(bucket[1] * height) - math.log(bucket[0] * width)
            side = (math.log(bucket[0] * bucket[1]) - math.log(height * width)) / 2
            # Rounded: what is equal on paper must not be decided by the last bit of a logarithm.
            return round(aspect**2 + side**2, 9), bucket[0] * bucket[1], bucket[0]

        return min(self.sizes, key=distance)

    def fit(self, image: Image, how: str = "resize", color: Any = GREY) -> Image:
        """A PIL image brought to its nearest bucket, in RGB; one that is both already is returned as it is.

        An image of another mode, or with an EXIF orientation, is brought to upright RGB before anything
        else, transparent parts on white.

        Args:
            how: ``"resize"`` to exactly that size, which changes the aspect ratio a little, or ``"pad"``:
                the largest size with the image's own ratio that fits, in the middle of `color`.
            color: of the padding, as `PIL.Image.new` takes it for RGB.

        Raises:
            ValueError: another `how`, another color, or something that is no PIL image.
        """
        from PIL import Image

        if how not in HOW:
            refuse("", "how", how, ", ".join(map(repr, HOW)))
        if not isinstance(image, Image.Image):
            refuse("", "image", image, "a PIL image")
        image = to_rgb(image)
        bucket = self.nearest(image.height, image.width)
        if (image.height, image.width) == bucket:
            return image
        bicubic = Image.Resampling.BICUBIC
        if how == "resize":
            return image.resize((bucket[1], bucket[0]), bicubic)
        scale = min(bucket[0] / image.height, bucket[1] / image.width)
        inner = [
            min(most, max(1, round(side * scale)))
            for side, most in zip((image.height, image.width), bucket, strict=True)
        ]
        try:
            canvas = Image.new("RGB", (bucket[1], bucket[0]), color)
        except (TypeError, ValueError, OverflowError):
            refuse("", "color", color, "a colour of Pillow for RGB")
        place = ((bucket[1] - inner[1]) // 2, (bucket[0] - inner[0]) // 2)
        canvas.paste(image.resize((inner[1], inner[0]), bicubic), place)
        return canvas

    def most_graphs(self, warmed: bool = True) -> int:
        """Graphs that prompts of one image and one row cost at most, with or without `luvc_fx.warmup`."""
        check_bool("", "warmed", warmed)
        count = len(self.sizes)
        return count + (count + 1 if warmed else 2 * count) + DECODE_GRAPHS


MOST_BUCKETS = 1024
"""That `SizeBuckets.spread` makes: far more than Dynamo compiles one function for."""

MOST_CELLS = 1 << 18
"""Of a bucket, in squares of the granularity, that `SizeBuckets.spread` looks through: 512 x 512."""

DECODE_GRAPHS = 4
"""Decode graphs at most, for any number of sizes; see `SizeBuckets`."""


def checked_sizes(what: str, sizes: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """`sizes` as a tuple of (height, width).

    Raises:
        ValueError: none, or one that is no pair of positive whole numbers.
    """
    pairs = []
    try:
        given = list(sizes)
    except TypeError:
        raise ValueError(f"{what} is {shown(sizes)}; allowed: (height, width) pairs") from None
    for size in given:
        pair = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else ()
        if len(pair) != 2 or not all(is_whole(side) and side >= 1 for side in pair):
            raise ValueError(
                f"{what} holds {shown(size)}; allowed: a pair (height, width) of whole numbers of at least 1"
            )
        pairs.append((int(pair[0]), int(pair[1])))
    if not pairs:
        raise ValueError(f"{what} is empty; at least one (height, width) is needed")
    return tuple(pairs)


def _sides(ratio: float, area: int, unit: int) -> tuple[int, int]:
    """Height and width in multiples of `unit`, of at most `area`, nearest to `ratio` and to `area`.

    Nearest as `SizeBuckets.nearest` has it, so transposed ratios give transposed sides.
    """
    cells = area // unit**2
    high = numpy.arange(1, cells + 1)
    candidates = []
    for rounded in (numpy.floor(high * ratio), numpy.ceil(high * ratio)):
        wide = rounded.clip(1, cells // high).astype(high.dtype)
        aspect, side = numpy.log(wide / high / ratio), numpy.log(high * wide / cells) / 2
        distance = (aspect**2 + side**2).round(9)
        first = numpy.lexsort((wide, high, -high * wide, distance))[0]
        candidates.append((distance[first], -high[first] * wide[first], int(high[first]), int(wide[first])))
    *_, height, width = min(candidates)
    return height * unit, width * unit
