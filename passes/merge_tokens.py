"""Insert OIM steps behind encoder blocks."""

from __future__ import annotations

import torch
from torch import Tensor, fx

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
            context.graph, name, _merge_body(site, encoder.lead), site.node, *carried
        )
        context.retarget.replace(site.node, merged, site.merged[0] * site.merged[1])
        steps = ", ".join(f"{axis} {before} -> {after}" for axis, before, after in site.steps)
        context.report.inserted.append(f"{name}: {steps}")
    if encoder.slots is not None:
        _answer_slots(context, encoder.slots, encoder.grid)
    context.report.merged_grid = context.plan.merged_grid


def _merge_body(site: MergeSite, lead: int):  # type: ignore[no-untyped-def]
    height, width = site.grid

    def body(
        x: Tensor, sizes: Tensor | None = None, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        images, rows, channels = x.shape
        grid = x.narrow(1, lead, rows - lead).reshape(images, height, width, channels)
        if sizes is None or slots is None:
            sizes = torch.ones(images, height, width, dtype=torch.float32, device=x.device)
            slots = torch.arange(height * width, device=x.device).reshape(1, height, width)
            slots = slots.expand(images, height, width)
        for (axis, _, after), merge in zip(site.steps, site.asked, strict=True):
            grid, sizes, slots = orthogonal_merge(grid, sizes, slots, axis, after, merge.pairing)
        tokens = grid.flatten(1, 2)
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
