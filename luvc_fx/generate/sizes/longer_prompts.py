"""The same prompt with more text: what a prompt of another length gives to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from luvc_fx.generate.families import TOKEN_TYPES, placeholders


def token_wise(given: Mapping[str, Any]) -> list[str]:
    """The arguments of `generate` that have one place for each token of the prompt."""
    shape = given["input_ids"].shape
    return [name for name, value in given.items() if isinstance(value, Tensor) and value.shape == shape]


def can_lengthen(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether `longer` can make this prompt longer.

    Everything in it that has a place for each token must be known, as nobody knows how other things go on;
    and its first row must hold text.
    """
    known = {"input_ids", "attention_mask", *TOKEN_TYPES}
    along = {name for name in given if name.endswith(("_ids", "_mask", "_embeds", "_position"))}
    return along <= known and along <= set(token_wise(given)) and bool(text_of_first_row(model, given).any())


def can_pad(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether `longer` can pad one row of several."""
    several = given["input_ids"].shape[0] > 1
    return several and "attention_mask" in given and can_lengthen(model, given)


def text_of_first_row(model: Any, given: Mapping[str, Any]) -> Tensor:
    """Which tokens of the first row are text; with `attention_mask`, seen text."""
    text = ~placeholders(model, given["input_ids"])[0]
    mask = given.get("attention_mask")
    return text if mask is None else text & (mask[0] != 0)


def longer(model: Any, given: dict[str, Any], more: int, padded: bool) -> dict[str, Any]:
    """A prompt with more text behind each row.

    Args:
        given: arguments of `generate` for which `can_lengthen` is true.
        more: tokens behind each row.
        padded: pad the first row on the left by one token more than that, and lengthen the others by as many.
    """
    if not more and not padded:
        return given
    more = more + 1 if padded else more
    last = int(text_of_first_row(model, given).nonzero().max())
    lengthened = dict(given)
    for name in token_wise(given):
        value = given[name]
        # Repeating one column of text gives everything in it (type ids, a mask) its right value.
        column = value[:1, last : last + 1].expand(value.shape[0], more)
        lengthened[name] = torch.cat([value, column], dim=1)
        if padded:
            # No token looks at padding, so any text token serves for it.
            front = column[:1] if name != "attention_mask" else torch.zeros_like(column[:1])
            lengthened[name][:1] = torch.cat([front, value[:1]], dim=1)
    return lengthened
