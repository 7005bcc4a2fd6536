"""The tower of a packed encoder, and the tables that it would compute from grids with dynamic sizes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

POSITION_IDS = "get_vision_position_ids(grid_thw, self.spatial_merge_size, kwargs=kwargs)"
_SEQLENS = "get_vision_attention_seqlens(grid_thw, self.config, kwargs=kwargs)"
_WINDOWS = (
    "get_vision_window_index(grid_thw, spatial_merge_size=self.spatial_merge_size, "
    "window_size=self.window_size, patch_size=self.patch_size, kwargs=kwargs)"
)
_INTERPOLATION = (
    "get_vision_interpolation_indices_and_weights(grid_thw, num_grid_per_side=self.num_grid_per_side, "
    "mode=self.interpolation_mode, align_corners=self.interpolation_align_corners, "
    "spatial_merge_size=self.config.spatial_merge_size, kwargs=kwargs)"
)
"""Calls by which towers make their tables (transformers 5.17 - 5.23)."""


def tower_of(base: nn.Module) -> Any:
    """The module of `base` that takes the grids of all images, by whatever name; None where there is none."""
    for module in base.modules():
        if module is not base and "grid_thw" in inspect.signature(module.forward).parameters:
            return module
    return None


def calls_of(tower: Any) -> str:
    """The source of a tower's forward, without spaces; empty where there is none."""
    try:
        source = inspect.getsource(inspect.unwrap(tower.forward))
    except (OSError, TypeError):
        return ""
    return _bare(source)


def makes(calls: str, call: str) -> bool:
    """Whether `call` is among the `calls_of` a tower."""
    return _bare(call) in calls


def vision_tables(tower: Any, calls: str, grid: Tensor) -> dict[str, Tensor]:
    """What a tower computes from `grid` ``[images, 3]``, as its precomputed keyword arguments.

    Only what it computes by the very calls that are repeated here: others it computes itself, in its graph.

    Args:
        calls: see `calls_of`.
    """
    from transformers import vision_utils

    tables: dict[str, Tensor] = {}
    if makes(calls, POSITION_IDS):
        tables["position_ids"] = vision_utils.get_vision_position_ids(grid, tower.spatial_merge_size)
    if makes(calls, _SEQLENS):
        tables["cu_seqlens"] = vision_utils.get_vision_cu_seqlens(grid)
    if makes(calls, _WINDOWS):
        tables["window_index"], tables["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            grid, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
    if makes(calls, _INTERPOLATION):
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.config.spatial_merge_size,
        )
        tables |= {"interp_indices": indices, "interp_weights": weights}
    return tables


def _bare(source: str) -> str:
    return "".join(source.split()).replace(",)", ")")
