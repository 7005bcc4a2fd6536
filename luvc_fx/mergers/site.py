"""What happens at a merge site: the steps of a merger on the grids of an encoder's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luvc_fx.mergers.base import Merger, PatchGrid, Shortening

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True)
class GridStep:
    """One step: an axis of all grids gets shorter.

    Attributes:
        method, axis: who merges, and ``"width"`` or ``"height"``.
        before, after: length of the axis in patches, for each kind of grid.
        has_runs: whether there is a table `Shortening.runs` for it; shortest: as of `Shortening`.
    """

    method: Merger
    axis: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    has_runs: bool = False
    shortest: int | None = None


@dataclass(frozen=True, slots=True)
class GridSite:
    """How the rows at a site lie on grids, and what shortens them. Sizes may be symbols.

    Attributes:
        counts: how many grids there are of each kind, one kind behind the other.
        grids, merged: height and width of each kind in patches, before and after.
        steps: at least one, all of one merger.
        unit, blockwise: as of `PatchGrid`; lead: rows in front of each grid.
    """

    counts: tuple[int, ...]
    grids: tuple[Grid, ...]
    merged: tuple[Grid, ...]
    steps: tuple[GridStep, ...]
    unit: tuple[int, int]
    blockwise: bool
    lead: int

    def patch_grid(self, grid: Grid) -> PatchGrid:
        """One of the `grids` as a merger sees it."""
        return PatchGrid(grid, self.unit, self.blockwise)


def merge_at_site(
    site: GridSite,
    x: Tensor,
    angles: Tensor | None,
    keys: Sequence[Tensor],
    runs: Sequence[Tensor],
    state: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The steps of one site.

    Args:
        x: the residual value, ``[images, lead + H W, C]``, or ``[patches, C]`` of all images in a row.
        angles: of a rotary table, ``[patches, ...]``.
        keys: of the attention calls of the block, ``[images, heads, rows, dim]`` each; none where the hidden
            states are compared.
        runs: tables as `Shortening.runs` has them, for the steps that have some.
        state: from a site before, sizes and then representatives, one tensor for each kind of grid.

    Returns:
        The merged residual value, the merged angles if there are any, sizes and representatives.
    """
    merger = site.steps[0].method
    parts = [x] if angles is None else [x, angles]
    if keys:
        compared = torch.cat([merger.keys_to_compare(key) for key in keys], dim=1)
        parts.append(compared if x.dim() == 3 else compared.squeeze(0))
    rows = [_split(part.flatten(x.dim() - 1), site) for part in parts]
    kinds = len(site.counts)
    by_kind: list[list[Tensor]] = []
    for kind in range(kinds):
        before, after = (site.patch_grid(grids[kind]) for grids in (site.grids, site.merged))
        tokens = [merger.to_tokens(part[kind], before) for part in rows]
        if state:
            sizes, representatives = state[kind], state[kinds + kind]
        else:
            sizes, representatives = merger.unmerged(tokens[0], before)
        merged, sizes, representatives = _steps(
            site.steps, kind, tokens, sizes, representatives, runs, bool(keys)
        )
        by_kind.append([*(merger.to_rows(part, after) for part in merged), sizes, representatives])
    results = [_joined(x, [kind[0] for kind in by_kind], site)]
    if angles is not None:
        table = torch.cat([kind[1].flatten(0, 1) for kind in by_kind])
        results.append(table.unflatten(1, angles.shape[1:]))
    return (*results, *(kind[-2] for kind in by_kind), *(kind[-1] for kind in by_kind))


def _steps(
    steps: tuple[GridStep, ...],
    kind: int,
    parts: list[Tensor],
    sizes: Tensor,
    representatives: Tensor,
    tables: Sequence[Tensor],
    has_keys: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """All steps of one site, on the grids of one kind.

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
        by_keys = has_keys and step.method.needs_keys
        start, width = (sum(channels[:-1]), channels[-1]) if by_keys else (0, channels[0])
        feature = joined.narrow(-1, start, width) if len(parts) > 1 else None
        shortening = Shortening(
            step.axis,
            step.before[kind],
            step.after[kind],
            waiting.pop(0) if step.has_runs else None,
            step.shortest,
        )
        joined, sizes, representatives = step.method.merge(
            joined, sizes, representatives, shortening, feature
        )
    merged = joined.split(channels, dim=-1) if len(parts) > 1 else [joined]
    narrow = [part.to(old.dtype) for part, old in zip(merged, parts, strict=True)]
    return narrow, sizes, representatives


def _split(rows: Tensor, site: GridSite) -> list[Tensor]:
    """``[images, lead + T, C]`` or ``[P, C]`` -> ``[count, T, C]`` for each kind of grid."""
    if rows.dim() == 3:
        return [rows.narrow(1, site.lead, rows.shape[1] - site.lead)]
    lengths = [count * grid[0] * grid[1] for count, grid in zip(site.counts, site.grids, strict=True)]
    parts, start = [], 0
    for length, count in zip(lengths, site.counts, strict=True):
        parts.append(rows.narrow(0, start, length).unflatten(0, (count, -1)))
        start += length
    return parts


def _joined(x: Tensor, parts: list[Tensor], site: GridSite) -> Tensor:
    """The inverse of `_split` for the residual value `x`, whose rows in front stay."""
    if x.dim() != 3:
        return torch.cat([part.flatten(0, 1) for part in parts])
    return torch.cat([x.narrow(1, 0, site.lead), *parts], dim=1) if site.lead else parts[0]
