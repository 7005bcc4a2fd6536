"""When a call fails in our hands: the stock model runs it, as if luvc_fx were not there.

The stock model is the judge of whose fault it was. If it raises as well, the call itself is wrong, and the
caller sees the stock model's error. Else the fault is ours: the caller gets the stock model's result, and the
report says what happened.
"""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.generate.cache import PrunedRows
from luvc_fx.report import NotRewritten, Reason, Refusal
from luvc_fx.report.errors import brief

GIVE_UP_AFTER = 3
"""Failures of one kind in a row, without a success between them, after which it is not tried again."""

LONGEST = 100
"""Characters of Dynamo's own words that a refusal repeats."""


class PromptMismatch(ValueError):
    """A prompt has not as many placeholders as its images have features; the stock model says so better."""

    def __init__(self, tokens: int, features: int) -> None:
        super().__init__(f"features and placeholders do not match, tokens: {tokens}, features: {features}")


class LostCacheError(RuntimeError):
    """A call failed over a cache that the stock model cannot go on with."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"{described(cause)}. The stock model cannot go on from here: the cache misses visual tokens, or "
            "has rows of this call; start again with an empty cache, after luvc_fx.restore(model) if need be"
        )
        self.cause = cause


def is_refusal(error: BaseException) -> bool:
    """Whether an error is a `NotRewritten`, by itself or inside one of Dynamo's."""
    return isinstance(getattr(error, "inner_exception", error), NotRewritten)


def described(error: Exception) -> str:
    """One line about what went wrong."""
    ended = _compat.graph_break(error)
    if ended is None:
        cause = getattr(error, "inner_exception", error)  # of what Dynamo raises around others' errors
        return brief(cause if isinstance(cause, Exception) else error)
    place, why = ended
    return f"the decoder is no single graph: Dynamo ended it at {place} ({textwrap.shorten(why, LONGEST)})"


def refusal_of(error: Exception, given_up: bool) -> Refusal:
    """What the report says of an error of ours.

    Args:
        given_up: whether calls of this kind are not tried any more.
    """
    text = f"{described(error)}; the stock model ran this call, with all visual tokens"
    if given_up:
        text += (
            f", and after {GIVE_UP_AFTER} failures in a row it will run all like it; luvc_fx.restore(model) "
            "and luvc_fx.compile(model, ...) try again"
        )
    return Refusal(Reason.FELL_BACK, text)


class CacheState:
    """What a cache held before a call, by reference: nothing is copied on the device.

    Args:
        cache: any of transformers, or None.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._attributes = {} if cache is None else dict(vars(cache))
        self._class = type(cache)
        self._layers = [(layer, dict(vars(layer))) for layer in self._attributes.get("layers", ())]
        self._versions = [
            (held, _version(held))
            for _, attributes in self._layers
            for held in attributes.values()
            if isinstance(held, Tensor)
        ]

    def restore(self) -> bool:
        """Put back what the cache held; returns whether the stock model can go on with it.

        It cannot where the cache misses visual tokens, nor where a tensor of the cache was written to.
        """
        if self._cache is None:
            return True
        if self._is_shortened() or any(
            version is None or _version(held) != version for held, version in self._versions
        ):
            return False
        if type(self._cache) is not self._class:
            self._cache.__class__ = self._class
        _put_back(self._cache, self._attributes)
        if "layers" in self._attributes:
            self._cache.layers[:] = [layer for layer, _ in self._layers]
        for layer, attributes in self._layers:
            _put_back(layer, attributes)
        return True

    def _is_shortened(self) -> bool:
        """Whether any layer held fewer rows than the conversation had."""
        if not issubclass(self._class, PrunedRows):
            return False
        rows = {_rows(attributes) for _, attributes in self._layers}
        return bool(self._attributes.get("dropped_rows")) or len(rows) > 1


def _rows(layer: dict[str, Any]) -> int:
    keys = layer.get("keys")
    return keys.shape[-2] if isinstance(keys, Tensor) and keys.dim() > 1 else 0


def _put_back(owner: Any, attributes: dict[str, Any]) -> None:
    vars(owner).clear()
    vars(owner).update(attributes)


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count it (in inference mode)."""
    return None if tensor.is_inference() else tensor._version


class Failures:
    """Which calls failed in our hands, so that they are not tried again.

    A call is known by its arguments: sizes of tensors, values of everything plain. Threads may share this.

    Attributes:
        total: how many there were.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: set[Any] = set()
        self._in_a_row = 0
        self.total = 0

    @property
    def given_up(self) -> bool:
        """Whether nothing is tried any more."""
        return self._in_a_row >= GIVE_UP_AFTER

    def __contains__(self, kwargs: Mapping[str, Any]) -> bool:
        return self.given_up or (bool(self._calls) and arguments_key(kwargs) in self._calls)

    def add(self, kwargs: Mapping[str, Any]) -> None:
        """A call with these arguments failed."""
        with self._lock:
            self._calls.add(arguments_key(kwargs))
            self._in_a_row += 1
            self.total += 1

    def succeeded(self) -> None:
        """A call of this kind did not fail."""
        if self._in_a_row and not self.given_up:
            with self._lock:
                self._in_a_row = 0


def arguments_key(kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells calls apart for `Failures`.

    >>> arguments_key({"use_cache": True, "input_ids": torch.zeros(1, 2), "labels": None})
    (('input_ids', ((1, 2), 'torch.float32')), ('use_cache', 'True'))
    """
    return tuple(
        (name, (tuple(given.shape), str(given.dtype)) if isinstance(given, Tensor) else _shown(given))
        for name, given in sorted(kwargs.items())
        if given is not None
    )


def _shown(given: Any) -> str:
    return repr(given) if isinstance(given, (bool, int, float, str)) else type(given).__name__


class RandomState:
    """The random numbers' state of the CPU and of one device, to draw the same ones again.

    Args:
        device: that a model runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
        self._other = None if self._module is None else self._module.get_rng_state(device)

    def restore(self) -> None:
        """Draw again from where this was made."""
        torch.set_rng_state(self._cpu)
        if self._module is not None:
            self._module.set_rng_state(self._other, self._device)
