"""What merges and prunes share: their layer, and reading a parameter of their method."""

from __future__ import annotations

import dataclasses
from typing import Any

from luvc_fx.methods.checks import refuse


def resolve_layer(owner: str, layer: int, count: int, what: str) -> int:
    """The index of a layer, of which negative ones count from the end, out of `count`.

    Args:
        owner, what: for the message: ``"Prune"``, ``"decoder layers"``.

    Raises:
        ValueError: there is no such layer.
    """
    if not -count <= layer < count:
        refuse(owner, "layer", layer, f"{-count} to {count - 1}, as the model has {count} {what}")
    return layer % count


def parameter_of(item: Any, field: str, name: str) -> Any:
    """What ``item.name`` is where `item` itself has no such attribute: a parameter of the method in `field`.

    Raises:
        AttributeError: the method has no such parameter, or `item` holds no method yet, as while it is
            being unpickled.
    """
    fields = {one.name for one in dataclasses.fields(item)}
    if name not in fields and not name.startswith("_"):
        parameters = getattr(item, field).parameters()
        if name in parameters:
            return parameters[name]
    raise AttributeError(f"{type(item).__name__!r} object has no attribute {name!r}")
