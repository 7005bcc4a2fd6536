"""Any PIL image as plain RGB: upright, opaque, and with its own range of values brought to eight bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND = (255, 255, 255)
"""What shows through the transparent parts of an image: white, as of paper."""

OPAQUE = 255
SIXTEEN_BITS = 65535.0

Say = Callable[[str], None]
"""Takes one line about something that was done to an image and that its owner may not expect."""


def to_rgb(image: Image, say: Say = lambda _: None) -> Image:
    """`image` in RGB; itself, if it is upright, opaque RGB already.

    - Its EXIF orientation is applied.
    - Gray of 16 bits is scaled from 0 to 65535, and floats that are all in [0, 1] from there. Other floats,
      and whole numbers of 32 bits, are scaled from the least to the greatest of the image: nothing in it
      says what they are counted in. What is not finite is the least, or for plus infinity the greatest.
    - Transparent parts are composed on `BACKGROUND`.
    - All other modes (one bit, palette, CMYK, YCbCr, LAB ...) are converted as Pillow does.

    Args:
        say: called for values scaled from the least to the greatest, and for transparent parts.

    Raises:
        OSError, ValueError, SyntaxError: an image that Pillow cannot decode to the end, or convert.
    """
    from PIL import ExifTags, Image, ImageOps

    # Pillow opens these two formats' 16 bits as "I", depending on its version, which is else 32 bits.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    upright = ImageOps.exif_transpose(image)
    if sixteen or image.mode in ("I", "F"):
        upright = _eight_bits(upright, sixteen, say)
    if upright.has_transparency_data:
        # There is no other way from premultiplied gray.
        layer = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
        if layer.getchannel("A").getextrema() != (OPAQUE, OPAQUE):
            say("transparent parts are composed on white")
        return Image.alpha_composite(Image.new("RGBA", layer.size, BACKGROUND), layer).convert("RGB")
    upright_already = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image if image.mode == "RGB" and upright_already else upright.convert("RGB")


def _eight_bits(image: Image, sixteen: bool, say: Say) -> Image:
    """A gray image of more bits as ``"L"``; as ``"LA"`` where one of its values stands for transparency."""
    import numpy
    from PIL import Image

    values = numpy.asarray(image)
    finite = values[numpy.isfinite(values)]
    if not finite.size:
        raise ValueError("none of its values is finite")
    low, high = float(finite.min()), float(finite.max())
    if sixteen:
        low, high = 0.0, SIXTEEN_BITS
    elif image.mode == "F" and low >= 0.0 and high <= 1.0:
        low, high = 0.0, 1.0
    else:
        say(f"values from {low:g} to {high:g} are scaled to black and white")
    known = numpy.nan_to_num(values.astype(numpy.float64), nan=low, posinf=high, neginf=low)
    share = (known - low) / ((high - low) or 1.0)
    gray = Image.fromarray(numpy.rint(share.clip(0.0, 1.0) * OPAQUE).astype(numpy.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        gray.putalpha(Image.fromarray(numpy.where(values == transparent, 0, OPAQUE).astype(numpy.uint8)))
    return gray
