"""Hooks on the methods of one model instance: put on, and taken off again. No class is changed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Hook:
    """A callable that stands for a method of one instance; `inspect.signature` sees the method's own.

    Args:
        body: what a call runs.
        wrapped: the method that it stands for.
    """

    def __init__(self, body: Callable[..., Any], wrapped: Callable[..., Any]) -> None:
        functools.update_wrapper(self, wrapped)
        self._body = body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._body(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_copies()


class HookedMethod:
    """One method of one instance, and what it was when this was made.

    Args:
        owner: the instance.
        name: of its method.
        default: what the method is taken to be where the instance has none.

    Attributes:
        original: the callable that `owner.name` was, or `default`.
    """

    def __init__(self, owner: Any, name: str, default: Callable[..., Any] | None = None) -> None:
        self.owner = owner
        self.name = name
        known = getattr(owner, name) if default is None else getattr(owner, name, default)
        self.original: Callable[..., Any] = known
        self._own_attribute = vars(owner).get(name, _ABSENT)

    def hook(self, body: Callable[..., Any]) -> None:
        """Let calls run `body`; copying or pickling the instance is an error from now on."""
        self.replace(Hook(body, self.original))

    def replace(self, method: Callable[..., Any]) -> None:
        """Put `method` on the instance as it is."""
        setattr(self.owner, self.name, method)

    def restore(self) -> None:
        """Take off what was put on; an attribute that the instance had of its own is there again."""
        if self._own_attribute is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._own_attribute)


def refuse_copies(*_: Any) -> Any:
    """In place of a compiled instance's `__reduce_ex__`, by which `copy` and `pickle` take it to pieces.

    They come to the hooks late or never: transformers' own, which no pickle takes, lie before them.
    """
    raise ValueError(
        "a model compiled by luvc_fx cannot be copied or pickled: its hooks belong to one instance; "
        "call luvc_fx.restore(model) first"
    )


def arguments_by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a call by their names, those that only ``**kwargs`` takes among them.

    >>> arguments_by_name(inspect.signature(lambda a, **more: None), (1,), {"b": 2})
    {'a': 1, 'b': 2}
    """
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named
