"""The schedules that have a name: our own presets, and the literal reading of LUVC's abstract."""

from __future__ import annotations

from typing import Any

from luvc_fx.schedule import Merge, Prune, Schedule
from luvc_fx.schedule.budget import cascade

PICK: dict[str, Any] = {"selector": "distinct", "absorb": True}
"""How the presets pick tokens: of each block the most distinct one, the others averaged into what stays.

Chosen on the ``tune`` split (examples/research/evidence/README.md).
"""


def cascaded(budget: float, layers: int) -> Schedule | None:
    """The cascade of that budget with `PICK` at every prune; None: there is none."""
    places = cascade(budget, layers)
    if places is None:
        return None
    return Schedule(prune=tuple(_pick(keep, layer=layer) for layer, keep in places))


def _pick(keep: float, **place: Any) -> Prune:
    return Prune(keep=keep, **PICK, **place)


PRESETS = {
    "image": Schedule(
        merge=(Merge(axis="width", keep=0.75, depth=0.5),),
        prune=(
            _pick(0.5, depth=0.125),
            _pick(0.25, depth=0.375),
            Prune(keep=0.0, layer=-1),
        ),
    ),
    "video": Schedule(
        merge=(
            Merge(axis="width", keep=0.75, depth=0.5),
            Merge(axis="height", keep=0.75, depth=0.75),
        ),
        prune=(
            _pick(0.5, depth=0.25),
            _pick(0.25, depth=0.5),
            Prune(keep=0.0, layer=-1),
        ),
    ),
    "document": Schedule(prune=(_pick(0.5, depth=0.5), Prune(keep=0.0, layer=-1))),
}


def _literal(keep: float, **place: Any) -> Prune:
    return Prune(keep=keep, energy="lowpass", coverage="global", **place)


LUVC = {
    "image": Schedule(
        merge=(Merge(axis="width", keep=0.75, depth=0.5),),
        prune=(_literal(0.5, depth=0.25), _literal(0.25, depth=0.5), _literal(0.0, layer=-1)),
    ),
    "video": Schedule(
        merge=(
            Merge(axis="width", keep=0.5, depth=0.25),
            Merge(axis="height", keep=0.5, depth=0.5),
        ),
        prune=(_literal(0.5, depth=0.25), _literal(0.25, depth=0.5), _literal(0.0, layer=-1)),
    ),
    "document": Schedule(prune=(_literal(0.5, depth=0.5), _literal(0.0, layer=-1))),
}
