"""Selectors by the name that a schedule gives them.

A module of its own, below `luvc_fx.schedule`, which checks names here, and `luvc_fx.selectors`, which
fills it: neither has to import the other.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from luvc_fx.schedule import Prune


@dataclass(frozen=True, slots=True)
class Site:
    """The place at which a selector is asked.

    Attributes:
        layer: the decoder layer before which the prune happens, from 0.
        layers: how many decoder layers the model has.
        grid: ``(height, width)`` of each image's tokens while all of them are there in raster order;
            None after a prune, and where the grid is not known.
        images: images in each row, one whole grid after another; 1 where `grid` is None.
        paid: float32 ``[B, N]``, the attention that the last token of each row pays to each visual token
            in the decoder layer before, mean over the heads. Only for selectors registered with
            ``attention=True``.
        attended: float32 ``[B, N]``, the attention that the mean query of this layer would pay to each
            visual token without rotary positions: over all tokens up to the last visual one, mean over the
            heads. Only for selectors registered with ``keys=True``, as `keys`.
        keys: float32 ``[B, N, heads * dim]``, the rotated keys of the visual tokens in this layer.
    """

    layer: int
    layers: int
    grid: tuple[int, int] | None = None
    images: int = 1
    paid: Tensor | None = None
    attended: Tensor | None = None
    keys: Tensor | None = None


class Selector(Protocol):
    """Chooses the visual tokens that stay; a pure function on tensors.

    It is traced once into the graph that is compiled, so its work may depend on shapes but not on
    values: no `item`, no `nonzero`, no boolean indexing, and tensors that it needs are made inside.

    Args:
        x: ``[B, N, D]``, the visual rows of the residual stream in sequence order.
        prune: the schedule item that asks.
        count: how many stay, in 1 .. N - 1.
        site: where it happens.

    Returns:
        Either floating scores ``[B, N]``, of which the `count` largest stay by `prune.coverage` (NaN
        counts as minus infinity), or int64 positions ``[B, count]``, distinct and in 0 .. N - 1.
    """

    def __call__(self, x: Tensor, prune: Prune, count: int, site: Site) -> Tensor: ...


_functions: dict[str, Selector] = {}
_attentive: set[str] = set()
_by_keys: set[str] = set()


def register(name: str, function: Selector, attention: bool = False, keys: bool = False) -> None:
    """Let schedules use `function` as ``Prune(selector=name)``, in this process and from now on.

    A name keeps its function for good, as graphs were compiled with it; registering the same one
    again does nothing.

    Args:
        attention: let it know what the last token pays to the others (`Site.paid`). That costs one row of
            the attention of the layer before, which is computed again; the layer itself stays fused.
        keys: let it know the layer's own keys and what its mean query attends to (`Site.keys`,
            `Site.attended`). That costs the layer's norm and projections once more.

    Raises:
        ValueError: a name that is no text, empty or taken, or something that cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a selector is {name!r}; allowed: a text that is not empty")
    if not callable(function):
        raise ValueError(f"selector {name!r} is {function!r}; allowed: a function (x, prune, count, site)")
    if _functions.setdefault(name, function) is not function:
        raise ValueError(f"selector {name!r} is registered already, as {_functions[name]!r}")
    if attention:
        _attentive.add(name)
    if keys:
        _by_keys.add(name)


def wants_attention(name: str) -> bool:
    """Whether the selector of that name asks for `Site.paid`."""
    return name in _attentive


def wants_keys(name: str) -> bool:
    """Whether the selector of that name asks for `Site.keys`."""
    return name in _by_keys


def registered() -> tuple[str, ...]:
    """The names in use, ours first."""
    return tuple(_functions)


def selector(name: str) -> Selector:
    """The function of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _functions:
        raise ValueError(f"selector {name!r} is not registered; there are {', '.join(map(repr, _functions))}")
    return _functions[name]


def selector_fingerprint(name: str) -> str:
    """A key of the code of the selector of that name, for compiler caches.

    The source where there is one. Something that only exists in memory counts by its bytecode, which
    does not see the functions that it calls.

    Raises:
        ValueError: there is no such selector.
    """
    function = selector(name)
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = repr(function) if code is None else f"{code.co_code!r}{code.co_consts!r}{code.co_names!r}"
    return hashlib.sha256(text.encode()).hexdigest()
