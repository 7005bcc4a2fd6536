"""Prompts of questions, processed once and used by every method, and batches of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luvc_fx.apps.evaluation.questions import Question, read_frames
from luvc_fx.apps.images_only import VIDEO
from luvc_fx.downsample import Downsampled, downsample_all
from luvc_fx.generate.chat_prompt import image_token
from luvc_fx.generate.families import modalities, placeholders
from luvc_fx.report.errors import InputError, brief

PIXEL_BYTES = 2 << 30
"""Processed images that are kept in memory; those beyond are processed again each time."""

PADDED = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What is as long as the text and gets padding on its left."""

LENGTH_STEP = 16
"""Prompts are padded to a multiple of it: a few tokens more, and fewer graphs."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What decides which rows can share a batch, without their pixels.

    Attributes:
        length: tokens of the prompt; `shape`, `front`: see `Prompt`.
        head: a hash of the tokens up to the last visual one.
    """

    length: int
    shape: tuple[Any, ...]
    front: int
    head: bytes


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the model takes it.

    Attributes:
        text: each ``[1, tokens]``.
        pixels: everything else, on images or videos.
        visual: placeholders of visual tokens in the text; `front`: its tokens up to the last of them.
        smaller: how the images were made smaller, if they were.
    """

    text: dict[str, Tensor]
    pixels: dict[str, Tensor]
    visual: int
    smaller: Downsampled | None = None
    front: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.text["input_ids"].shape[1]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Rows of equal shape can share a batch, and share the graphs of one.

        Small whole numbers (grids, sizes of images) steer the encoder, so they count by value.
        """
        about = []
        for name, tensor in sorted(self.pixels.items()):
            values = () if tensor.is_floating_point() else tuple(tensor.flatten().tolist())
            about.append((name, tuple(tensor.shape), values))
        return self.visual, tuple(about)

    def cut(self, length: int) -> Prompt:
        """With the first `length` tokens of the text alone."""
        text = {name: tensor[:, :length] for name, tensor in self.text.items()}
        return replace(self, text=text)

    def outline(self) -> Outline:
        """Its outline."""
        head = self.text["input_ids"][0, : self.front].contiguous().numpy().tobytes()
        return Outline(self.length, self.shape, self.front, hashlib.blake2b(head, digest_size=16).digest())


