"""A vision-language model and its processor from a directory, without a network."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luvc_fx.apps.images_only import load_images_only
from luvc_fx.methods.checks import shown
from luvc_fx.report.errors import InputError, brief, cannot

log = logging.getLogger(__name__)


def load(directory: Path) -> tuple[Any, Any]:
    """The model, in evaluation mode on the CPU with the dtype of its files, and its processor.

    Only files are read: nothing is downloaded, and no code in the directory is run.

    Raises:
        InputError: no such directory, none of a vision-language model, no processor, or weights that
            cannot be loaded.
    """
    if not os.path.isdir(directory):  # of os.path, as a name that is too long is an error of Path
        what = "is a file" if os.path.exists(directory) else "does not exist"
        raise InputError(f"model directory {shown(str(directory))} {what}")
    if not os.path.isfile(directory / "config.json"):
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
        raise cannot(f"the config in '{directory}' cannot be read", error) from error
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
            raise cannot(f"'{directory}' holds no processor that can be loaded{lacking}", error) from error
        log.info("the processor in '%s' is used without its part for videos: %s", directory, brief(error))
    if getattr(processor, "image_processor", None) is None:
        raise InputError(f"'{directory}' holds no processor for images, only {type(processor).__name__}")
    try:
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", **local)
    except Exception as error:
        raise cannot(f"the weights in '{directory}' cannot be loaded", error) from error
    return model.eval(), processor
