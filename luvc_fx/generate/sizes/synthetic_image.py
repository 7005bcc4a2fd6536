"""A test image of any size, for models that have to be run before there is a real one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from luvc_fx.generate.families import family_of

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_SIDE = 336
"""Side of the synthetic image where neither the processor nor the config prefers one."""


def synthetic_image(model: Any, processor: Any, size: tuple[int, int] | None = None) -> Image:
    """A test image with something in it: a slope of colours and a disc.

    Args:
        size: height and width; without it the size that the model is made for.
    """
    from PIL import Image

    if size is None:
        size = family_of(model).preferred_size(processor.image_processor)
    height, width = size or (DEFAULT_SIDE, DEFAULT_SIDE)
    down = torch.linspace(0, 1, height, dtype=torch.float32).unsqueeze(1).expand(height, width)
    right = torch.linspace(0, 1, width, dtype=torch.float32).expand(height, width)
    disc = (down - 0.4) ** 2 + (right - 0.6) ** 2 < 0.06
    pixels = torch.stack([down, right, disc.float()], dim=-1).mul(255).to(torch.uint8)
    return Image.fromarray(pixels.numpy(), mode="RGB")
