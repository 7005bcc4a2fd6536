"""Between vision and prefill: the prompt without the placeholders whose tokens were merged away."""

from __future__ import annotations

import inspect
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


def compact(
    kwargs: dict[str, Any], visual: Tensor, slots: Tensor, placeholders: int, masked: bool, past: int
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
    for name in ("attention_mask", "mm_token_type_ids"):
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
