"""Insert the steps of a merger behind encoder blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from luvc_fx.anatomy.axes.lengths import Counts
from luvc_fx.anatomy.encoder import Encoder
from luvc_fx.graph.emit import constant, emit
from luvc_fx.graph.merge_operator import MERGE
from luvc_fx.graph.notes import SHRUNK, Merged
from luvc_fx.mergers import PatchGrid
from luvc_fx.mergers.site import GridSite, GridStep, merge_at_site
from luvc_fx.passes.support.context import Context
from luvc_fx.passes.support.merge_angles import find_angles, turn_followers
from luvc_fx.passes.support.place_features import answer_representatives, place_features
from luvc_fx.plan import Grid, MergeSite, side_counts
from luvc_fx.report import Insertion, MergeStep
from luvc_fx.schedule import Schedule


def merge_tokens(context: Context) -> None:
    """Merge at every planned site; `context.representatives` then holds the representatives.

    With two images of 4 x 4 patches, of which the width merges to 2 behind block 0::

        %block_0 : [2, 16, 8] = add(%x, %mlp)
        %norm : [2, 16, 8] = layer_norm(%block_0, ...)

    becomes, where each pair of neighbouring columns is averaged by size::

        %block_0 : [2, 16, 8] = add(%x, %mlp)
        %grid : [2, 4, 4, 8] = view(%block_0, [2, 4, 4, 8])
        %sum : [2, 4, 2, 8] = ...
        %sizes : [2, 4, 2, 1] = ...
        %mean : [2, 4, 2, 8] = div(%sum, %sizes)
        %merged : [2, 8, 8] = view(%mean, [2, 8, 8])
        %norm : [2, 8, 8] = layer_norm(%merged, ...)
    """
    encoder = context.anatomy.encoder
    if encoder is None:
        return
    state: tuple[fx.Node, ...] = ()  # sizes and representatives behind the last site
    leaving = encoder.leaving[-1]
    for site in context.plan.merges:
        context.retarget.advance(site.node)
        insertion = _insertion(site)
        name = insertion.name
        angles = find_angles(context, site)
        extra = () if angles is None else (angles,)
        keys = site.keys if any(step.merge.method.needs_keys for step in site.steps) else ()
        runs = [constant(context.graph, step.runs, site.node) for step in site.steps if step.runs is not None]
        if site.sides is None:
            body = _merge_body(site, encoder, len(extra), len(keys), len(runs))
            results = emit(context.graph, name, body, site.node, *extra, *keys, *runs, *state)
        else:
            body = _operator_body(context, site, site.sides, len(extra), len(keys), len(state))
            nodes = [side for side in site.sides if isinstance(side, fx.Node)]
            results = emit(context.graph, name, body, site.node, *extra, *keys, *state, *nodes)
        merged, *rest = results
        merged.meta[SHRUNK] = Merged(site.block, site.node.name, site.merged)
        if angles is not None:
            turn_followers(context, name, site, angles, rest.pop(0))
        state = tuple(rest)
        context.retarget.replace(site.node, merged, _counts_behind(encoder, site))
        leaving = merged if site.node is leaving else leaving
        context.report.inserted.append(insertion)
    if context.plan.merges:
        for filler in encoder.axes.fillers:
            context.retarget.fill(filler, _counts_behind(encoder, context.plan.merges[-1]))
        representatives = _feature_representatives(context, encoder, state[len(encoder.frames) :])
        place_features(context, encoder, representatives, leaving)
    if encoder.representatives_marker is not None:
        answer_representatives(context, encoder)
    context.report.merged_grid = context.plan.merged_grid


def _insertion(site: MergeSite) -> Insertion:
    steps = tuple(
        MergeStep(step.merge.method.name, step.merge.axis, step.before, step.after) for step in site.steps
    )
    alike = len(site.grids) == 1
    before = math.prod(site.grids[0]) if alike else None
    after = math.prod(site.merged[0]) if alike else None
    return Insertion("merge", site.block, steps[0].method, before, after, steps)


def grid_site(site: MergeSite, encoder: Encoder) -> GridSite:
    """A planned site as data that a merger takes."""
    steps = tuple(
        GridStep(
            step.merge.method, step.merge.axis, step.before, step.after, step.runs is not None, step.shortest
        )
        for step in site.steps
    )
    counts = tuple(frames.count for frames in encoder.frames)
    return GridSite(counts, site.grids, site.merged, steps, encoder.unit, encoder.blockwise, encoder.lead)


def _merge_body(
    site: MergeSite, encoder: Encoder, angles: int, keys: int, runs: int
) -> Callable[..., tuple[Tensor, ...]]:
    """`merge_at_site` as a function of the residual value and, in this order, of what goes with it.

    `angles` (0 or 1) tables, keys of `keys` attention calls, `runs` tables, and the state of a site before.
    """
    as_data = grid_site(site, encoder)

    def body(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        first, second, third = angles, angles + keys, angles + keys + runs
        table = given[0] if angles else None
        return merge_at_site(as_data, x, table, given[first:second], given[second:third], given[third:])

    return body


def _counts_behind(encoder: Encoder, site: MergeSite) -> Counts:
    """The sides of the grids behind a site: numbers, or nodes in a graph for all sizes."""
    return side_counts(encoder, site.merged if site.sides is None else (site.merged_sides,))


def _operator_body(
    context: Context, site: MergeSite, sides: tuple[fx.Node | int, ...], angles: int, keys: int, states: int
) -> Callable[..., tuple[Tensor, ...]]:
    """The same as a call of an operator; the values of the nodes of `sides` come last."""
    encoder = context.anatomy.encoder
    assert encoder is not None
    merges = Schedule(merge=tuple(step.merge for step in site.steps)).to_json()
    count, unit, compiler = encoder.frames[0].count, encoder.unit[0], context.site_compiler

    def body(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
        first, second, third = angles, angles + keys, angles + keys + states
        symbols = iter(given[third:])
        numbers = [next(symbols) if isinstance(side, fx.Node) else side for side in sides]
        table = given[0] if angles else None
        attended, state = list(given[first:second]), list(given[second:third])
        results: list[Tensor] = MERGE(x, table, attended, state, numbers, merges, count, unit, compiler)
        return tuple(results)

    return body


def _feature_representatives(
    context: Context, encoder: Encoder, representatives: tuple[fx.Node, ...]
) -> tuple[fx.Node, ...]:
    """Representatives ``[n, H', W']`` of features, for each of the encoder's frames.

    Args:
        representatives: of the tokens after the last merge, as the merger has them.
    """
    last = context.plan.merges[-1]
    merger = last.steps[0].merge.method
    before = [_patch_grid(encoder, frames.grid) for frames in encoder.frames]
    after = [_patch_grid(encoder, grid) for grid in last.merged]

    def body(*parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(merger.feature_representatives, parts, before, after))

    return emit(context.graph, "representatives", body, *representatives)


def _patch_grid(encoder: Encoder, grid: Grid) -> PatchGrid:
    return PatchGrid(grid, encoder.unit, encoder.blockwise)
