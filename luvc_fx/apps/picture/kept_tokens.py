"""`luvc_fx.picture`: a prompt's images once per stage, with the tokens that are left there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from luvc_fx.apps.picture.areas import Stage, stages_of
from luvc_fx.apps.picture.drawing import draw
from luvc_fx.apps.picture.pixels import frames_of
from luvc_fx.apps.picture.recording import record
from luvc_fx.generate.frontdoor import door_of
from luvc_fx.methods.checks import refuse, shown
from luvc_fx.schedule import Schedule

if TYPE_CHECKING:
    import PIL.Image


def picture(
    model: Any,
    inputs: Mapping[str, Any],
    schedule: Schedule | str | None = None,
    processor: Any = None,
    path: str | os.PathLike[str] | None = None,
) -> PIL.Image.Image:
    """Draw which visual tokens of one prompt a schedule keeps: a panel for each stage, a row for each image.

    A merged token is drawn as the area of all patches that went into it, in their mean colour; the area of a
    dropped token is dark, or dim where the token was averaged into one that stays. The panels show what the
    graphs of `luvc_fx.compile` did with this prompt: they are run once, uncompiled. In half precision and on
    a GPU compiled code may decide close cases otherwise. The model is left as it was; what Dynamo has learnt
    of sizes in this process is forgotten, so functions that were compiled earlier may compile again.

    Args:
        model: as for `luvc_fx.compile`, or compiled by it.
        inputs: what the processor returns for one prompt with images or with a video, on the model's device.
        schedule: as of `luvc_fx.compile`; None: that of the compiled model.
        processor: the model's, whose colours are undone; without it they are stretched, and may look pale.
        path: where to save the picture; the ending says in which format.

    Returns:
        The picture, a `PIL.Image.Image`. What of the schedule was left alone is written below it.

    Raises:
        ValueError: no schedule, or one that this model cannot follow; another number of prompts than one; a
            prompt without an image, or with images and a video; a model whose tokens have no place in the
            picture; an ending that Pillow does not know.

    >>> luvc_fx.picture(model, inputs, "image", path="kept.png")  # doctest: +SKIP
    """
    parsed = door_of(model).schedule if schedule is None else Schedule.of(schedule)
    _check(inputs)
    if path is not None:
        check_path(path)
    recording = record(model, inputs, parsed)
    stages = stages_of(recording)
    frames = frames_of(recording.visions[0], model, processor)
    left_alone = [f"Left alone: {refusal}" for refusal in recording.refusals]
    drawn = draw(stages, frames, [_legend(stages), *left_alone])
    if path is not None:
        drawn.save(path)
    return drawn


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise `ValueError` where no picture can be saved."""
    from PIL import Image

    if not isinstance(path, (str, os.PathLike)):
        refuse("", "path", path, "a path")
    file = Path(path)
    endings = Image.registered_extensions()
    if endings.get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(
            f"picture {shown(str(path))}: Pillow writes no such file; allowed: an ending such as .png"
        )
    if os.path.isdir(file):
        raise ValueError(f"picture {shown(str(path))} is a folder; allowed: a file")
    if not os.path.isdir(file.parent):
        raise ValueError(f"picture {shown(str(path))}: the folder {shown(str(file.parent))} does not exist")


def _check(inputs: Mapping[str, Any]) -> None:
    if not isinstance(inputs, Mapping):
        refuse("", "inputs", inputs, "what the processor returns for one prompt")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids are {shape}; allowed: a tensor [1, rows], the prompt to draw")
    if not any(isinstance(inputs.get(name), Tensor) for name in ("pixel_values", "pixel_values_videos")):
        raise ValueError(
            "the prompt has neither pixel_values nor pixel_values_videos; allowed: one with images or a video"
        )


def _legend(stages: list[Stage]) -> str:
    """What the areas mean, as far as they occur."""
    parts = ["A frame holds what a token stands for, merged patches in their mean colour."]
    if any(stage.absorbed[i].any() for stage in stages for i in range(len(stage.absorbed))):
        parts.append("Dim: dropped, and averaged into a token that stays.")
    if any((owners < 0).any() for stage in stages for owners in stage.owners):
        parts.append("Dark: no token is left for it.")
    return " ".join(parts)
