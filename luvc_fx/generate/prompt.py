"""Between vision and prefill: the prompt without the placeholders whose tokens were merged away."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luvc_fx.ops import gather_rows, surviving_rows


def with_positions(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with the `position_ids` that the model would compute from the whole prompt itself.

    A model with several position axes (M-RoPE) computes them from the grids of its images, which a
    shorter prompt no longer shows. It also remembers where the text goes on.
    """
    compute = getattr(model.base_model, "compute_3d_position_ids", None)
    grids = [kwargs.get(name) for name in ("image_grid_thw", "video_grid_thw")]
    if compute is None or kwargs.get("position_ids") is not None or all(grid is None for grid in grids):
        return kwargs
    names = inspect.signature(compute).parameters
    given = {name: kwargs.get(name) for name in names}
    if "inputs_embeds" in names and given["inputs_embeds"] is None:
        given["inputs_embeds"] = model.get_input_embeddings()(kwargs["input_ids"])
    positions = compute(**given)
    return kwargs if positions is None else {**kwargs, "position_ids": positions}


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder made: its features, their `slots`, and how many placeholders there were.

    Attributes:
        features: ``[N, D]`` or ``[1, N, D]``, or a sequence of ``[n, D]``.
        extra: what enters the decoder late, each level ``[N, D]``.
    """

    features: Any
    slots: Tensor
    placeholders: int
    extra: dict[str, list[Tensor]]


def stand_in(
    ids: Tensor, start: int, token: int, given: Encoded, textual: tuple[int, ...]
) -> tuple[Tensor, Encoded]:
    """Let left padding of rows without images stand for as many visual tokens as the other rows have.

    Nothing sees padding, so zeros do for features, and it goes as visual tokens go: each row gets
    shorter by the same number of rows, and none of text.

    Args:
        ids: ``[B, S]``; in the `textual` rows the places from `start` on are padding.
        token: the placeholder.
    """
    batch = ids.shape[0]
    rows = [row for row in range(batch) if row not in textual]
    each, left = given.placeholders // len(rows), given.slots.numel() // len(rows)
    ids = ids.clone()
    ids[list(textual), start : start + each] = token
    first = torch.arange(batch, device=ids.device).unsqueeze(1) * each
    slots = (first + torch.arange(left, device=ids.device)).clone()
    among = torch.arange(len(rows), device=ids.device).unsqueeze(1) * each
    slots[rows] = given.slots.reshape(len(rows), left) - among + first[rows]

    def spread(flat: Tensor) -> Tensor:
        full = flat.new_zeros(batch, left, flat.shape[-1])
        full[rows] = flat.unflatten(0, (len(rows), left))
        return full.flatten(0, 1)

    extra = {name: [spread(level) for level in levels] for name, levels in given.extra.items()}
    shape = (-1, *given.slots.shape[1:]) if given.slots.shape[1] > 1 else (1, 1, -1)
    if isinstance(given.features, Tensor):
        features: Any = spread(given.features.flatten(0, -2)).unsqueeze(0)
    else:
        features = (spread(torch.cat(list(given.features))),)
    return ids, Encoded(features, slots.reshape(shape), each * batch, extra)


def without_full_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` without a 2-D mask that hides nothing: attention is then causal by itself.

    So transformers does it, but not in a graph. This waits for the device.
    """
    mask = kwargs.get("attention_mask")
    full = isinstance(mask, Tensor) and mask.shape == kwargs["input_ids"].shape and bool((mask != 0).all())
    return {**kwargs, "attention_mask": None} if full else kwargs


def compact(
    kwargs: dict[str, Any], visual: Tensor, slots: Tensor, placeholders: int, masked: bool, past: int = 0
) -> tuple[dict[str, Any], Tensor]:
    """The prompt without the placeholders that were merged away, and each row's old number.

    Args:
        kwargs: of a forward with `input_ids` ``[B, S]``.
        visual: bool ``[B, S]``, the placeholders of one modality; `slots`, `placeholders`: see
            `luvc_fx.ops.surviving_rows`.
        past: rows of the conversation before this prompt.
        masked: give a prompt without an attention mask one, full of ones.

    Returns:
        The shorter keyword arguments and int64 ``[B, S']``.
    """
    ids = kwargs["input_ids"]
    places, ascending = surviving_rows(visual, slots, placeholders)
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)
    short = {
        **kwargs,
        "input_ids": ids.gather(1, ascending),
        "position_ids": _at(positions, places),
    }
    if kwargs.get("labels") is not None:
        short["labels"] = kwargs["labels"].gather(1, places)
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if kwargs.get(name) is not None:
            short[name] = kwargs[name].gather(1, ascending)
    if masked and kwargs.get("attention_mask") is None:
        short["attention_mask"] = torch.ones_like(short["input_ids"])
    return short, places


def _at(positions: Tensor, places: Tensor) -> Tensor:
    """``positions`` ``[B or 1, S]`` or ``[axes, B or 1, S]`` at ``places`` ``[B, S']``."""
    if positions.dim() == 2:
        return gather_rows(positions, places, 1)
    return torch.stack([gather_rows(axis, places, 1) for axis in positions])


def left_padding(ids: Tensor, mask: Tensor | None, textual: tuple[int, ...] = ()) -> Tensor:
    """Int64 ``[B]``: how many rows of padding each row of a batch begins with, all told.

    Args:
        ids: ``[B, S]``; mask: ``[B, past + S]``.
        textual: rows of which padding goes instead of visual tokens. What is left of it is counted from the
            end, as minus the number of rows behind it.

    Raises:
        NotImplementedError: the mask has other than two axes.
    """
    if mask is None:
        padding = torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
    elif mask.dim() == 2:
        seen = mask != 0
        padding = (seen.cumsum(1) == 0).sum(1)
        rows = torch.arange(mask.shape[1], device=mask.device)
        torch._assert_async(
            (seen == (rows >= padding.unsqueeze(1))).all(),
            "luvc_fx: over a cache with dropped visual tokens only left padding can be masked",
        )
    else:
        raise NotImplementedError(
            f"luvc_fx: a {mask.dim()}-D attention_mask cannot be followed over a cache with dropped "
            "visual tokens; pass a 2-D mask with left padding, or none"
        )
    if textual:
        seen_rows = ids.shape[1] if mask is None else mask.shape[1]
        index = torch.tensor(textual, device=ids.device)
        padding = padding.index_add(0, index, torch.full_like(index, -seen_rows))
    return padding
