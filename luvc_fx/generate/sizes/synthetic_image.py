"""A test image of any size, for models that have to be run before there is a real one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_SIDE = 336
"""Side of the synthetic image where neither the processor nor the config prefers one."""


def synthetic_image(model: Any, processor: Any, size: tuple[int, int] | None = None) -> Image:
    """A test image with something in it: a slope of colours and a disc.

    Args:
        size: height and width; without it the size that is expected.
    """
    from PIL import Image

    height, width = size or preferred_size(processor.image_processor, model.config)
    down = torch.linspace(0, 1, height).unsqueeze(1).expand(height, width)
    right = torch.linspace(0, 1, width).expand(height, width)
    disc = (down - 0.4) ** 2 + (right - 0.6) ** 2 < 0.06
    pixels = torch.stack([down, right, disc.float()], dim=-1).mul(255).to(torch.uint8)
    return Image.fromarray(pixels.numpy(), mode="RGB")


def preferred_size(image_processor: Any, config: Any) -> tuple[int, int]:
    """Height and width of an image that needs the least resizing."""
    crop = getattr(image_processor, "crop_size", None)
    cropped = crop if getattr(image_processor, "do_center_crop", None) else None
    vision = getattr(config, "vision_config", None)
    seen = getattr(vision, "image_size", None)
    for size in (cropped, getattr(image_processor, "size", None)):
        given = dict(size) if size else {}
        if "height" in given and "width" in given:
            return int(given["height"]), int(given["width"])
        edge = given.get("shortest_edge") or given.get("longest_edge")
        # Processors of the Qwen family write numbers of pixels there.
        if edge and "max_pixels" not in given and given.get("longest_edge", 0) < 10_000:
            return int(edge), int(edge)
    if isinstance(seen, (list, tuple)):
        return int(seen[0]), int(seen[1])
    return (int(seen), int(seen)) if seen else (DEFAULT_SIDE, DEFAULT_SIDE)
