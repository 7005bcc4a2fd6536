"""Selectors of third parties: functions that are registered under a name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from luvc_fx.methods.checks import set_integer, shown
from luvc_fx.methods.registry import code_key
from luvc_fx.selectors.base import SELECTORS, Selector, Site
from luvc_fx.selectors.spectrum import check_filter

if TYPE_CHECKING:
    from torch import Tensor

    from luvc_fx.schedule import Prune


class SelectorFunction(Protocol):
    """Chooses the visual tokens that stay: what `Selector.__call__` does, from the prune that asks.

    Args:
        x: ``[B, N, D]``, the visual rows of the residual stream in sequence order.
        prune: the schedule item that asks, with the parameters of `OwnSelector`: ``prune.seed``.
        count: how many stay, in 1 .. N - 1.
        site: where it happens.

    Returns:
        Floating scores ``[B, N]`` or int64 positions ``[B, count]``, as `Selector.__call__` does. The
        same rules hold: the function is traced once, so its work may depend on shapes but not on values.
    """

    def __call__(self, x: Tensor, prune: Prune, count: int, site: Site) -> Tensor: ...


@dataclass(slots=True)
class _Registered:
    function: SelectorFunction
    attention: bool
    keys: bool


_REGISTERED: dict[str, _Registered] = {}


@dataclass(frozen=True, slots=True)
class OwnSelector(Selector):
    """A registered function, as a schedule holds it: by its name.

    Its parameters are those that every `Prune` had before selectors carried their own. A function may read
    them from the prune that asks, and give them any meaning.
    """

    name: str = field()
    energy: str = "residual"
    cutoff: float = 0.25
    normalize: str = "none"
    per_image: bool = False
    realization: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_filter(self)
        set_integer(self, "seed", 0, "a whole number of at least 0")

    @property
    def needs_last_query_attention(self) -> bool:
        return _REGISTERED[self.name].attention

    @property
    def needs_keys(self) -> bool:
        return _REGISTERED[self.name].keys

    @property
    def positions_are_checked(self) -> bool:
        return True

    @property
    def reads_place(self) -> bool:
        return True

    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        raise TypeError(f"the selector {self.name!r} is a function of the prune that asks: call `choose`")

    def answer(self, x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
        return _REGISTERED[self.name].function(x, prune, count, site)


def register(name: str, function: SelectorFunction, attention: bool = False, keys: bool = False) -> None:
    """Let schedules use `function` as ``Prune(selector=name)``, in this process and from now on.

    A name keeps its function for good, as graphs were compiled with it; registering the same one
    again does nothing.

    Args:
        function: ``(x, prune, count, site)`` to scores or positions, see `SelectorFunction`.
        attention: it reads what the last token pays to the others (`Site.last_query_attention`). That costs
            one row of the attention of the layer before, which is computed again; the layer itself stays
            fused.
        keys: it reads the layer's own keys and what the mean query attends to (`Site.keys`,
            `Site.mean_query_attention`). That costs the layer's norm and projections once more.

    Raises:
        ValueError: a name that is no text, empty or taken, or something that cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a selector is {shown(name)}; allowed: a text that is not empty")
    if not callable(function):
        raise ValueError(
            f"selector {name!r} is {shown(function)}; allowed: a function (x, prune, count, site)"
        )
    known = _REGISTERED.get(name)
    if known is None and name not in SELECTORS.names():
        _REGISTERED[name] = _Registered(function, attention, keys)
        SELECTORS.put(OwnSelector(name))
    elif known is None or known.function is not function:
        taken = type(SELECTORS.get(name)) if known is None else known.function
        raise ValueError(f"selector {name!r} is registered already, as {taken!r}")
    else:
        known.attention, known.keys = known.attention or attention, known.keys or keys


def unregister(name: str) -> None:
    """Forget a registered function, so that its name is free again.

    For tests. What was compiled with it stays as it is, and a model compiled with a schedule of that name is
    not compiled again: restore it first.

    Raises:
        ValueError: there is no such function.
    """
    if name not in _REGISTERED:
        raise ValueError(f"selector {name!r} is no registered function; there are {sorted(_REGISTERED)}")
    SELECTORS.remove(name)
    del _REGISTERED[name]


def selector_fingerprint(name: str) -> str:
    """A key of the code of the selector of that name, for caches: see `luvc_fx.methods.registry.code_key`.

    Raises:
        ValueError: there is no such selector.
    """
    known = _REGISTERED.get(name)
    return SELECTORS.fingerprint(name) if known is None else code_key(known.function)
