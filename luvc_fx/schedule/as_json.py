"""Merges and prunes as flat JSON objects: a method's name and parameters beside the other fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from luvc_fx.mergers import MERGERS
from luvc_fx.methods.checks import refuse, shown
from luvc_fx.methods.registry import Registry
from luvc_fx.ops.oim import AXES
from luvc_fx.schedule.merge import Merge
from luvc_fx.schedule.prune import Prune
from luvc_fx.selectors import SELECTORS

# The field that holds the method, its default, and who knows the names.
_METHODS: dict[type, tuple[str, str, Registry[Any]]] = {
    Merge: ("method", "oim", MERGERS),
    Prune: ("selector", "spectrum", SELECTORS),
}

# The keys of version 1, in their order. They are written for every method, also for one that has no such
# parameter (with the default of one that has), so that a file reads and looks the same with each luvc_fx.
_KEYS: dict[type, tuple[str, ...]] = {
    Merge: ("axis", "keep", "length", "layer", "depth", "pairing", "feature", "method"),
    Prune: (
        *("keep", "tokens", "layer", "depth", "selector", "energy", "coverage", "cutoff", "seed"),
        *("normalize", "per_image", "realization", "absorb"),
    ),
}


def write_item(item: Merge | Prune) -> dict[str, Any]:
    """An object that `read_items` reads; what is None is left out."""
    kind = type(item)
    method_field, _, registry = _METHODS[kind]
    method = getattr(item, method_field)
    given = {field.name: getattr(item, field.name) for field in dataclasses.fields(kind)}
    given |= {method_field: method.name, **method.parameters()}
    values = {key: given[key] if key in given else _default(registry, key) for key in _KEYS[kind]}
    return {key: value for key, value in (values | given).items() if value is not None}


def _default(registry: Registry[Any], parameter: str) -> Any:
    """The default of the first method that has such a parameter."""
    return registry.holders(parameter)[0].parameters()[parameter]


def read_items(field: str, kind: type, items: object) -> tuple[Any, ...]:
    """Merges or prunes from a list of objects.

    Args:
        field: of the schedule, ``"merge"`` or ``"prune"``; kind: `Merge` or `Prune`.

    Raises:
        ValueError: no list of objects, an unknown key, or a value that is not allowed.
    """
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        refuse("Schedule", field, items, "a list of objects")
    return tuple(_read_item(kind, item) for item in items)


def _read_item(kind: type, item: Mapping[str, Any]) -> Any:
    method_field, default, registry = _METHODS[kind]
    if kind is Merge and "axis" not in item:
        refuse("Merge", "axis", None, ", ".join(map(repr, AXES)))
    fields = {field.name for field in dataclasses.fields(kind)}
    methods = [registry.get(name) for name in registry.names()]
    check_keys(kind.__name__, item, fields.union(*(method.parameters() for method in methods)))
    name = item.get(method_field, default)
    own: dict[str, Any] = next((method.parameters() for method in methods if method.name == name), {})
    taken = {key: value for key, value in item.items() if key in fields or key in own}
    for key in item.keys() - taken.keys():
        # Files of luvc_fx 0.1.0 list the parameters of all methods: those of others are checked, and go.
        dataclasses.replace(registry.holders(key)[0], **{key: item[key]})
    return kind(**taken)


def check_keys(owner: str, body: Mapping[str, Any], allowed: set[str]) -> None:
    """An object has no other keys than these. Raises `ValueError` where it has."""
    unknown = sorted(set(body) - allowed)
    if unknown:
        raise ValueError(f"{owner} has unknown keys {shown(unknown)}; allowed: {sorted(allowed)}")
