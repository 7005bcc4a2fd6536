"""Insert OIM steps behind encoder blocks."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from luvc_fx.extents import HEIGHT, WIDTH
from luvc_fx.fx_util import shape
from luvc_fx.ops import orthogonal_merge
from luvc_fx.passes.context import Context
from luvc_fx.passes.emit import emit
from luvc_fx.plan import MergeSite


def merge_tokens(context: Context) -> None:
    """Merge at every planned site; `context.slots` then holds the representatives."""
    encoder = context.anatomy.encoder
    if encoder is None:
        return
    sizes: fx.Node | None = None
    for site in context.plan.merges:
        context.retarget.advance(site.node)
        carried = () if sizes is None or context.slots is None else (sizes, context.slots)
        name = f"merge after encoder block {site.block}"
        merged, sizes, context.slots = emit(
            context.graph, name, _merge_body(site, encoder.lead, encoder.unit), site.node, *carried
        )
        sides = {HEIGHT: site.merged[0], WIDTH: site.merged[1]}
        context.retarget.replace(site.node, merged, sides)
        steps = ", ".join(f"{axis} {before} -> {after}" for axis, before, after in site.steps)
        context.report.inserted.append(f"{name}: {steps}")
    if encoder.slots is not None:
        _answer_slots(context, encoder.slots, encoder.feature_grid)
    context.report.merged_grid = context.plan.merged_grid


def _merge_body(site: MergeSite, lead: int, unit: tuple[int, int]):  # type: ignore[no-untyped-def]
    high, wide = unit
    height, width = site.grid[0] // high, site.grid[1] // wide
    steps = [(axis, after // (high if axis == "height" else wide)) for axis, _, after in site.steps]

    def body(
        x: Tensor, sizes: Tensor | None = None, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        images, rows, channels = x.shape
        # Whole blocks of patches merge, so that what becomes one feature stays together.
        blocks = x.narrow(1, lead, rows - lead).reshape(images, height, high, width, wide, channels)
        grid = blocks.transpose(2, 3).reshape(images, height, width, high * wide * channels)
        if sizes is None or slots is None:
            sizes = torch.ones(images, height, width, dtype=torch.float32, device=x.device)
            slots = torch.arange(height * width, device=x.device).reshape(1, height, width)
            slots = slots.expand(images, height, width)
        for axis, after in steps:
            grid, sizes, slots = orthogonal_merge(grid, sizes, slots, axis, after)
        blocks = grid.reshape(images, grid.shape[1], grid.shape[2], high, wide, channels)
        tokens = blocks.transpose(2, 3).flatten(1, 4)
        return torch.cat([x.narrow(1, 0, lead), tokens], dim=1), sizes, slots

    return body


def _answer_slots(context: Context, marker: fx.Node, grid: tuple[int, int]) -> None:
    """Put the representatives where the front door asked for them; whole grids stand for themselves."""
    slots = context.slots
    if slots is None:
        features = marker.args[0]
        assert isinstance(features, fx.Node)
        images = shape(features)[0]
        height, width = grid
        if height * width != shape(features)[1]:
            return

        def body(x: Tensor) -> Tensor:
            places = torch.arange(height * width, device=x.device)
            return places.reshape(1, height, width).expand(images, height, width).clone()

        (slots,) = emit(context.graph, "slots", body, features)
    context.retarget.advance(marker.prev)
    marker.replace_all_uses_with(slots)