class Prompts:
    """Makes the prompts of questions for one model; an image is processed once for all of its questions.

    Args:
        smaller: a budget that images are made smaller to (see `luvc_fx.downsample`); None: they are not.
    """

    def __init__(self, model: Any, processor: Any, smaller: float | None = None) -> None:
        self.model, self.processor, self.smaller = model, processor, smaller
        self._texts: dict[Question, tuple[dict[str, Tensor], int, Downsampled | None, int]] = {}
        self._outlines: dict[Question, Outline] = {}
        self._pixels: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._bytes = 0
        pad = getattr(processor.tokenizer, "pad_token_id", None)
        self.padding = 0 if pad is None else pad

    def outline(self, question: Question) -> Outline:
        """Of the prompt of that question; errors are those of `prompt`."""
        if question not in self._outlines:
            self._outlines[question] = self.prompt(question).outline()
        return self._outlines[question]

    def prompt(self, question: Question) -> Prompt:
        """The prompt of that question: the images or the video first, by the chat template if there is one.

        Raises:
            InputError: a file that cannot be read, a prompt that the processor cannot make, or a video where
                the processor has lost its part for videos.
            ValueError: images of this model cannot be made smaller.
        """
        of = (question.media, question.video)
        if question in self._texts and of in self._pixels:
            text, visual, smaller, front = self._texts[question]
            return Prompt(text, self._pixels[of], visual, smaller, front)
        inputs, smaller = self.process(question)
        length = inputs["input_ids"].shape[1]
        text = {name: inputs[name] for name in PADDED if name in inputs}
        text.setdefault("attention_mask", torch.ones(1, length, dtype=torch.int64))
        pixels = {name: tensor for name, tensor in inputs.items() if name not in PADDED}
        places = placeholders(self.model, text["input_ids"])[0].nonzero()
        if not len(places):
            raise InputError(f"the prompt of {question.text!r} holds no visual token")
        visual, front = len(places), int(places[-1]) + 1
        self._texts[question] = text, visual, smaller, front
        size = sum(tensor.nbytes for tensor in pixels.values())
        if of not in self._pixels and self._bytes + size <= PIXEL_BYTES:
            self._pixels[of] = pixels
            self._bytes += size
        return Prompt(text, self._pixels.get(of, pixels), visual, smaller, front)

    def process(self, question: Question) -> tuple[dict[str, Tensor], Downsampled | None]:
        """The processor's inputs for a question, and what its images were made smaller to."""
        frames, made_smaller = read_frames(question), None
        options: dict[str, Any] = {}
        as_video = question.video and getattr(self.processor, VIDEO, None) is not None
        if question.video and not as_video and self._lacks_videos():
            raise InputError(
                f"question {question.text!r} is about a video, and {type(self.processor).__name__} was "
                "loaded without its part for videos (is torchvision installed?); allowed: the frames as a "
                "list under 'image'"
            )
        token = image_token(self.model, self.processor)
        if token in question.text:
            raise InputError(f"question {question.text!r} must not contain {token!r}")
        if self.smaller is not None:
            if as_video:
                raise ValueError("videos are not made smaller")
            frames, made_smaller = downsample_all(self.model, self.processor, frames, self.smaller)
            options = dict(made_smaller.processing)
        # A model that never knew videos sees the frames as images, one after another.
        kinds = ["video"] if as_video else ["image"] * len(frames)
        try:
            if getattr(self.processor, "chat_template", None):
                content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": question.text}]
                turn = [{"role": "user", "content": content}]
                text = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            else:
                tokens = [self.processor.video_token if as_video else token] * len(kinds)
                text = "\n".join([*tokens, question.text])
            begin = getattr(self.processor.tokenizer, "bos_token", None)
            if begin and text.startswith(begin):  # else the tokenizer adds a second one
                options["add_special_tokens"] = False
            given: dict[str, Any] = {"videos": [frames]} if as_video else {"images": frames}
            if as_video:  # all frames are shown
                given["do_sample_frames"] = False
            tensors = self.processor(text=[text], return_tensors="pt", **given, **options)
        except Exception as error:
            name = type(self.processor).__name__
            raise InputError(f"{name} cannot make the prompt of {question.text!r}: {brief(error)}") from error
        return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}, made_smaller

    def _lacks_videos(self) -> bool:
        """Whether the model or the class of its processor takes videos, as this processor does not."""
        return hasattr(self.processor, VIDEO) or any(kind.name == "video" for kind in modalities(self.model))


def batches(rows: Sequence[Prompt | Outline], most: int) -> Iterator[tuple[list[int], int]]:
    """Numbers of rows that can run together, equal in shape and near in length, and how many to fill up to.

    At most `most`. What is left of a shape behind full batches is to be filled up to `most` rows, as
    another number of rows would be other graphs.
    """
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[row.shape].append(number)
    for numbers in groups.values():
        numbers.sort(key=lambda number: rows[number].length)
        for first in range(0, len(numbers), most):
            chosen = numbers[first : first + most]
            yield chosen, most if first else len(chosen)


def collate(
    rows: Sequence[Prompt],
    count: int,
    padding: int,
    device: torch.device,
    dtype: torch.dtype,
    length: int | None = None,
) -> dict[str, Tensor]:
    """One batch of rows of equal shape, padded on the left; floating numbers in the model's dtype.

    Args:
        count: rows of the batch, at least those given: the last one is repeated.
        padding: id of the padding token.
        length: tokens of each row; None: those of the longest, and then to a multiple of `LENGTH_STEP`.
    """
    rows = [*rows, *[rows[-1]] * (count - len(rows))]
    if length is None:
        length = max(row.length for row in rows)
        length += -length % LENGTH_STEP
    inputs = {}
    for name in rows[0].text:
        fill = padding if name == "input_ids" else 0
        padded = [
            torch.nn.functional.pad(row.text[name], (length - row.length, 0), value=fill) for row in rows
        ]
        inputs[name] = torch.cat(padded)
    for name in rows[0].pixels:
        inputs[name] = torch.cat([row.pixels[name] for row in rows])
    return {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in inputs.items()
    }
