"""Questions about one image over one prefill of what their prompts share, up to the last visual token.

Tokens see what is in front of them, so what a prompt leaves in the cache up to there does not depend on the
question behind it, and neither does which visual tokens are kept.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from luvc_fx import _compat
from luvc_fx.apps.evaluation.prompts import Prompt, Prompts, collate
from luvc_fx.generate.cache import layers_of, unsupported
from luvc_fx.generate.families import family_of
from luvc_fx.generate.options import keeping_option, merged
from luvc_fx.schedule import Schedule

TEXT_STEP = 4
"""The texts behind the images are padded to a multiple of it, so that fewer graphs are compiled."""


@dataclass(frozen=True, slots=True)
class Group:
    """Questions about a few images of one shape, asked together.

    Attributes:
        images: of each image the number of a question about it.
        questions: their numbers; `places`: which of `images` each is about.
    """

    images: list[int] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def filled(self, images: int, questions: int) -> Group:
        """With the last image, and the last question, so often again that there are as many."""
        return Group(
            self.images + self.images[-1:] * (images - len(self.images)),
            self.questions + self.questions[-1:] * (questions - len(self.questions)),
            self.places + self.places[-1:] * (questions - len(self.places)),
        )


def why_apart(model: Any, schedule: Schedule) -> str:
    """Why each question needs a prefill of its own, or nothing."""
    for prune in schedule.prune:
        if prune.selector.needs_last_query_attention:
            return (
                f"selector {prune.selector.name!r} looks at the attention of the last token, of the question"
            )
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} has a decoder of its own for the answer"
    if family_of(model).makes_own_masks():
        return f"{type(model).__name__} makes masks of its own, in which images may see what is behind them"
    refusal = unsupported(DynamicCache(config=model.config.get_text_config()))
    if refusal is not None:
        return refusal.text
    options = merged(model, {})
    keeping = keeping_option(options)
    if options.cache_implementation is not None:
        keeping = f"cache_implementation={options.cache_implementation!r}"
    if keeping:
        return f"the generation config says {keeping}"
    return ""


def groups(shapes: Sequence[Hashable], images: Sequence[Hashable], most: int) -> list[tuple[Group, int, int]]:
    """Questions by shape and image, and how many images and questions each group is to be filled up to.

    Args:
        shapes: of each question what must be equal within a group; `images`: what it is about.
        most: questions of a group; an image with more of them is in several.

    >>> groups("xx", "aa", 2)
    [(Group(images=[0], questions=[0, 1], places=[0, 0]), 1, 2)]
    """
    by_shape: dict[Hashable, dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, (shape, image) in enumerate(zip(shapes, images, strict=True)):
        by_shape[shape][image].append(number)
    filled = []
    for by_image in by_shape.values():
        open_groups: list[Group] = []
        for numbers in by_image.values():
            for first in range(0, len(numbers), most):
                part = numbers[first : first + most]
                if not open_groups or len(open_groups[-1].questions) + len(part) > most:
                    open_groups.append(Group())
                open_groups[-1].places.extend([len(open_groups[-1].images)] * len(part))
                open_groups[-1].images.append(part[0])
                open_groups[-1].questions.extend(part)
        # Other numbers of rows would be other graphs.
        rows = (
            max(len(group.images) for group in open_groups),
            most if len(open_groups) > 1 else len(open_groups[0].questions),
        )
        filled += [(group, *rows) for group in open_groups]
    return filled


def generate_together(
    prompts: Prompts,
    images: Sequence[Prompt],
    asked: Sequence[Prompt],
    places: Sequence[int],
    options: Mapping[str, Any],
) -> Tensor:
    """The new tokens of `asked`, ``[questions, tokens]``, as `model.generate` gives them for each alone.

    The images are prefilled with one token of text behind each, as a prompt cannot end with visual tokens
    that may all go, and that one leaves the cache again. All but the last token of each question run over it
    with padding *behind* them, which nothing in front of it sees. Then each row of the cache is turned until
    the padding is in front, where `generate`, which reads the last tokens and goes on, expects it.

    Args:
        images: one prompt about each image, of equal length up to its last visual token.
        places: which of `images` each question is about.
        options: of `generate`.
    """
    model, front = prompts.model, images[0].front
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = collate(
        [row.cut(front + 1) for row in images],
        len(images),
        prompts.padding,
        model.device,
        model.dtype,
        front + 1,
    )
    if images[0].smaller is not None:
        inputs = images[0].smaller.encoded(model, inputs)
    forward = {"use_cache": True, **_last_logits(model)}
    cache_name = _compat.cache_argument(model.forward)
    cache = _compat.cache_of(model(**inputs, **{cache_name: cache}, **forward))
    del inputs
    index = torch.tensor(places, device=model.device)
    for layer in layers_of(cache):
        layer.keys, layer.values = layer.keys[index, :, :-1], layer.values[index, :, :-1]
    deltas = getattr(model.base_model, "rope_deltas", None)
    if isinstance(deltas, Tensor):  # where text goes on behind images, with positions of several axes
        deltas = model.base_model.rope_deltas = deltas[index]
    behind = [row.length - front for row in asked]
    longest = max(behind)
    longest += -longest % TEXT_STEP
    whole = collate(
        [Prompt(row.text, {}, row.visual) for row in asked],
        len(asked),
        prompts.padding,
        model.device,
        model.dtype,
        front + longest,
    )
    ids = torch.full((len(asked), longest - 1), prompts.padding, device=model.device)
    for row, text in enumerate(asked):
        ids[row, : behind[row] - 1] = text.text["input_ids"][0, front:-1]
    positions = torch.arange(front, front + longest - 1, device=model.device).expand(ids.shape)
    if isinstance(deltas, Tensor):
        positions = positions.unsqueeze(0) + deltas
    _mark(cache)
    cache = _compat.cache_of(model(input_ids=ids, position_ids=positions, **{cache_name: cache}, **forward))
    _turn(cache, torch.tensor([longest - length for length in behind], device=model.device))
    _mark(cache)
    output = model.generate(
        input_ids=whole["input_ids"],
        attention_mask=whole["attention_mask"],
        **{_compat.cache_argument_of_generate(): cache},
        **options,
    )
    return output[:, front + longest :]


def _last_logits(model: Any) -> dict[str, int]:
    """Logits of the last row only, as `generate` asks for them, where that can be asked for."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _mark(cache: Any) -> None:
    """Let graphs be for any number of rows in each layer: they grow, and each schedule has others."""
    for layer in layers_of(cache):
        for rows in (layer.keys, layer.values):
            torch._dynamo.maybe_mark_dynamic(rows, 2)


def _turn(cache: Any, padding: Tensor) -> None:
    """Bring the last `padding` ``[B]`` rows of each layer of a cache to its front, in place."""
    if not padding.any():
        return
    sources: dict[int, Tensor] = {}
    for layer in layers_of(cache):
        rows = layer.keys.shape[-2]
        if rows not in sources:
            source_rows = (torch.arange(rows, device=padding.device) - padding.unsqueeze(1)) % rows
            sources[rows] = source_rows[:, None, :, None]
        source = sources[rows].expand_as(layer.keys)  # not `take_along_dim`, which looks at each number again
        layer.keys, layer.values = layer.keys.gather(2, source), layer.values.gather(2, source)
