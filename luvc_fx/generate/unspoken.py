"""Numbers of features in an error message, which would make each of them a graph of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Unspoken:
    """Features that say another number where a message is made of it, so that it need not be a constant.

    What counts is `numel`, which they have in common with the real ones; everything else is theirs, too.
    """

    shape = (0, 0, 0)

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def numel(self) -> int:
        """Of the real features."""
        return self.features.numel()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.features, name)


def with_unspoken_numbers(method: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `get_placeholder_mask`, whose checks are the same in a traced call but name no numbers.

    The text of a check is made before it is known whether it is needed, and a number in a text is a constant
    to Dynamo: each number of features would be a graph of its own. Where the check fails in a graph, the
    stock model runs the call again, and says its own words.
    """

    @functools.wraps(method)
    def get_placeholder_mask(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            for name in ("image_features", "video_features"):
                if isinstance(kwargs.get(name), Tensor):
                    kwargs[name] = Unspoken(kwargs[name])
        return method(*args, **kwargs)

    return get_placeholder_mask
