"""Attention masks of a shortened prompt: which are left out, and the padding that others are made from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.generate.cache import PrunedRows
from luvc_fx.generate.prompt import PromptState


def takes_segments(model: Any) -> bool:
    """Whether padding is told to this decoder's attention as segments of rows (FlashAttention 2)."""
    return _compat.calls_flash_attn(model.config.get_text_config())


def without_full_mask(prompt: PromptState) -> PromptState:
    """`prompt` without a 2-D mask that hides nothing: attention is then causal by itself.

    So transformers does it, but not in a graph. This waits for the device.
    """
    mask = prompt.mask
    full = isinstance(mask, Tensor) and mask.shape == prompt.ids.shape and bool((mask != 0).all())
    return replace(prompt, mask=None) if full else prompt


def over_pruned_cache(model: Any, prompt: PromptState, cache: object) -> tuple[PromptState, Tensor | None]:
    """The prompt without its mask where `cache` is shortened, and the padding to build masks from.

    Over a shortened cache every layer needs a mask of its own. A graph builds them from the padding that each
    row begins with.

    Args:
        cache: that the conversation so far filled; another than `prompt.cache` where that only stands for it.

    Returns:
        The prompt, and its padding: int64 ``[B]`` (see `left_padding`), ``[0]`` where no row is padded, or
        None where no mask has to be built.

    Raises:
        NotImplementedError: a prompt without `input_ids`, one of another number of rows than the cache, or a
            mask that `left_padding` cannot follow.
    """
    if not isinstance(cache, PrunedRows):
        return prompt, None
    ids, mask = prompt.ids, prompt.mask
    if ids is None:
        raise NotImplementedError("luvc_fx: inputs_embeds over a cache with dropped visual tokens")
    rows = len(cache.without_images)
    if rows and rows != ids.shape[0]:
        raise NotImplementedError(
            f"luvc_fx: {ids.shape[0]} rows over a shortened cache of {rows}, some of them without images; "
            "take rows by its reorder_cache, batch_select_indices or batch_repeat_interleave"
        )
    unmasked = replace(prompt, mask=None)
    if mask is None and not cache.rows_without_images:
        if not takes_segments(model):
            # Nothing has to be compared with the padding then, and one query needs no mask at all.
            return unmasked, torch.zeros(0, dtype=torch.int64, device=ids.device)
        if ids.shape[1] == 1 and (ids.shape[0] > 1 or not _compat.reads_one_position()):
            return unmasked, None
    return unmasked, left_padding(ids, mask, cache.rows_without_images)


def left_padding(ids: Tensor, mask: Tensor | None, rows_without_images: tuple[int, ...] = ()) -> Tensor:
    """Int64 ``[B]``: how many rows of padding each row of a batch begins with, the cache's included.

    Args:
        ids: ``[B, S]``.
        mask: ``[B, past + S]``, or None where nothing is padded.
        rows_without_images: rows of which padding goes instead of visual tokens, in each layer some more. So
            it is counted from the end: as minus the number of rows behind it, which stays.

    Raises:
        NotImplementedError: the mask has other than two axes.
    """
    if mask is None:
        padding = torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
    elif mask.dim() == 2:
        seen = mask != 0
        padding = (seen.cumsum(1) == 0).sum(1)
        rows = torch.arange(mask.shape[1], device=mask.device)
        torch.ops.aten._assert_async.msg(
            (seen == (rows >= padding.unsqueeze(1))).all(),
            "luvc_fx: over a cache with dropped visual tokens only left padding can be masked",
        )
    else:
        raise NotImplementedError(
            f"luvc_fx: a {mask.dim()}-D attention_mask cannot be followed over a cache with dropped "
            "visual tokens; pass a 2-D mask with left padding, or none"
        )
    if rows_without_images:
        seen_rows = ids.shape[1] if mask is None else mask.shape[1]
        index = torch.tensor(rows_without_images, device=ids.device)
        padding = padding.index_add(0, index, torch.full_like(index, -seen_rows))
    return padding
