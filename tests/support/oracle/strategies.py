"""Schedules for property tests: anything valid for a model, and no luck about sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from luvc_fx.schedule import (
    AXES,
    COVERAGES,
    ENERGIES,
    FEATURES,
    NORMALIZATIONS,
    PAIRINGS,
    Merge,
    Prune,
    Schedule,
    round_half_up,
)
from luvc_fx.selectors import SELECTORS, Selector
from tests.support.oracle.vision import target_blocks

_SELECTORS = (*["spectrum"] * 4, "random", "uniform", "norm")
_EXACT = ("auto", "fft", "basis")
"""Realizations that keep what the definition keeps; a short window may differ in close cases."""

_FRACTIONS = st.one_of(st.sampled_from([0.1, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0]), st.floats(0.02, 1.0))


@st.composite
def _merge_items(
    draw: st.DrawFn,
    blocks: int,
    last: int,
    grids: Sequence[tuple[int, int]],
    most: int,
    unit: int,
    ragged: bool,
) -> tuple[tuple[Merge, ...], list[tuple[int, int]]]:
    place = st.tuples(st.integers(0, last), st.sampled_from(AXES))
    places = draw(st.lists(place, unique=True, max_size=most)) if blocks else []
    sides = {axis: [grid[i] for grid in grids] for i, axis in enumerate(("height", "width"))}
    items: dict[int, Merge] = {}
    for i in sorted(range(len(places)), key=lambda i: places[i][0]):
        block, axis = places[i]
        if draw(st.booleans()):
            amount: dict[str, Any] = {"keep": draw(_FRACTIONS)}
        else:
            step = 1 if ragged else unit
            amount = {"length": step * draw(st.integers(1, min(sides[axis]) // step))}
        depth = (block + 1 + draw(st.sampled_from([-0.25, 0.0, 0.25]))) / blocks
        how = draw(st.sampled_from(["layer", "negative", "depth"]))
        if how == "depth" and 0 < depth < 1 and Merge(axis, keep=1.0, depth=depth).block(blocks) == block:
            where: dict[str, Any] = {"depth": depth}
        else:
            where = {"layer": block - blocks if how == "negative" else block}
        items[i] = Merge(
            axis=axis,
            **amount,
            **where,
            pairing=draw(st.sampled_from(PAIRINGS)),
            feature=draw(st.sampled_from(FEATURES)),
        )
        sides[axis] = [unit * target_blocks(items[i], side // unit, unit) for side in sides[axis]]
    left = list(zip(sides["height"], sides["width"], strict=True))
    return tuple(items[i] for i in range(len(places))), left


def _selectors(name: str) -> st.SearchStrategy[Selector]:
    """Any parameters of the selector of that name."""
    of_all: dict[str, st.SearchStrategy[Any]] = {
        "energy": st.sampled_from(ENERGIES),
        "cutoff": st.one_of(st.sampled_from([0.1, 0.25, 0.5, 1.0]), st.floats(0.01, 1.0)),
        "seed": st.integers(0, 5),
        "normalize": st.sampled_from(NORMALIZATIONS),
        "per_image": st.booleans(),
        "realization": st.sampled_from(_EXACT),
    }
    default = SELECTORS.get(name)
    return st.builds(type(default), **{field: of_all[field] for field in default.parameters()})


@st.composite
def _prune_items(draw: st.DrawFn, layers: int, fused: int, most: int) -> tuple[Prune, ...]:
    places = draw(st.lists(st.integers(0, layers - 1), unique=True, max_size=most))
    items: dict[int, Prune] = {}
    left, most_keep = fused, 1.0
    for layer in sorted(places):
        # one fraction decides both, so that nothing left is an option and not the rule
        fraction = 0.0 if draw(st.integers(0, 7)) == 7 else draw(_FRACTIONS)
        keep = fraction * most_keep
        amount: dict[str, Any] = {"keep": keep}
        if draw(st.booleans()) or Prune(keep=keep, layer=0).count(fused) > left:
            amount = {"tokens": round_half_up(fraction * left)}
        depth = (layer + draw(st.sampled_from([-0.25, 0.0, 0.25]))) / layers
        how = draw(st.sampled_from(["layer", "negative", "depth"]))
        if how == "depth" and 0 < depth < 1 and Prune(1.0, depth=depth).decoder_layer(layers) == layer:
            where: dict[str, Any] = {"depth": depth}
        else:
            where = {"layer": layer - layers if how == "negative" else layer}
        items[layer] = Prune(
            **amount,
            **where,
            selector=draw(st.sampled_from(_SELECTORS).flatmap(_selectors)),
            coverage=draw(st.sampled_from(COVERAGES)),
        )
        left = items[layer].count(fused)
        most_keep = keep if "keep" in amount else most_keep
    return tuple(items[layer] for layer in places)


@st.composite
def schedules(
    draw: st.DrawFn,
    blocks: int = 3,
    grid: tuple[int, int] = (8, 8),
    layers: int = 4,
    *,
    images: int = 1,
    merges: int = 3,
    prunes: int = 3,
    unit: int = 1,
    ragged: bool = False,
    grids: Sequence[tuple[int, int]] | None = None,
    last: int | None = None,
    fused: Callable[[tuple[Merge, ...]], int] | None = None,
) -> Schedule:
    """Valid schedules for a model.

    Args:
        blocks: encoder blocks that feed the features (`encoder_blocks`); layers: of the decoder.
        grid: patches (height, width) of one image; images: images (tiles) in each row.
        merges, prunes: how many of each at most; no merges where `merges` is 0.
        unit: `unit` x `unit` patches become one feature: 1 for LLaVA, 2 for InternVL.
        ragged: also draw lengths that are not whole blocks, which have to be rounded up.
        grids: where a row's images (and frames of videos) are of other sizes, the patches (height,
            width) of each, in place of `grid` and `images`.
        last: the last encoder block after which tokens may merge.
        fused: where it does not follow from the grids, how many visual tokens a row has at the fusion
            after these merges.
    """
    own = [grid] * images if grids is None else grids
    merge, left = draw(_merge_items(blocks, blocks - 1 if last is None else last, own, merges, unit, ragged))
    count = sum((height // unit) * (width // unit) for height, width in left)
    if fused is not None:
        count = fused(merge)
    prune = draw(_prune_items(layers, count, prunes))
    schedule = Schedule(merge=merge, prune=prune)
    schedule.merges_at(blocks)
    schedule.prunes_at(layers)
    schedule.prunes_at(layers, count)
    return schedule
