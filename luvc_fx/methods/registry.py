"""Methods by the name that a schedule gives them.

A method is a frozen dataclass: its fields are its parameters, each with a default, and its `name` is what
schedules, JSON files and commands call it. A registry is the one place that knows which names there are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

from luvc_fx.methods.checks import refuse


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """What can be named in a schedule; equal by class and parameters, and hashable.

    Attributes:
        name: what schedules call it. A class attribute, so that it is no parameter.
    """

    name = ""

    def parameters(self) -> dict[str, Any]:
        """The parameters by name, in the order of the class."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "name")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return self.name


M = TypeVar("M", bound=Method)


def code_key(code: Any) -> str:
    """A key of the code of a function or class, for caches.

    The source where there is one. Something that only exists in memory counts by its bytecode, which does not
    see the functions that it calls.
    """
    try:
        text = inspect.getsource(code)
    except (OSError, TypeError):
        inner = getattr(code, "__code__", None)
        text = repr(code) if inner is None else f"{inner.co_code!r}{inner.co_consts!r}{inner.co_names!r}"
    return hashlib.sha256(text.encode()).hexdigest()


class Registry(Generic[M]):
    """The methods of one kind by name, each as an instance with its default parameters.

    Args:
        kind: what the methods are called in messages, ``"selector"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._defaults: dict[str, M] = {}
        self._shipped: list[type[M]] = []

    def add(self, method: type[M]) -> type[M]:
        """Class decorator of a method that comes with luvc_fx; `discover` then enters it."""
        self._shipped.append(method)
        return method

    def put(self, default: M) -> None:
        """Enter a method.

        Args:
            default: it with its default parameters.

        Raises:
            ValueError: its name is empty or taken.
        """
        if not default.name or default.name in self._defaults:
            raise ValueError(f"the {self.kind} {default!r} needs a name of its own; it is {default.name!r}")
        self._defaults[default.name] = default

    def remove(self, name: str) -> None:
        """Take a method out again. Raises `ValueError` where there is none of that name."""
        del self._defaults[self.get(name).name]

    def discover(self, package: str, path: Iterable[str]) -> None:
        """Import every module of a package, and enter the classes that they `add`, by name.

        Args:
            package: its full name; path: its ``__path__``.
        """
        for module in pkgutil.iter_modules(path):
            importlib.import_module(f"{package}.{module.name}")
        for method in sorted(self._shipped, key=lambda method: method.name):
            self.put(method())

    def names(self) -> tuple[str, ...]:
        """Those that come with luvc_fx in alphabetical order, then others as they came."""
        return tuple(self._defaults)

    def get(self, name: str) -> M:
        """The method of that name with its default parameters.

        Raises:
            ValueError: there is none.
        """
        if name not in self._defaults:
            there = ", ".join(map(repr, self._defaults))
            raise ValueError(f"{self.kind} {name!r} is not registered; there are {there}")
        return self._defaults[name]

    def fingerprint(self, name: str) -> str:
        """A key of the code of the class of that name. Raises `ValueError` where there is none."""
        return code_key(type(self.get(name)))

    def make(self, owner: str, field: str, value: object, parameters: Mapping[str, Any]) -> M:
        """A method from its name, or from an instance, with some parameters changed.

        Args:
            owner, field: where `value` stands, for messages: ``"Prune"`` and ``"selector"``.
            value: a name, or an instance of a registered class.
            parameters: those that differ from the defaults, or from the instance's.

        Raises:
            ValueError: naming the field, its value and what is allowed: for an unknown name, a parameter
                that this method does not have, or a value that the method refuses.
        """
        if isinstance(value, str) and value in self._defaults:
            method = self._defaults[value]
        elif isinstance(value, Method) and type(self._defaults.get(value.name)) is type(value):
            method = cast(M, value)
        else:
            refuse(owner, field, value, ", ".join(map(repr, self._defaults)))
        own = method.parameters()
        for name, given in parameters.items():
            if name not in own:
                has = f"only {', '.join(own)}" if own else "none"
                allowed = f"parameters of the {self.kind} {method.name!r}, which has {has}"
                refuse(owner, name, given, allowed)
        return dataclasses.replace(method, **parameters) if parameters else method

    def holders(self, parameter: str) -> tuple[M, ...]:
        """The methods that have a parameter of that name; those that inherit it come last."""
        found = (method for method in self._defaults.values() if parameter in method.parameters())
        return tuple(sorted(found, key=lambda method: len(type(method).__mro__)))
