"""What the schedules with a name do: our own presets, and the literal reading of LUVC's abstract.

They are items of schedules here; `Schedule.preset` and `Schedule.luvc` make schedules of them.
"""

from __future__ import annotations

from typing import Any

from luvc_fx.schedule.budget import cascade
from luvc_fx.schedule.merge import Merge
from luvc_fx.schedule.prune import Prune

PICK: dict[str, Any] = {"selector": "distinct", "absorb": True}
"""How the presets pick tokens: of each block the most distinct one, the others averaged into what stays.

Chosen on the ``tune`` split (examples/research/evidence/README.md).
"""


def cascaded(budget: float, layers: int) -> tuple[Prune, ...] | None:
    """The prunes of the cascade of that budget, with `PICK` at each; None: there is no such cascade."""
    places = cascade(budget, layers)
    if places is None:
        return None
    return tuple(_pick(keep, layer=layer) for layer, keep in places)


def _pick(keep: float, **place: Any) -> Prune:
    return Prune(keep=keep, **PICK, **place)


Items = dict[str, tuple[Any, ...]]
"""The `Merge` and `Prune` items of a schedule, by its fields."""

PRESETS: dict[str, Items] = {
    "image": {
        "merge": (Merge(axis="width", keep=0.75, depth=0.5),),
        "prune": (
            _pick(0.5, depth=0.125),
            _pick(0.25, depth=0.375),
            Prune(keep=0.0, layer=-1),
        ),
    },
    "video": {
        "merge": (
            Merge(axis="width", keep=0.75, depth=0.5),
            Merge(axis="height", keep=0.75, depth=0.75),
        ),
        "prune": (
            _pick(0.5, depth=0.25),
            _pick(0.25, depth=0.5),
            Prune(keep=0.0, layer=-1),
        ),
    },
    "document": {"prune": (_pick(0.5, depth=0.5), Prune(keep=0.0, layer=-1))},
}


def _literal(keep: float, **place: Any) -> Prune:
    return Prune(keep=keep, energy="lowpass", coverage="global", **place)


LUVC: dict[str, Items] = {
    "image": {
        "merge": (Merge(axis="width", keep=0.75, depth=0.5),),
        "prune": (_literal(0.5, depth=0.25), _literal(0.25, depth=0.5), _literal(0.0, layer=-1)),
    },
    "video": {
        "merge": (
            Merge(axis="width", keep=0.5, depth=0.25),
            Merge(axis="height", keep=0.5, depth=0.5),
        ),
        "prune": (_literal(0.5, depth=0.25), _literal(0.25, depth=0.5), _literal(0.0, layer=-1)),
    },
    "document": {"prune": (_literal(0.5, depth=0.5), _literal(0.0, layer=-1))},
}
