"""One vision graph for images of all sizes: what is marked as a symbol, and the sides that it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luvc_fx.generate.families import Family, ImageSizes
from luvc_fx.generate.marks import marked_axes
from luvc_fx.generate.small_numbers import SmallMatrix, SmallVector
from luvc_fx.graph import markers
from luvc_fx.schedule import Schedule
from luvc_fx.schedule.merged_sides import MergedSides

Inputs = tuple[Tensor, dict[str, Any], dict[str, str], dict[str, str], list[Tensor] | None]
"""The arguments of an encoder's body: pixels, options, constants, layout, and sides as sizes of tensors."""


@dataclass
class SymbolicEncoder:
    """Whether one graph of an encoder serves all sizes.

    Attributes:
        wanted: as `luvc_fx.compile` was asked.
        schedule: whose merges the encoder's graph has.
        note: tells the report.
        failed: that it was tried, and cannot be.
    """

    wanted: bool
    schedule: Schedule
    note: Callable[[str], None]
    failed: bool = False


def symbolic_inputs(
    schedule: Schedule,
    family: Family,
    pixels: Tensor,
    plain: dict[str, Any],
    layout: dict[str, str],
    sizes: ImageSizes,
) -> Inputs | None:
    """The arguments of the graph for all sizes; None where these images cannot be in it.

    Args:
        schedule: what is merged.
        plain: options that are no constants: tables with a row for each patch, say.
    """
    layout = {"rows": layout["rows"], "symbolic": ""}
    if sizes.grid is None:
        several = pixels.dim() == 4 and pixels.shape[0] > 1  # one is no symbol to Dynamo
        return (marked_axes(pixels, 0), plain, {}, layout, None) if several else None
    sides, form = sizes.grid, ""
    if schedule.merge:
        blocks = family.encoder_blocks()
        if blocks is None or not all(merge.method.keeps_places for merge in schedule.merge):
            return None
        try:
            merged = MergedSides.of(schedule, blocks, sizes.grid, sizes.unit)
        except ValueError:  # this image is too small for the schedule: its own graph will say so
            return None
        sides, form = tuple(merged.numbers), merged.form  # type: ignore[assignment]
    layout |= {"unit": str(sizes.unit), "form": form, "grid": sizes.grid_argument}
    if sizes.bounds_argument is not None:
        layout["bounds"] = sizes.bounds_argument
    patches = sizes.grid[0] * sizes.grid[1]
    tables = {
        name: _with_symbolic_rows(option, {patches, patches // sizes.unit**2})
        for name, option in plain.items()
    }
    blocks_on_sides = [_as_size(side // sizes.unit) for side in sides]
    return marked_axes(pixels, 0), tables, {}, layout, blocks_on_sides


def with_symbolic_grid(
    pixels: Tensor, layout: dict[str, str], sides: list[Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Patches of an image that say how they lie, and what else its encoder is told. Dynamo traces this."""
    unit = int(layout["unit"])
    height, width, *merged = [size.shape[0] * unit for size in sides]
    torch._check(pixels.shape[0] == height * width)
    told: dict[str, Any] = {layout["grid"]: SmallMatrix([[1, height, width]])}
    if "bounds" in layout:
        told[layout["bounds"]] = SmallVector([0, height * width])
    return markers.PATCHES(pixels, [1, height, width], unit, layout["form"], merged), told


def in_one_piece(features: Any, pixels: Tensor) -> tuple[str, Tensor, list[int]]:
    """Features as ``[N, D]``, their form, and how many each image has where that is no symbol.

    Dynamo traces this. The number is a constant of the graph, and a merge does not change it.

    Raises:
        TypeError: features of no form of which a graph for all sizes can be.
    """
    if isinstance(features, Tensor) and features.dim() == 3:
        if features.shape[0] != pixels.shape[0]:
            raise TypeError("images have no features of their own")
        return "stacked", features.flatten(0, 1), [features.shape[1]]
    if pixels.dim() == 4:
        raise TypeError("features of several images come in one row, or image by image")
    return ("flat", features, []) if isinstance(features, Tensor) else ("parts", features[0], [])


def numbers_of_placeholders(sizes: ImageSizes, pixels: Tensor, each: list[int]) -> list[int]:
    """How many placeholders each image has.

    Args:
        each: as of `in_one_piece`.
    """
    if sizes.grid is not None:
        return [sizes.grid[0] * sizes.grid[1] // sizes.unit**2]
    return each * pixels.shape[0]


def _with_symbolic_rows(option: Any, lengths: set[int]) -> Any:
    """A table whose axes of these lengths are symbols."""
    if not isinstance(option, Tensor):
        return option
    axes = [axis for axis, size in enumerate(option.shape) if size in lengths]
    return marked_axes(option, *axes[:1])


def _as_size(number: int) -> Tensor:
    size = torch.empty(number, 0)
    torch._dynamo.maybe_mark_dynamic(size, 0)
    return size
