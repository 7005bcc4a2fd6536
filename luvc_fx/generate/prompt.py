"""Between vision and prefill: the prompt without the placeholders whose tokens were merged away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luvc_fx.generate.encoder_outputs import LateFeatures, parts_of
from luvc_fx.generate.families import TOKEN_TYPES
from luvc_fx.ops import gather_rows, surviving_rows

_NAMES = {
    "ids": "input_ids",
    "mask": "attention_mask",
    "positions": "position_ids",
    "cache": "past_key_values",
}
"""Fields of a `PromptState`, and the keyword arguments of a forward that they are."""


@dataclass(frozen=True, slots=True)
class PromptState:
    """The keyword arguments of one forward, those by name that change when the prompt gets shorter.

    Attributes:
        ids: `input_ids` ``[B, S]``, or None beside `inputs_embeds`.
        mask: `attention_mask`: ``[B, past + S]``, one of another form, or None.
        positions: `position_ids` ``[B or 1, S]`` or ``[axes, B or 1, S]``, or None.
        cache: `past_key_values`, or None. The hooks call it so whatever transformers does.
        rest: all others, as they were given.
    """

    ids: Any
    mask: Any
    positions: Any
    cache: Any
    rest: dict[str, Any]

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> PromptState:
        """The state that the keyword arguments of a forward are."""
        rest = {name: given for name, given in kwargs.items() if name not in _NAMES.values()}
        return cls(**{field: kwargs.get(name) for field, name in _NAMES.items()}, rest=rest)

    def as_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of a forward; what is None is left out, which a forward takes for the same."""
        fields = {name: getattr(self, field) for field, name in _NAMES.items()}
        return {**{name: given for name, given in fields.items() if given is not None}, **self.rest}


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder made of the images, or the videos, of a prompt.

    Attributes:
        features: ``[N, D]`` or ``[images, n, D]``, or a sequence of ``[n, D]``.
        representatives: int64 ``[n, H', W']`` or ``[1, 1, N]``: the placeholder that each feature stands for,
            counted over all placeholders of the batch.
        placeholders: how many there are in the batch.
        late: features that enter the decoder late.
    """

    features: Any
    representatives: Tensor
    placeholders: int
    late: LateFeatures


def treat_padding_as_visual(
    ids: Tensor, start: int, token: int, encoded: Encoded, rows_without_images: tuple[int, ...]
) -> tuple[Tensor, Encoded]:
    """Let left padding of rows without images pass for as many visual tokens as the other rows have.

    No token sees padding, so zeros do for its features, and it goes where visual tokens go: each row gets
    shorter by the same number of rows, and none loses text.

    Args:
        ids: ``[B, S]``; in `rows_without_images` the places from `start` on are padding.
        token: the placeholder.

    Returns:
        `ids` with placeholders in the padding, and `encoded` with zeros for them.
    """
    batch = ids.shape[0]
    with_images = [row for row in range(batch) if row not in rows_without_images]
    each = encoded.placeholders // len(with_images)
    left = encoded.representatives.numel() // len(with_images)
    ids = ids.clone()
    ids[list(rows_without_images), start : start + each] = token
    first = torch.arange(batch, device=ids.device).unsqueeze(1) * each
    # Padding keeps its first tokens; with images, representatives are counted anew among more rows.
    representatives = (first + torch.arange(left, device=ids.device)).clone()
    first_before = torch.arange(len(with_images), device=ids.device).unsqueeze(1) * each
    of_images = encoded.representatives.reshape(len(with_images), left)
    representatives[with_images] = of_images - first_before + first[with_images]

    def with_zeros(flat: Tensor) -> Tensor:
        full = flat.new_zeros(batch, left, flat.shape[-1])
        full[with_images] = flat.unflatten(0, (len(with_images), left))
        return full.flatten(0, 1)

    late = {name: [with_zeros(level) for level in levels] for name, levels in encoded.late.items()}
    images, *grid = encoded.representatives.shape
    shape = (-1, *grid) if images > 1 or grid[0] > 1 else (1, 1, -1)
    features: Any = with_zeros(torch.cat(parts_of(encoded.features)))
    if not isinstance(encoded.features, Tensor):
        features = (features,)
    elif encoded.features.dim() == 3:
        features = features.unsqueeze(0)
    return ids, Encoded(features, representatives.reshape(shape), each * batch, late)


def compact(
    prompt: PromptState,
    visual: Tensor,
    representatives: Tensor,
    placeholders: int,
    needs_mask: bool,
    past: int = 0,
) -> tuple[PromptState, Tensor]:
    """The prompt without the placeholders that were merged away, and each row's old number.

    Args:
        prompt: with `ids` ``[B, S]``.
        visual: bool ``[B, S]``, the placeholders of one modality.
        representatives, placeholders: see `luvc_fx.ops.surviving_rows`.
        needs_mask: give a prompt without an attention mask one, full of ones.
        past: rows of the conversation before this prompt.

    Returns:
        The shorter prompt and int64 ``[B, S']``.
    """
    ids, rest = prompt.ids, dict(prompt.rest)
    old_rows, ascending = surviving_rows(visual, representatives, placeholders)
    positions = prompt.positions
    if positions is None:
        positions = torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)
    short_ids, mask = ids.gather(1, ascending), prompt.mask
    if mask is not None:
        mask = mask.gather(1, ascending)
    elif needs_mask:
        mask = torch.ones_like(short_ids)
    if rest.get("labels") is not None:
        rest["labels"] = rest["labels"].gather(1, old_rows)
    for name in TOKEN_TYPES:
        if rest.get(name) is not None:
            rest[name] = rest[name].gather(1, ascending)
    positions = _at(positions, old_rows)
    return replace(prompt, ids=short_ids, mask=mask, positions=positions, rest=rest), old_rows


def _at(positions: Tensor, rows: Tensor) -> Tensor:
    """``positions`` ``[B or 1, S]`` or ``[axes, B or 1, S]`` at ``rows`` ``[B, S']``."""
    if positions.dim() == 2:
        return gather_rows(positions, rows, 1)
    return torch.stack([gather_rows(axis, rows, 1) for axis in positions])
