"""A baseline: the same model on a smaller image, with the number of visual tokens that a schedule leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luvc_fx.generate.families import family_of
from luvc_fx.generate.rgb import to_rgb
from luvc_fx.generate.sizes.buckets import SizeBuckets

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Downsampled:
    """How to ask about a smaller image.

    Attributes:
        image: what to give to the processor.
        processing: options of that call of the processor, beside images and text.
        interpolated: whether the encoder's learned positions have to be interpolated; see `encoded`.
        tokens: visual tokens that the model then has; `of`: those of the image as it was. Of several images
            together where `downsample_all` made them.
    """

    image: Image
    processing: Mapping[str, Any] = field(default_factory=dict)
    interpolated: bool = False
    tokens: int = 0
    of: int = 0

    def encoded(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The processor's `inputs` as `model` takes them, in `forward` and in `generate`.

        Where positions are interpolated the image is encoded here, as LLaVA's `forward` (transformers 5.23)
        does not hand the option on to its encoder: `mm_encoder_outputs` then stand for `pixel_values`.
        """
        given = dict(inputs)
        if self.interpolated:
            pixels = given.pop("pixel_values")
            features = model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
            given["mm_encoder_outputs"] = {"image": features}
        return given


def downsample(model: Any, processor: Any, image: Image, budget: float) -> Downsampled:
    """A smaller image of which `model` makes `budget` of the visual tokens, as nearly as its grids allow.

    For encoders that take images of any size (Qwen2-VL) the image itself is resized, to the grid of whole
    tokens with the least sum of what it misses of the budget and of the aspect, both relative: so a budget
    may be missed for the aspect's sake. For those with one square grid of learned positions (LLaVA with CLIP)
    the processor resizes to the square whose side is nearest to that of the budget: of a grid of 16 x 16 a
    budget of 0.125 leaves 6 x 6, which is 0.141. `tokens` over `of` is the budget that was met.

    Args:
        model, processor: of transformers.
        image: of any mode and orientation; it is brought to RGB first (`to_rgb`).
        budget: in (0, 1].

    Raises:
        ValueError: for a budget that is not allowed, or a model that takes images, or tiles, of one size.
    """
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"budget is {budget!r}; allowed: a number in (0, 1]")
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    image_processor = getattr(processor, "image_processor", None)
    if vision is None or image_processor is None:
        raise ValueError(f"{type(model).__name__} and {type(processor).__name__} are for no images")
    family, image = family_of(model), to_rgb(image)
    if family.takes_any_size(image_processor):
        return _any_size(model, image_processor, image, budget)
    if family.takes_squares(image_processor):
        return _square(vision, image_processor, image, budget)
    raise ValueError(
        f"{type(model).__name__} takes images, or tiles of them, of one size only: a smaller image has as "
        "many visual tokens"
    )


def downsample_all(
    model: Any, processor: Any, images: Sequence[Image], budget: float
) -> tuple[list[Image], Downsampled]:
    """Images of one prompt made smaller, each to `budget`, and how to ask about them together.

    Arguments and errors are those of `downsample`. The processing is that of the largest image, as the
    processor would make a larger one smaller once more; `tokens` and `of` are sums.
    """
    each = [downsample(model, processor, image, budget) for image in images]
    largest = max(each, key=lambda one: one.processing["size"].get("longest_edge", 0))
    together = dataclasses.replace(
        largest, tokens=sum(one.tokens for one in each), of=sum(one.of for one in each)
    )
    return [one.image for one in each], together


def _any_size(model: Any, processor: Any, image: Image, budget: float) -> Downsampled:
    unit = SizeBuckets.granularity_of(model)
    (_, height, width), *_ = processor(images=[image], return_tensors="pt")["image_grid_thw"].tolist()
    high, wide = height // processor.merge_size, width // processor.merge_size
    low, narrow = _nearest(high, wide, budget)
    # The processor would make larger what is below its least size.
    size = {"shortest_edge": unit * unit, "longest_edge": high * wide * unit * unit}
    smaller = image.resize((narrow * unit, low * unit), resample=processor.resample)
    return Downsampled(smaller, {"size": size}, False, low * narrow, high * wide)


def _nearest(high: int, wide: int, budget: float) -> tuple[int, int]:
    """The grid that misses budget and aspect least, both together; of equals the nearer aspect."""

    def misses(grid: tuple[int, int]) -> tuple[float, float]:
        count = abs(grid[0] * grid[1] - budget * high * wide) / (budget * high * wide)
        aspect = abs(math.log(grid[0] * wide / (grid[1] * high)))
        return count + aspect, aspect

    return min(((h, w) for h in range(1, high + 1) for w in range(1, wide + 1)), key=misses)


def _square(vision: Any, processor: Any, image: Image, budget: float) -> Downsampled:
    whole = vision.image_size // vision.patch_size
    side = max(1, math.floor(whole * math.sqrt(budget) + 0.5))
    pixels = side * vision.patch_size
    square = {"height": pixels, "width": pixels}
    cropped = processor.do_center_crop
    processing = {"size": {"shortest_edge": pixels} if cropped else square, "crop_size": square}
    return Downsampled(image, processing, side < whole, side * side, whole * whole)
