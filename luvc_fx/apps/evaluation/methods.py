"""The methods that can be compared: each makes a schedule for a budget, or says that it cannot.

**Budget** is the mean over the decoder layers of the visual tokens that enter the layer, over the original
number. A method meets it up to one token a layer, VTW up to half a layer, a smaller image as its grid allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from luvc_fx.apps.bench.arms import FASTV_LAYER
from luvc_fx.schedule import Merge, Prune, Schedule, presets, round_half_up
from luvc_fx.schedule.budget import cascade
from luvc_fx.selectors import SELECTORS, SHIPPED

DEFAULT = "default"
SPECTRUM = "spectrum"
RANDOM = "random"
RANDOM_BLOCK = "random-block"

SEEDED = tuple(selector.name for selector in SELECTORS.holders("seed") if selector.name in SHIPPED)
"""Selectors of luvc_fx whose picks depend on a seed. A seed gives one set of places, the same in every image,
so that answers with a single seed would tell more about that set than about the method."""

SEEDS = 3
"""Seeds with which such a selector is run; the answers of all are counted together."""

PACT_LAYER = 4
"""PACT prunes once, before this decoder layer (its paper, arXiv 2504.08966)."""

MERGED_WIDTH = 0.75
"""Share of the token grid's width that OIM leaves, in the method that also merges."""

Maker = Callable[[float, int], Schedule | None]
"""``(budget, decoder layers) -> schedule``; None: the method cannot reach this budget."""


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the comparison.

    Attributes:
        about: a line for the people who read the table.
        own_budget: it has one schedule, whatever budget is asked for.
        smaller: images are made smaller to the budget (`luvc_fx.downsample`), and the schedule does nothing.
    """

    name: str
    make: Maker
    about: str
    own_budget: bool = False
    smaller: bool = False


def progressive(budget: float, layers: int, **options: object) -> Schedule | None:
    """The cascade of that budget with the same options at every prune; None: it cannot be reached."""
    places = cascade(budget, layers)
    if places is None:
        return None
    return Schedule(prune=tuple(Prune(keep=keep, layer=layer, **options) for layer, keep in places))  # type: ignore[arg-type]


def once(budget: float, layers: int, layer: int, **options: object) -> Schedule | None:
    """One prune before `layer`, so that the mean is `budget`; None: the layers before it cost as much."""
    keep = (budget * layers - layer) / (layers - layer) if layer < layers else 0.0
    if not 0.0 < keep <= 1.0:
        return None
    return Schedule(prune=(Prune(keep=keep, layer=layer, **options),))  # type: ignore[arg-type]


def with_selector(schedule: Schedule, selector: str, seed: int = 0) -> Schedule:
    """The same merges, layers and counts, but the tokens picked by `selector` (with `seed`, if it draws)."""
    options = {"seed": seed} if "seed" in SELECTORS.get(selector).parameters() else {}
    prune = tuple(p.with_selector(selector, **options) for p in schedule.prune)
    return dataclasses.replace(schedule, prune=prune)


def _default(budget: float, layers: int) -> Schedule | None:
    prunes = presets.cascaded(budget, layers)
    return None if prunes is None else Schedule(prune=prunes)


def _spectrum(budget: float, layers: int) -> Schedule | None:
    return progressive(budget, layers)


def _luvc(budget: float, layers: int) -> Schedule | None:
    return progressive(budget, layers, energy="lowpass", coverage="global")


def _merged(budget: float, layers: int) -> Schedule | None:
    rest = _default(budget / MERGED_WIDTH, layers)
    if rest is None:
        return None
    return dataclasses.replace(rest, merge=(Merge(axis="width", keep=MERGED_WIDTH, depth=0.5),))


def _same_counts(selector: str, **options: object) -> Maker:
    def make(budget: float, layers: int) -> Schedule | None:
        schedule = progressive(budget, layers, selector=selector, **options)
        asked_first = schedule is not None and schedule.prune[0].layer == 0 and schedule.prune[0].keep != 0.0
        return None if asked_first and SELECTORS.get(selector).needs_attention else schedule

    return make


def _fastv(budget: float, layers: int) -> Schedule | None:
    return once(budget, layers, FASTV_LAYER, selector="fastv", coverage="global")


def _vtw(budget: float, layers: int) -> Schedule | None:
    layer = round_half_up(budget * layers)
    return Schedule(prune=(Prune(tokens=0, layer=layer),)) if 0 < layer < layers else None


def _pact(budget: float, layers: int) -> Schedule | None:
    return once(budget, layers, PACT_LAYER, selector="pact", absorb=True)


def _single(budget: float, layers: int) -> Schedule | None:
    return once(budget, layers, 0, **presets.PICK)


def _last(budget: float, layers: int) -> Schedule | None:
    return Schedule(prune=(Prune(keep=0.0, layer=-1),))


_TABLE = (
    Method(
        DEFAULT,
        _default,
        "ours, as in the presets: the cascade to zero, of each block the most distinct one, the others "
        "averaged in",
    ),
    Method("default+merge", _merged, f"OIM to {MERGED_WIDTH:.0%} of the width, then the same cascade"),
    Method(SPECTRUM, _spectrum, "the same counts, of each block the largest residual of the spectrum"),
    Method("luvc", _luvc, "the abstract read literally: low-pass energy, the best of all"),
    Method(RANDOM, _same_counts(RANDOM), f"the same counts, tokens at random, mean of {SEEDS} seeds"),
    Method(
        RANDOM_BLOCK,
        _same_counts(RANDOM_BLOCK),
        f"the same counts, one at random of each block as for the spectrum, mean of {SEEDS} seeds",
    ),
    Method(
        "random+absorb",
        _same_counts(RANDOM, absorb=True),
        f"random tokens into which the others are averaged, as in the default, mean of {SEEDS} seeds",
    ),
    Method("uniform", _same_counts("uniform"), "the same counts, evenly spaced"),
    Method("norm", _same_counts("norm", coverage="global"), "the same counts, the longest tokens of all"),
    Method("distinct", _same_counts("distinct"), "the default without the averaging, of each block"),
    Method(
        "diversity",
        _same_counts("diversity"),
        "the same counts, of each block the least like the pivots",
    ),
    Method("fastv", _fastv, f"once before layer {FASTV_LAYER}, by the last token's attention"),
    Method("pact", _pact, f"once before layer {PACT_LAYER}: PACT's cluster centres, the others averaged in"),
    Method("vtw", _vtw, "all tokens leave before layer K = round(p L), at budget p of L layers"),
    Method("single-shot", _single, "as the default, but once, before layer 0"),
    Method("downsample", lambda budget, layers: Schedule(), "a smaller image, all its tokens", smaller=True),
    Method("last", _last, "zero at the last layer alone", own_budget=True),
)


def methods() -> Mapping[str, Method]:
    """All methods by name: those of the table, then the selectors of luvc_fx that it leaves out."""
    table = {method.name: method for method in _TABLE}
    for name in SHIPPED:
        about = f"the same counts, by the selector {name!r}"
        table.setdefault(name, Method(name, _same_counts(name), about))
    return MappingProxyType(table)
