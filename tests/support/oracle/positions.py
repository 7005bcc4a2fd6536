"""Which position each token of a prompt has, before any token is taken out.

Qwen-VL's decoders take three (M-RoPE: time, row and column). Those of a prompt with images or videos
are the stock model's own; tokens after it count on from the largest position of any axis, equal on
all three. Shapes: B prompts, S their length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def generate_positions(attention_mask: Tensor) -> Tensor:
    """[B, S] position ids as `generate` makes them: real tokens count from 0, padding gets 0."""
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, 0)


def has_three_axes(model: nn.Module) -> bool:
    """Whether the decoder's positions are M-RoPE's."""
    return hasattr(model.model, "get_rope_index")


def prompt_positions(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    start: Tensor,
    vision: dict[str, Tensor],
) -> Tensor:
    """[B, S], or [B, S, 3] for M-RoPE: the positions of the tokens of a forward.

    Args:
        position_ids: given ones, [B, S] or [1, S]; for M-RoPE also [3, B, S], or [4, B, S] as
            `generate` passes them, the first of them without meaning here.
        start: [B], where counting starts.
        vision: what the forward gets beside the text; a grid in it means M-RoPE on visual tokens.
    """
    batch, length = input_ids.shape
    if not has_three_axes(model):
        if position_ids is None:
            position_ids = start[:, None] + torch.arange(length, device=input_ids.device)
        return position_ids.expand(batch, length)
    if position_ids is None and ("image_grid_thw" in vision or "video_grid_thw" in vision):
        grids = {name: value for name, value in vision.items() if not name.startswith("pixel_values")}
        position_ids, _ = model.model.get_rope_index(input_ids, attention_mask=attention_mask, **grids)
        position_ids = position_ids + start[:, None]
    if position_ids is None:
        position_ids = start[:, None] + torch.arange(length, device=input_ids.device)
    return position_ids[-3:].expand(3, batch, length).permute(1, 2, 0)


def next_position(position_ids: Tensor) -> Tensor:
    """[B]: the position of the token after `position_ids` [B, S] or [B, S, 3] of a left-padded prompt."""
    if position_ids.ndim == 2:
        return position_ids[:, -1] + 1
    return position_ids.amax(dim=(1, 2)) + 1


def later_positions(model: nn.Module, start: Tensor, length: int) -> Tensor:
    """[B, T], or [B, T, 3] for M-RoPE: `length` positions of text from `start` [B] on."""
    positions = start[:, None] + torch.arange(length, device=start.device)
    return positions[..., None].expand(-1, -1, 3) if has_three_axes(model) else positions


def rotary(decoder: nn.Module, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's cos and sin, each [B, S, d], for `position_ids` [B, S] or [B, S, 3]."""
    if position_ids.ndim == 3:
        position_ids = position_ids.permute(2, 0, 1)
    return decoder.rotary_emb(hidden, position_ids=position_ids)
