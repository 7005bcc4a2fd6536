"""Insert the steps of a merger behind encoder blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from luvc_fx.anatomy.encoder import Encoder
from luvc_fx.graph.emit import constant, emit
from luvc_fx.graph.notes import SHRUNK, Merged
from luvc_fx.mergers import PatchGrid, Shortening
from luvc_fx.passes.support.context import Context
from luvc_fx.passes.support.merge_angles import find_angles, turn_followers
from luvc_fx.passes.support.place_features import answer_representatives, place_features
from luvc_fx.plan import Grid, MergeSite, Step, side_counts
from luvc_fx.report import Insertion, MergeStep


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
        body = _merge_body(site, encoder, len(extra), len(keys), len(runs))
        results = emit(context.graph, name, body, site.node, *extra, *keys, *runs, *state)
        merged, *rest = results
        merged.meta[SHRUNK] = Merged(site.block, site.node.name, site.merged)
        if angles is not None:
            turn_followers(context, name, site, angles, rest.pop(0))
        state = tuple(rest)
        context.retarget.replace(site.node, merged, side_counts(encoder, site.merged))
        leaving = merged if site.node is leaving else leaving
        context.report.inserted.append(insertion)
    if context.plan.merges:
        for filler in encoder.axes.fillers:
            context.retarget.fill(filler, side_counts(encoder, context.plan.merges[-1].merged))
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


def _merge_body(
    site: MergeSite, encoder: Encoder, angles: int, keys: int, runs: int
) -> Callable[..., tuple[Tensor, ...]]:
    """The steps of one site, as a function of the residual value and what goes with it.

    The function takes, in this order: the residual value; `angles` (0 or 1) tables of rotary angles
    ``[patches, ...]``; the keys of `keys` attention calls, ``[images, heads, rows, dim]``; `runs` tables as
    `Shortening.runs` has them, for the steps that have some; and, from a site before, sizes and then
    representatives, one tensor for each of the encoder's frames. It returns the merged residual value, the
    merged angles if there are any, sizes and representatives.
    """
    groups, merger = len(encoder.frames), site.steps[0].merge.method  # the same at all steps

    def body(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        parts = [x, *given[:angles]]
        if keys:
            by_call = [merger.keys_to_compare(key) for key in given[angles : angles + keys]]
            compared = torch.cat(by_call, dim=1)
            parts.append(compared if x.dim() == 3 else compared.squeeze(0))
        tables = given[angles + keys : angles + keys + runs]
        state = given[angles + keys + runs :]
        rows = [_split(part.flatten(x.dim() - 1), encoder, site.grids) for part in parts]
        by_group: list[list[Tensor]] = []
        for group in range(groups):
            before, after = (_patch_grid(encoder, grids[group]) for grids in (site.grids, site.merged))
            tokens = [merger.to_tokens(part[group], before) for part in rows]
            if state:
                sizes, representatives = state[group], state[groups + group]
            else:
                sizes, representatives = merger.unmerged(tokens[0], before)
            merged, sizes, representatives = _steps(
                site.steps, group, tokens, sizes, representatives, tables, keys > 0
            )
            by_group.append([*(merger.to_rows(part, after) for part in merged), sizes, representatives])
        results = [_joined(x, [group[0] for group in by_group], encoder)]
        if angles:
            table = torch.cat([group[1].flatten(0, 1) for group in by_group])
            results.append(table.unflatten(1, parts[1].shape[1:]))
        return (*results, *(group[-2] for group in by_group), *(group[-1] for group in by_group))

    return body


def _steps(
    steps: tuple[Step, ...],
    group: int,
    parts: list[Tensor],
    sizes: Tensor,
    representatives: Tensor,
    tables: tuple[Tensor, ...],
    has_keys: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """All steps of one site, on the images of one of the encoder's frames.

    Args:
        parts: in the merger's form: the hidden states, the angles if there are any, and the keys if
            `has_keys`. All of them merge alike.
        tables: `Shortening.runs` of the steps that have some.

    Returns:
        The merged parts, sizes and representatives.
    """
    # Together, so that all merge alike; in single precision, which angles and keys are kept in.
    wide = parts[0].dtype if len(parts) == 1 else torch.promote_types(parts[0].dtype, torch.float32)
    channels = [part.shape[-1] for part in parts]
    joined = torch.cat([part.to(wide) for part in parts], dim=-1) if len(parts) > 1 else parts[0]
    waiting = list(tables)
    for step in steps:
        by_keys = has_keys and step.merge.method.needs_keys
        start, width = (sum(channels[:-1]), channels[-1]) if by_keys else (0, channels[0])
        feature = joined.narrow(-1, start, width) if len(parts) > 1 else None
        shortening = Shortening(
            step.merge.axis,
            step.before[group],
            step.after[group],
            waiting.pop(0) if step.runs is not None else None,
            step.shortest,
        )
        joined, sizes, representatives = step.merge.method.merge(
            joined, sizes, representatives, shortening, feature
        )
    merged = joined.split(channels, dim=-1) if len(parts) > 1 else [joined]
    narrow = [part.to(old.dtype) for part, old in zip(merged, parts, strict=True)]
    return narrow, sizes, representatives


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


def _split(rows: Tensor, encoder: Encoder, grids: tuple[Grid, ...]) -> list[Tensor]:
    """``[images, lead + T, C]`` or ``[P, C]`` -> ``[count, T, C]`` for each of the encoder's frames."""
    if rows.dim() == 3:
        return [rows.narrow(1, encoder.lead, rows.shape[1] - encoder.lead)]
    lengths = [f.count * grid[0] * grid[1] for f, grid in zip(encoder.frames, grids, strict=True)]
    parts, start = [], 0
    for length, frames in zip(lengths, encoder.frames, strict=True):
        parts.append(rows.narrow(0, start, length).unflatten(0, (frames.count, -1)))
        start += length
    return parts


def _joined(x: Tensor, parts: list[Tensor], encoder: Encoder) -> Tensor:
    """The inverse of `_split` for the residual value `x`, whose rows in front stay."""
    if x.dim() != 3:
        return torch.cat([part.flatten(0, 1) for part in parts])
    return torch.cat([x.narrow(1, 0, encoder.lead), *parts], dim=1) if encoder.lead else parts[0]
