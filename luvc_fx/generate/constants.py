"""The sizes of images as constants: what Dynamo can guard on in place of small integer tensors.

`image_grid_thw`, `image_sizes` and the like steer Python code, and as tensors they end graphs wherever
they are read. They travel as text, which Dynamo guards on by value and never makes symbolic (plain
integers it would, the second time), and are read back inside the traced call.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import numpy
from torch import Tensor

from luvc_fx import _compat

LISTS = ("image_sizes", "image_sizes_videos", "batch_num_images")
"""Controls that the models take as lists as well."""
GRIDS = ("image_grid_thw", "video_grid_thw")
"""Rows of frames, height and width in patches; the models call tensor methods on them."""


class Lengths:
    """Stands for an integer vector, as far as the encoders use one; made while a call is traced."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def __getitem__(self, index: slice) -> Lengths:
        return Lengths(self.values[index])

    def __sub__(self, other: Lengths) -> Lengths:
        return Lengths([a - b for a, b in zip(self.values, other.values, strict=True)])

    def __floordiv__(self, number: int) -> Lengths:
        return Lengths([value // number for value in self.values])

    def tolist(self) -> list[int]:
        """The numbers."""
        return list(self.values)


class Grids:
    """Stands for `image_grid_thw` ``[images, 3]``."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def prod(self, dim: int = -1) -> Lengths:
        """Patches of each image."""
        return Lengths([math.prod(row) for row in self.rows])

    def tolist(self) -> list[list[int]]:
        """The rows."""
        return [list(row) for row in self.rows]


def as_text(control: Any) -> str:
    """Integers ``[n]`` or ``[n, k]``, a tensor or lists, as text: ``"1,8,8;1,4,12"`` or ``"1;2"``."""
    rows = control.tolist() if isinstance(control, Tensor) else list(control)
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
    return ";".join(
        ",".join(str(int(number)) for number in (row if isinstance(row, (list, tuple)) else [row]))
        for row in rows
    )


def from_text(name: str, text: str) -> Any:
    """What the model is given for the control `name`; this is traced."""
    rows = rows_of(text)
    if name in GRIDS:
        return Grids(rows)
    if name.endswith("_seqlens"):
        return Lengths(rows[0])
    return [row[0] for row in rows] if name == "batch_num_images" else rows


def rows_of(text: str) -> list[list[int]]:
    """The integers of `as_text`; this may be traced."""
    return [[int(number) for number in row.split(",")] for row in text.split(";")]


def constants(base: Any, modality: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Options of ``base.get_<modality>_features``: those that stay as they are, and those that are text.

    Tables that an encoder would compute from a grid with data-dependent shapes are computed here.
    """
    plain = {name: option for name, option in options.items() if name not in (*LISTS, *GRIDS)}
    text = {name: as_text(options[name]) for name in (*LISTS, *GRIDS) if name in options}
    grid = options.get(f"{modality}_grid_thw")
    if isinstance(grid, Tensor):
        for name, table in vision_tables(base, grid).items():
            key = f"{modality}_{name}"
            if key in options:
                continue
            if name.endswith("_seqlens") and not _compat.takes_varlen(base):
                text[key] = ",".join(map(str, table.tolist()))
            else:
                plain[key] = table
    return plain, text


def vision_tables(base: Any, grid: Tensor) -> dict[str, Tensor]:
    """What a packed vision encoder computes from `grid` ``[images, 3]`` by operations that break graphs.

    Keyed as its precomputed keyword arguments, without the modality (transformers 5.17 - 5.23, from
    whose `vision_utils` the functions are).
    """
    from transformers import vision_utils

    encoder = base.visual
    merge = int(encoder.config.spatial_merge_size)
    tables = {
        "position_ids": vision_utils.get_vision_position_ids(grid, merge),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
    }
    if hasattr(encoder, "window_size"):
        tables["window_index"], tables["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            grid, merge, encoder.window_size, encoder.patch_size
        )
    if hasattr(encoder, "num_grid_per_side"):
        names = ("interp_indices", "interp_weights")
        found = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=encoder.num_grid_per_side,
            mode=encoder.interpolation_mode,
            align_corners=encoder.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        tables.update(zip(names, found, strict=True))
    return tables


def numpy_free(base: Any) -> dict[str, Callable[..., Any]]:
    """Methods of this instance that ask numpy for the product of a shape, asking `math` instead.

    Dynamo makes a tensor of numpy's answer, and the comparison after it ends the graph. The copies
    have globals of their own; class and module stay as they are, and so does a method that somebody
    put on the instance.
    """
    found: dict[str, Callable[..., Any]] = {}
    for name in ("pack_image_features",):
        function = None if name in vars(base) else getattr(type(base), name, None)
        if isinstance(function, types.FunctionType) and function.__globals__.get("np") is numpy:
            shim = types.SimpleNamespace(prod=math.prod, ndarray=numpy.ndarray)
            own = types.FunctionType(
                function.__code__,
                {**function.__globals__, "np": shim},
                function.__name__,
                function.__defaults__,
                function.__closure__,
            )
            own.__kwdefaults__ = function.__kwdefaults__
            found[name] = functools.partial(own, base)
    return found
