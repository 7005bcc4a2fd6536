"""A merge site as one operator in a graph for all image sizes; its body is compiled by itself.

The counterpart of `luvc_fx.graph.site_operator` in an encoder that takes the patches of an image in a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from luvc_fx._compat import without_autograd
from luvc_fx.mergers import Merger, PatchGrid
from luvc_fx.mergers.site import GridSite, GridStep, merge_at_site
from luvc_fx.schedule import Schedule

_LIBRARY = torch.library.Library("luvc_fx", "FRAGMENT")
_LIBRARY.define(
    "merge(Tensor x, Tensor? angles, Tensor[] keys, Tensor[] state, SymInt[] sides, str merges, int count,"
    " int unit, str compiler) -> Tensor[]"
)

MERGE = torch.ops.luvc_fx.merge
"""`merge(x [P, C], angles, keys, state, [height, width, side behind each step], ...)`.

What `luvc_fx.mergers.site.merge_at_site` does, for `count` grids of one kind, and what it returns; `merges`
is the JSON of a schedule of the steps, and `compiler` a name in `COMPILERS`."""

Steps = tuple[tuple[Merger, str], ...]
"""The merger and the axis of each step."""


class CompiledMerge(Protocol):
    """`merge_at_site` with steps that are known, for all sizes."""

    def __call__(
        self,
        x: Tensor,
        angles: Tensor | None,
        keys: Sequence[Tensor],
        state: Sequence[Tensor],
        sides: Sequence[int],
    ) -> list[Tensor]:
        """Run it; arguments as of `MERGE`."""
        ...


COMPILERS: dict[str, Callable[[Steps, int, int, Tensor], CompiledMerge]] = {}
"""Who compiles the body of a merge, by the name that stands in the graph; without an entry it runs eagerly.

Called with the steps, the number of grids, the unit and an example of `x`; it remembers what it made."""


@functools.lru_cache(1024)
def _parsed(merges: str) -> Steps:
    return tuple((merge.method, merge.axis) for merge in Schedule.from_json(merges).merge)


def run_merge(
    steps: Steps,
    count: int,
    unit: int,
    x: Tensor,
    angles: Tensor | None,
    keys: Sequence[Tensor],
    state: Sequence[Tensor],
    sides: Sequence[int],
) -> list[Tensor]:
    """The body of the operator, without a compiler."""
    now = {"height": sides[0], "width": sides[1]}
    before = (now["height"], now["width"])
    as_data = []
    for (method, axis), side in zip(steps, sides[2:], strict=True):
        as_data.append(GridStep(method, axis, (now[axis],), (side,)))
        now[axis] = side
    after = (now["height"], now["width"])
    site = GridSite((count,), (before,), (after,), tuple(as_data), (unit, unit), blockwise=True, lead=0)
    return list(merge_at_site(site, x, angles, keys, (), state))


def _merge(
    x: Tensor,
    angles: Tensor | None,
    keys: list[Tensor],
    state: list[Tensor],
    sides: list[int],
    merges: str,
    count: int,
    unit: int,
    compiler: str,
) -> list[Tensor]:
    steps, compile = _parsed(merges), COMPILERS.get(compiler)
    with without_autograd():
        if compile is None:
            results = run_merge(steps, count, unit, x, angles, keys, state, sides)
        else:
            results = compile(steps, count, unit, x)(x, angles, keys, state, sides)
    # An operator may return no view of what it was given.
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, angles, *state) if tensor is not None}
    return [out.clone() if out.untyped_storage().data_ptr() in given else out.contiguous() for out in results]


def _merge_shapes(
    x: Tensor,
    angles: Tensor | None,
    keys: list[Tensor],
    state: list[Tensor],
    sides: list[int],
    merges: str,
    count: int,
    unit: int,
    compiler: str,
) -> list[Tensor]:
    steps = _parsed(merges)
    now = {"height": sides[0], "width": sides[1]}
    for (_, axis), side in zip(steps, sides[2:], strict=True):
        now[axis] = side
    rows = count * now["height"] * now["width"]
    tables = [] if angles is None else [angles.new_empty(rows, *angles.shape[1:])]
    grid = PatchGrid((now["height"], now["width"]), (unit, unit), blockwise=True)
    tokens = steps[0][0].to_tokens(x.new_empty(count, rows // count, x.shape[1]), grid).shape[:-1]
    sizes = x.new_empty(tokens, dtype=torch.float32)
    return [x.new_empty(rows, x.shape[1]), *tables, sizes, x.new_empty(tokens, dtype=torch.int64)]


_LIBRARY.impl("merge", _merge, "CompositeExplicitAutograd")
torch.library.register_fake("luvc_fx::merge", _merge_shapes, lib=_LIBRARY)
