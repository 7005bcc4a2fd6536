"""`logits_to_keep` of a forward that gets shorter: what is asked for are rows of the whole prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from luvc_fx.generate.families import placeholders
from luvc_fx.generate.prompt import PromptState
from luvc_fx.report import Reason, Refusal

NAME = "logits_to_keep"


def refusal_of_kept_logits(model: Any, kwargs: Mapping[str, Any]) -> Refusal | None:
    """Why all visual tokens must stay for the logits that are asked for, or None.

    Of a tensor this waits for the device.

    Args:
        kwargs: of `forward` or `generate`.
    """
    asked, ids = kwargs.get(NAME), kwargs.get("input_ids", kwargs.get("inputs"))
    if not is_cut_afterwards(asked) or ids is None:
        return None
    if kwargs.get("labels") is not None:
        what = f"{NAME} beside labels"
    elif isinstance(asked, Tensor) and bool(
        placeholders(model, ids).flatten()[numbered(ids.shape, asked)].any()
    ):
        what = f"{NAME} asks for rows of visual tokens"
    else:
        return None
    return Refusal(Reason.INPUTS, f"{what}: all visual tokens stay")


def numbered(shape: torch.Size, asked: Tensor) -> Tensor:
    """Those of the numbers ``0 .. B * S - 1`` of all rows of a batch that are asked for.

    Args:
        shape: ``[B, S]``.
        asked: as transformers takes it: ``[n]`` rows of each prompt, int64 ``[B, n]``, or bool ``[B, S]``.

    Returns:
        int64 ``[B, n]``, of a bool ``[B, S]`` the numbers of its rows ``[n]``.
    """
    numbers = torch.arange(shape.numel(), device=asked.device).reshape(shape)
    if asked.dim() == 2:
        return numbers[asked] if asked.dtype == torch.bool else numbers.take_along_dim(asked, 1)
    return numbers[:, asked]


def is_cut_afterwards(asked: object) -> bool:
    """Whether a forward that gets shorter gives all logits, of which some are taken afterwards.

    All, and the last row only, which `generate` asks for, are taken in the graph. Another number would be a
    symbol there, and rows that are asked for by a tensor are elsewhere in each row of a batch.
    """
    return isinstance(asked, Tensor) or asked not in (None, 0, 1)


def with_all_logits(prompt: PromptState) -> PromptState:
    """The prompt of a forward that gives all logits."""
    return replace(prompt, rest={name: given for name, given in prompt.rest.items() if name != NAME})


def keep_asked(output: Any, row_index: Tensor | None, asked: int | Tensor | None, rows: int) -> Tensor | None:
    """Let `output` have the logits that were asked for; returns the rows of the prompt that they belong to.

    Args:
        row_index: int64 ``[B, S']``, the old number of each row that is left; a tensor needs it.
        asked: `logits_to_keep`.
        rows: of the whole prompt.

    Returns:
        int64 ``[B, n]``, of a bool ``[B, S]`` that asks ``[n]``; None without `row_index`.
    """
    if row_index is not None and isinstance(asked, Tensor):
        batch = row_index.shape[0]
        numbers = numbered(torch.Size([batch, rows]), asked.to(row_index.device))
        places = torch.arange(row_index.shape[1], device=row_index.device).expand_as(row_index)
        place_of_row = row_index.new_zeros(batch, rows).scatter(1, row_index, places).flatten()
        output.logits = output.logits[numbers // rows, place_of_row[numbers]]
        return numbers % rows
    if not asked:
        return row_index
    output.logits = output.logits[:, -asked:]
    return None if row_index is None else row_index[:, -asked:]
