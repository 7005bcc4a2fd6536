"""The frames of a prompt as the encoder saw them, made of the pixels that it was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luvc_fx.apps.picture.recording import Vision

CHANNELS = 3


def frames_of(vision: Vision, model: Any, processor: Any) -> list[Tensor]:
    """Uint8 ``[height, width, 3]`` per frame of `vision.layout`.

    Of frames that a packed encoder takes together (two of a video) the first is shown.

    Args:
        processor: whose mean and standard deviation are undone; None: the values are stretched from black to
            white.

    Raises:
        ValueError: pixels that are not laid out as those of the families that we know.
    """
    pixels = vision.pixels.float().cpu()
    if pixels.dim() == 4 and pixels.shape[1] == CHANNELS:
        images = list(pixels)
    elif pixels.dim() == 2:
        images = _unpacked(pixels, vision, model)
    else:
        raise ValueError(
            f"pixels {list(pixels.shape)}; allowed: [frames, 3, height, width], or patches in rows"
        )
    mean, spread = _scale(images, processor)
    shown = [image * spread + mean for image in images]
    return [(image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0) for image in shown]


def _unpacked(pixels: Tensor, vision: Vision, model: Any) -> list[Tensor]:
    """Rows are patches block by block, each of channels x frames x height x width (Qwen's processors)."""
    config = model.config.vision_config
    side, depth = config.patch_size, config.temporal_patch_size
    if pixels.shape[1] != CHANNELS * depth * side * side:
        raise ValueError(
            f"patches of {pixels.shape[1]} numbers; allowed: {CHANNELS} channels x {depth} frames x {side} x "
            f"{side} pixels, as the model's config has it"
        )
    high, wide = vision.layout.unit
    images, start = [], 0
    for count, (height, width) in vision.layout.frames:
        for _ in range(count):
            rows = pixels[start : start + height * width]
            start += height * width
            blocks = rows.reshape(height // high, width // wide, high, wide, CHANNELS, depth, side, side)
            first = blocks[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
            images.append(first.reshape(CHANNELS, height * side, width * side))
    return images


def _scale(images: list[Tensor], processor: Any) -> tuple[Tensor, Tensor]:
    """What the values are multiplied by and then moved by, ``[3, 1, 1]`` each."""
    normalised = getattr(processor, "image_processor", processor)
    mean, spread = getattr(normalised, "image_mean", None), getattr(normalised, "image_std", None)
    if mean is not None and spread is not None:
        scales = torch.tensor([mean, spread], dtype=torch.float32)
        return scales[0].reshape(-1, 1, 1), scales[1].reshape(-1, 1, 1)
    low = min(image.min() for image in images)
    high = max(image.max() for image in images)
    spread = 1 / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return (-low * spread).reshape(1, 1, 1), spread.reshape(1, 1, 1)
