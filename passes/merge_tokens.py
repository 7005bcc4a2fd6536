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
        body = _merge_body(site, encoder.lead, encoder.unit)
        merged, sizes, context.slots = emit(context.graph, name, body, site.node, site.keys, *carried)
        sides = {HEIGHT: site.merged[0], WIDTH: site.merged[1]}
        context.retarget.replace(site.node, merged, sides)
        steps = ", ".join(f"{merge.axis} {before} -> {after}" for merge, before, after in site.steps)
        context.report.inserted.append(f"{name}: {steps}")
    if encoder.slots is not None:
        _answer_slots(context, encoder.slots, encoder.feature_grid)
    context.report.merged_grid = context.plan.merged_grid


def _merge_body(site: MergeSite, lead: int, unit: tuple[int, int]):  # type: ignore[no-untyped-def]
    height, width = site.grid[0] // unit[0], site.grid[1] // unit[1]
    by_keys = any(merge.feature == "keys" for merge, _, _ in site.steps)

    def body(
        x: Tensor, keys: Tensor, sizes: Tensor | None = None, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        images, rows = x.shape[:2]
        grid = _to_blocks(x.narrow(1, lead, rows - lead), site.grid, unit)
        if sizes is None or slots is None:
            sizes = torch.ones(images, height, width, dtype=torch.float32, device=x.device)
            slots = torch.arange(height * width, device=x.device).reshape(1, height, width)
            slots = slots.expand(images, height, width)
        channels = grid.shape[-1]
        if by_keys:
            # Keys merge along, so that a further step at this site compares what the tokens have become.
            seen = keys.transpose(1, 2).flatten(2).narrow(1, lead, rows - lead)
            grid = torch.cat([grid, _to_blocks(seen, site.grid, unit).to(grid.dtype)], dim=-1)
        for merge, _, after in site.steps:
            length = after // unit[0 if merge.axis == "height" else 1]
            start, end = (channels, grid.shape[-1]) if merge.feature == "keys" else (0, channels)
            feature = grid.narrow(-1, start, end - start) if by_keys else None
            grid, sizes, slots, *_ = orthogonal_merge(
                grid, sizes, slots, merge.axis, length, merge.pairing, feature
            )
        tokens = _to_rows(grid.narrow(-1, 0, channels), unit)
        return torch.cat([x.narrow(1, 0, lead), tokens], dim=1), sizes, slots

    return body


def _to_blocks(rows: Tensor, grid: tuple[int, int], unit: tuple[int, int]) -> Tensor:
    """``[n, H * W, C]`` -> ``[n, H / h, W / w, h * w * C]``: what becomes one feature stays together."""
    images, _, channels = rows.shape
    height, width = grid[0] // unit[0], grid[1] // unit[1]
    blocks = rows.reshape(images, height, unit[0], width, unit[1], channels).transpose(2, 3)
    return blocks.reshape(images, height, width, unit[0] * unit[1] * channels)


def _to_rows(blocks: Tensor, unit: tuple[int, int]) -> Tensor:
    """``[n, H / h, W / w, h * w * C]`` -> ``[n, H * W, C]``."""
    images, height, width, _ = blocks.shape
    return blocks.reshape(images, height, width, unit[0], unit[1], -1).transpose(2, 3).flatten(1, 4)


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
