"""Insert OIM steps, or those of ToMe in their place, behind encoder blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from luvc_fx.anatomy.encoder import Encoder
from luvc_fx.graph.emit import constant, emit
from luvc_fx.graph.notes import SHRUNK, Merged
from luvc_fx.ops import orthogonal_merge, sequence_merge
from luvc_fx.passes.support.context import Context
from luvc_fx.passes.support.merge_angles import find_angles, turn_followers
from luvc_fx.passes.support.place_features import answer_slots, place_features
from luvc_fx.plan import Grid, MergeSite, Step, side_counts
from luvc_fx.report import Insertion, MergeStep


def merge_tokens(context: Context) -> None:
    """Merge at every planned site; `context.slots` then holds the representatives.

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
    state: tuple[fx.Node, ...] = ()
    slots: tuple[fx.Node, ...] = ()
    leaving = encoder.leaving[-1]
    for site in context.plan.merges:
        context.retarget.advance(site.node)
        insertion = _insertion(site)
        name = insertion.name
        angles = find_angles(context, site)
        extra = () if angles is None else (angles,)
        keys = site.keys if _by_keys(site) else ()
        runs = [constant(context.graph, step.runs, site.node) for step in site.steps if step.runs is not None]
        body = _merge_body(site, encoder, len(extra), len(keys), len(runs))
        results = emit(context.graph, name, body, site.node, *extra, *keys, *runs, *state)
        merged, *rest = results
        merged.meta[SHRUNK] = Merged(site.block, site.node.name, site.merged)
        if angles is not None:
            turn_followers(context, name, site, angles, rest.pop(0))
        state = tuple(rest)
        slots = state[len(encoder.frames) :]
        context.retarget.replace(site.node, merged, side_counts(encoder, site.merged))
        leaving = merged if site.node is leaving else leaving
        context.report.inserted.append(insertion)
    if context.plan.merges:
        for filler in encoder.axes.fillers:
            context.retarget.fill(filler, side_counts(encoder, context.plan.merges[-1].merged))
        if _in_rows(context.plan.merges[-1]):
            slots = _representatives(context, encoder, slots)
        place_features(context, encoder, slots, leaving)
    if encoder.slots is not None:
        answer_slots(context, encoder)
    context.report.merged_grid = context.plan.merged_grid


def _insertion(site: MergeSite) -> Insertion:
    steps = tuple(
        MergeStep(step.merge.method, step.merge.axis, step.before, step.after) for step in site.steps
    )
    alike = len(site.grids) == 1
    before = math.prod(site.grids[0]) if alike else None
    after = math.prod(site.merged[0]) if alike else None
    return Insertion("merge", site.block, steps[0].method, before, after, steps)


def _by_keys(site: MergeSite) -> bool:
    return any(step.merge.feature == "keys" for step in site.steps)


def _in_rows(site: MergeSite) -> bool:
    """Whether single patches merge over the whole row, with sizes and slots of single patches."""
    return site.steps[0].merge.method == "tome"


