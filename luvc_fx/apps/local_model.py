"""A vision-language model and its processor from a directory, and one prompt for them; no network."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luvc_fx.apps.images_only import load_images_only
from luvc_fx.apps.inputs import InputError, brief

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

DEFAULT_SIDE = 336
"""Side of the synthetic image where neither the processor nor the config prefers one."""


def load(directory: Path) -> tuple[Any, Any]:
    """The model, in evaluation mode on the CPU with the dtype of its files, and its processor.

    Only files are read: nothing is downloaded, and no code in the directory is run.

    Raises:
        InputError: no such directory, none of a vision-language model, no processor, or weights that
            cannot be loaded.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise InputError(f"model directory '{directory}' {what}")
    if not (directory / "config.json").is_file():
        raise InputError(f"'{directory}' holds no model: there is no config.json")
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
    )
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    # What a directory holds can fail in as many ways as there are classes that read it.
    try:
        config = AutoConfig.from_pretrained(directory, **local)
    except Exception as error:
        raise _cannot(f"the config in '{directory}' cannot be read", error) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(
            f"'{directory}' holds no vision-language model: AutoModelForImageTextToText has no class for "
            f"model type {config.model_type!r}"
        )
    try:
        processor = AutoProcessor.from_pretrained(directory, **local)
    except Exception as error:
        try:
            processor = load_images_only(directory, **local)
        except Exception as other:
            log.debug("nor without its part for videos", exc_info=other)
            lacking = "" if find_spec("torchvision") else " (torchvision, which many need, is not installed)"
            raise _cannot(f"'{directory}' holds no processor that can be loaded{lacking}", error) from error
        log.info("the processor in '%s' is used without its part for videos: %s", directory, brief(error))
    if getattr(processor, "image_processor", None) is None:
        raise InputError(f"'{directory}' holds no processor for images, only {type(processor).__name__}")
    try:
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", **local)
    except Exception as error:
        raise _cannot(f"the weights in '{directory}' cannot be loaded", error) from error
    return model.eval(), processor


def make_prompt(model: Any, processor: Any, images: Sequence[Image], text: str) -> dict[str, Any]:
    """One user's turn, images first: by the chat template, or image tokens and the text without one.

    Raises:
        InputError: a text that the prompt cannot hold, or a processor that cannot make the prompt.
    """
    token = image_token(model, processor)
    if not text.strip():
        raise InputError("the prompt is empty")
    if token in text:
        raise InputError(f"the prompt must not contain {token!r}: images are put in front of it")
    try:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": image} for image in images]
            turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
            inputs = processor.apply_chat_template(
                [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            prompt = "\n".join([*[token] * len(images), text])
            inputs = processor(images=list(images), text=prompt, return_tensors="pt")
    except Exception as error:
        raise _cannot(f"{type(processor).__name__} cannot make the prompt", error) from error
    if not (inputs["input_ids"] == model.config.image_token_id).any():
        raise InputError(f"the prompt of {type(processor).__name__} holds no visual token ({token!r})")
    return dict(inputs.to(model.device, model.dtype))


def image_token(model: Any, processor: Any) -> str:
    token = getattr(processor, "image_token", None)
    if token is None:
        token = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    return str(token)


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


def _cannot(what: str, error: Exception) -> InputError:
    log.debug("%s", what, exc_info=error)
    return InputError(f"{what}: {brief(error)}")
