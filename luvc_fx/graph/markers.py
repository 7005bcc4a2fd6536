"""Ops by which the front door tells a pass something that a captured graph could not show.

A graph in which nobody looks for them still runs; only `cache_mask` raises, since no mask that it
could return would be right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from luvc_fx._compat import OpOverload, OpOverloadPacket

_LIBRARY = torch.library.Library("luvc_fx", "FRAGMENT")

_LIBRARY.define("representatives(Tensor features, int rows) -> Tensor")
_LIBRARY.define("patches(Tensor pixels, SymInt[] grids, int unit, str form='', SymInt[] merged=[]) -> Tensor")
_LIBRARY.define("image_grid(Tensor features, int height, int width) -> Tensor")
_LIBRARY.define("row_counts(Tensor features, str form, SymInt[] numbers) -> Tensor")
_LIBRARY.define("prompt_rows(Tensor embeds_or_ids) -> Tensor")
_LIBRARY.define("cache_mask(Tensor padding, SymInt queries) -> Tensor")
_LIBRARY.define("cache_mask.segments(Tensor padding) -> Tensor")


def _representatives(features: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.arange(features.shape[0], device=features.device).reshape(1, 1, -1).clone()


def _patches(
    pixels: torch.Tensor, grids: list[int], unit: int, form: str = "", merged: Sequence[int] = ()
) -> torch.Tensor:
    return pixels.clone()


def _image_grid(features: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return features.clone()


def _row_counts(features: torch.Tensor, form: str, numbers: list[int]) -> torch.Tensor:
    return features.clone()


def _prompt_rows(embeds_or_ids: torch.Tensor) -> torch.Tensor:
    batch, length = embeds_or_ids.shape[:2]
    return torch.arange(length, device=embeds_or_ids.device).expand(batch, length).clone()


def _cache_mask_shape(padding: torch.Tensor, queries: int) -> torch.Tensor:
    return padding.new_empty((padding.shape[0] or 1, 1, queries, 1), dtype=torch.bool)


def _segments_shape(padding: torch.Tensor) -> torch.Tensor:
    return padding.new_empty(2 * padding.shape[0] + 1, dtype=torch.int32)


def _cache_mask(padding: torch.Tensor, queries: int = 0) -> torch.Tensor:
    raise RuntimeError(
        "this forward over a shortened cache was not compiled by luvc_fx (Dynamo fell back to eager?), "
        "and without that its attention mask would be wrong"
    )


_SHOWN = {
    "representatives": _representatives,
    "patches": _patches,
    "image_grid": _image_grid,
    "row_counts": _row_counts,
    "prompt_rows": _prompt_rows,
}
for _name, _body in _SHOWN.items():
    _LIBRARY.impl(_name, _body, "CompositeImplicitAutograd")
for _name in ("cache_mask", "cache_mask.segments"):
    _LIBRARY.impl(_name, _cache_mask, "CompositeExplicitAutograd")
torch.library.register_fake("luvc_fx::cache_mask", _cache_mask_shape, lib=_LIBRARY)
torch.library.register_fake("luvc_fx::cache_mask.segments", _segments_shape, lib=_LIBRARY)

REPRESENTATIVES = torch.ops.luvc_fx.representatives
"""`representatives(features [N, D], rows) -> [1, 1, N]`: the placeholder that each feature stands for.

Placeholders are numbered over all images. The features belong to `rows` rows of a batch, as many to each.
The merge pass replaces the call by the representatives, `[n, H', W']` where features are n equal grids."""

PATCHES = torch.ops.luvc_fx.patches
"""`patches(pixels [P, C], [t, h, w, ...], unit, form, merged) -> pixels`: these rows are the patches of
images or videos of t frames of h x w each, frame by frame, in blocks of unit x unit that become one feature.
In a graph for all sizes `form` and `merged` say what merges make of the one grid there is (see
`luvc_fx.schedule.merged_sides.MergedSides`), and sides are symbols; else they are empty."""

IMAGE_GRID = torch.ops.luvc_fx.image_grid
"""`image_grid(features, height, width) -> features`: the grid that these features lie on."""

ROW_COUNTS = torch.ops.luvc_fx.row_counts
"""`row_counts(features, form, numbers) -> features`: how many rows there are behind each prune of a graph for
all numbers of tokens; see `luvc_fx.schedule.row_counts.RowCounts`. The numbers are symbols, save 0 and 1."""

PROMPT_ROWS = torch.ops.luvc_fx.prompt_rows
"""`prompt_rows(ids [B, S]) -> [B, S]`: the row numbers; pruned like any value with a token axis."""

CACHE_MASK = torch.ops.luvc_fx.cache_mask
"""`cache_mask(padding [B], queries) -> bool [B, 1, queries, 1]`: stands for "causal over whatever
this layer's cache holds, without the first `padding` rows" (none where `padding` is ``[0]``). Only true
once a pass rebuilt it.

`cache_mask(padding [B]) -> int32 [2 B + 1]`: the same for FlashAttention. Where segments begin when the rows
of a batch lie one behind the other: each one's padding is a segment, and what is behind it another."""


def is_call(node: torch.fx.Node, marker: OpOverloadPacket) -> bool:
    """Whether `node` calls `marker`, in any spelling that Dynamo keeps."""
    return node.op == "call_function" and getattr(node.target, "overloadpacket", node.target) is marker


def is_ours(node: torch.fx.Node) -> bool:
    """Whether `node` calls any operator of this package, whose body no compiler cache can see."""
    target = node.target
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    return isinstance(target, OpOverloadPacket) and str(target).startswith("luvc_fx.")