def _merge_body(
    site: MergeSite, encoder: Encoder, angles: int, keys: int, runs: int
) -> Callable[..., tuple[Tensor, ...]]:
    """The steps of one site, as a function of the residual value and what goes with it.

    It takes the residual value, the angles and keys (0 or 1, and any number), the `runs` of the steps
    that have some, and, from a site before, sizes and slots of all frames. It returns the merged
    value, angles, sizes and slots.
    """
    groups, in_rows = len(encoder.frames), _in_rows(site)

    def body(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        parts = [x, *given[:angles]]
        if keys:
            by_call = given[angles : angles + keys]
            mean_or_all = [key.mean(1) if in_rows else key.transpose(1, 2).flatten(2) for key in by_call]
            heads = torch.cat(mean_or_all, dim=1)
            parts.append(heads if x.dim() == 3 else heads.squeeze(0))
        limits = given[angles + keys : angles + keys + runs]
        state = given[angles + keys + runs :]
        rows = [_split(part.flatten(x.dim() - 1), encoder, site.grids) for part in parts]
        out: list[list[Tensor]] = []
        for group, frames in enumerate(encoder.frames):
            grids = [part[group] for part in rows]
            if not in_rows:
                grids = [_to_blocks(part, site.grids[group], encoder) for part in grids]
            if not state and in_rows:
                sizes, slots = _fresh_rows(grids[0], site.grids[group], encoder)
            elif not state:
                sizes, slots = _fresh(grids[0], frames.count)
            else:
                sizes, slots = state[group], state[groups + group]
            merged, sizes, slots = _steps(site.steps, group, grids, sizes, slots, limits, encoder, keys > 0)
            if not in_rows:
                merged = [_to_rows(grid, encoder) for grid in merged]
            out.append([*merged, sizes, slots])
        results = [_joined(x, [found[0] for found in out], encoder)]
        if angles:
            table = torch.cat([found[1].flatten(0, 1) for found in out])
            results.append(table.unflatten(1, parts[1].shape[1:]))
        return (*results, *(found[-2] for found in out), *(found[-1] for found in out))

    return body


def _steps(
    steps: tuple[Step, ...],
    group: int,
    grids: list[Tensor],
    sizes: Tensor,
    slots: Tensor,
    limits: tuple[Tensor, ...],
    encoder: Encoder,
    by_keys: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """All steps on the grids of the tokens, and of angles and keys that merge along.

    The grids are ``[n, H, W, C]`` of blocks, or for ToMe ``[n, T, C]`` of patches, in the tower's order.
    """
    # Together, so that all merge alike; in single precision, which angles and keys are kept in.
    wide = grids[0].dtype if len(grids) == 1 else torch.promote_types(grids[0].dtype, torch.float32)
    channels = [grid.shape[-1] for grid in grids]
    joined = torch.cat([grid.to(wide) for grid in grids], dim=-1) if len(grids) > 1 else grids[0]
    waiting = list(limits)
    for step in steps:
        along = 0 if step.merge.axis == "height" else 1
        last = by_keys and step.merge.feature == "keys"
        start, width = (sum(channels[:-1]), channels[-1]) if last else (0, channels[0])
        feature = joined.narrow(-1, start, width) if len(grids) > 1 else None
        if step.merge.method == "tome":
            left = joined.shape[1] // step.before[group] * step.after[group]
            joined, sizes, slots, *_ = sequence_merge(joined, sizes, slots, left, feature)
            continue
        joined, sizes, slots, *_ = orthogonal_merge(
            joined,
            sizes,
            slots,
            step.merge.axis,
            step.after[group] // encoder.unit[along],
            step.merge.pairing,
            feature,
            waiting.pop(0) if step.runs is not None else None,
            step.shortest,
        )
    parts = joined.split(channels, dim=-1) if len(grids) > 1 else [joined]
    return [part.to(grid.dtype) for part, grid in zip(parts, grids, strict=True)], sizes, slots


def _fresh(grid: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Sizes and slots of tokens of which none has merged."""
    height, width = grid.shape[1:3]
    sizes = torch.ones(images, height, width, dtype=torch.float32, device=grid.device)
    slots = torch.arange(height * width, device=grid.device).reshape(1, height, width)
    return sizes, slots.expand(images, height, width)


def _fresh_rows(rows: Tensor, grid: Grid, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Sizes and slots ``[n, T]`` of patches of which none has merged; they are numbered block by block."""
    sizes = torch.ones(rows.shape[:2], dtype=torch.float32, device=rows.device)
    blocks = torch.arange(rows.shape[1], device=rows.device).reshape(1, *encoder.blocks_of(grid), -1)
    return sizes, _to_rows(blocks, encoder).reshape(1, -1).expand(rows.shape[:2])


def _representatives(context: Context, encoder: Encoder, slots: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Slots ``[n, H', W']`` of features, from those ``[n, T]`` of patches.

    Where one feature is one patch they are the same. Else a feature holds patches of all over the
    picture, and two may begin with patches of one block: features are put in the order of their first
    patches, and spread evenly over the places that there are.
    """
    before = [encoder.blocks_of(frames.grid) for frames in encoder.frames]
    after = context.plan.merges[-1].merged
    single = encoder.unit == (1, 1)

    def body(*parts: Tensor) -> tuple[Tensor, ...]:
        found = []
        for part, old, grid in zip(parts, before, after, strict=True):
            blocks = _to_blocks(part.unsqueeze(-1), grid, encoder)
            first = blocks.select(-1, 0).flatten(1)
            rank = (first.unsqueeze(2) > first.unsqueeze(1)).sum(-1)
            spread = (2 * rank + 1) * (old[0] * old[1]) // (2 * first.shape[1])
            found.append((first if single else spread).reshape(blocks.shape[:3]))
        return tuple(found)

    return emit(context.graph, "representatives", body, *slots)


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
    """The inverse of `_split` for the residual value, whose rows in front stay."""
    if x.dim() != 3:
        return torch.cat([part.flatten(0, 1) for part in parts])
    return torch.cat([x.narrow(1, 0, encoder.lead), *parts], dim=1) if encoder.lead else parts[0]


def _to_blocks(rows: Tensor, grid: Grid, encoder: Encoder) -> Tensor:
    """``[n, H * W, C]`` -> ``[n, H / h, W / w, h * w * C]``: what becomes one feature stays together."""
    (high, wide), (height, width) = encoder.unit, encoder.blocks_of(grid)
    images, _, channels = rows.shape
    if not encoder.blockwise:
        rows = rows.reshape(images, height, high, width, wide, channels).transpose(2, 3)
    return rows.reshape(images, height, width, high * wide * channels)


def _to_rows(blocks: Tensor, encoder: Encoder) -> Tensor:
    """``[n, H / h, W / w, h * w * C]`` -> ``[n, H * W, C]``."""
    images, height, width, _ = blocks.shape
    high, wide = encoder.unit
    if encoder.blockwise:
        return blocks.reshape(images, height * width * high * wide, -1)
    return blocks.reshape(images, height, width, high, wide, -1).transpose(2, 3).flatten(1, 4)
