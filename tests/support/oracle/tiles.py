"""The vision side of the oracle for LLaVA-OneVision and LLaVA-NeXT: an image in several tiles.

Every tile is a grid of its own (u = 1), all with the same targets; what padding means for merges is
in `oracle_crop`. An image's features are its whole-image tile and, if it is cut up, the composite of
its tiles without the padding, each composite row ended by a newline row. Of an image in one tile
(OneVision with several images in a row of the batch) one newline follows the tile.

After merges a tile row (tiles at the same height) has n' composite rows for the n it had; its j-th
newline takes the placeholder of the old newline number floor((j + 1) * n / n') - 1 of that tile row.
All features, newlines too, are visual tokens for prunes. They are not one grid: `VisualRows.grid` is
None, so `per_image` filters over the whole row.

A frame of a video (OneVision) is one tile without padding. Its merged grid (H', W') is pooled as stock
pools H x W: bilinear, to (ceil(H' / 2), ceil(W' / 2)). The frames follow one another, one newline row
ends the video. No pooled feature is one token, so the places are shared out evenly: `pooled_places`.

Not merged: images whose features OneVision would interpolate (anyres_max_N). They are pruned on the
stock features.

Shapes: T tiles of g x g patches, C channels of the tower, D of the text model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from luvc_fx.schedule import Merge, Schedule
from tests.support.oracle.crop import Tile, shortened, target, tiles_of, tokens_of
from tests.support.oracle.merge import Grid, merge_grid
from tests.support.oracle.rows import Piece, VisualRows, assemble, placeholders, shared_out
from tests.support.oracle.vision import encoder_blocks

FAMILIES = (LlavaOnevisionForConditionalGeneration, LlavaNextForConditionalGeneration)


class _Tower:
    """CLIP with CLS in front, or SigLIP without."""

    def __init__(self, model: nn.Module) -> None:
        self.tower = model.model.vision_tower
        self.prefix = 1 if hasattr(self.tower.embeddings, "class_embedding") else 0
        strategy = model.config.vision_feature_select_strategy
        if strategy != ("default" if self.prefix else "full"):
            raise NotImplementedError("the oracle takes the features without CLS, and all of them")
        self.blocks: nn.ModuleList = self.tower.encoder.layers

    def embed(self, pixels: Tensor) -> Tensor:
        """What enters the first block, [T, prefix + patches, C]."""
        hidden = self.tower.embeddings(pixels)
        return self.tower.pre_layrnorm(hidden) if self.prefix else hidden

    def keys(self, block: Any, hidden: Tensor) -> Tensor:
        """[T, prefix + patches, heads * d]: what `block` takes as keys, `hidden` entering."""
        return block.self_attn.k_proj(block.layer_norm1(hidden))


def tile_layout(model: nn.Module, vision: dict[str, Tensor]) -> list[Tile]:
    """The tiles of all images of a batch."""
    config = model.config
    sizes = [(int(height), int(width)) for height, width in vision["image_sizes"].tolist()]
    counts = vision.get("batch_num_images")
    tiled = [True] * len(sizes)
    if counts is not None:
        tiled = [count == 1 for count in counts.tolist() for _ in range(count)]
    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size
    return tiles_of(sizes, tiled, config.image_grid_pinpoints, size, side)


def frame_layout(model: nn.Module, vision: dict[str, Tensor]) -> list[Tile]:
    """The frames of all videos of a batch, each as a whole tile; `Tile.image` is the video."""
    config = model.config.vision_config
    side = config.image_size // config.patch_size
    videos, frames = vision["pixel_values_videos"].shape[:2]
    whole = ((0, side), (0, side))
    return [Tile(video, None, whole, (side, side)) for video in range(videos) for _ in range(frames)]


def encode_tiles(
    model: nn.Module, schedule: Schedule, pixel_values: Tensor, tiles: list[Tile], gaps: list[float]
) -> tuple[Tensor, Grid, list[Tile]]:
    """The tower block by block with the merges, then the projector.

    Args:
        pixel_values: [T, 3, size, size].
        tiles: T of them, as nothing merged.
        gaps: gets the distance of every decision from its runner-up.

    Returns:
        Features [T, h, w, D], the grid [T, h, w] that they were and the tiles after the merges.
    """
    tower = _Tower(model)
    count = encoder_blocks(model)
    merges = schedule.merges_at(count)
    hidden = tower.embed(pixel_values)
    side = tiles[0].sides[0]

    def as_grid(rows: Tensor, height: int, width: int) -> Tensor:
        return rows[:, tower.prefix :].reshape(len(rows), height, width, -1)

    grid = Grid.of(as_grid(hidden, side, side))
    for index, block in enumerate(tower.blocks[:count]):
        here = [merge for at, merge in merges if at == index]
        keys = None
        if any(merge.feature == "keys" for merge in here):
            keys = as_grid(tower.keys(block, hidden), *tiles[0].sides)
        hidden = block(hidden, None)
        if not here:
            continue
        grid = replace(grid, x=as_grid(hidden, *tiles[0].sides), keys=keys)
        for merge in here:
            axis = {"height": 0, "width": 1}[merge.axis]
            runs = [tile.partly(axis) for tile in tiles]
            left = target(tiles, merge)
            grid = merge_grid(grid, merge.axis, left, gaps, merge.pairing, merge.feature, runs)
            tiles = shortened(tiles, merge)
        hidden = torch.cat([hidden[:, : tower.prefix], grid.x.flatten(1, 2)], dim=1)
    features = model.model.multi_modal_projector(as_grid(hidden, *tiles[0].sides))
    return features, grid, tiles


def tile_counts(model: nn.Module, merges: Sequence[Merge], vision: dict[str, Tensor]) -> list[int]:
    """The visual tokens of each image, then of each video, after `merges`, newlines too."""
    due = [merge for _, merge in Schedule(merge=tuple(merges)).merges_at(encoder_blocks(model))]
    counts = []
    if "pixel_values" in vision:
        tiles = tile_layout(model, vision)
        for merge in due:
            tiles = shortened(tiles, merge)
        counts += [tokens_of(tiles, image) for image in range(1 + max(tile.image for tile in tiles))]
    if "pixel_values_videos" in vision:
        tiles = frame_layout(model, vision)
        for merge in due:
            tiles = shortened(tiles, merge)
        height, width = pooled(tiles[0].sides)
        videos, frames = vision["pixel_values_videos"].shape[:2]
        counts += [frames * height * width + 1] * videos
    return counts


def pooled(sides: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a frame of `sides` after the pooling."""
    return -(-sides[0] // 2), -(-sides[1] // 2)


def pooled_places(before: tuple[int, int], after: tuple[int, int]) -> list[int]:
    """The placeholder of each pooled feature among those of its frame, both in raster order.

    Args:
        before, after: (height, width) of the pooled grid without merges and with them.
    """
    lines, columns = (
        [(2 * i + 1) * old // (2 * new) for i in range(new)] for old, new in zip(before, after, strict=True)
    )
    return [line * before[1] + column for line in lines for column in columns]


def newlines(before: int, after: int) -> list[tuple[int, int]]:
    """The old newline whose placeholder each new one takes, and how many old ones it stands for."""
    ends = [(j + 1) * before // after for j in range(after)]
    return [(end - 1, end - start) for start, end in zip([0, *ends], ends, strict=False)]


def pack_image(
    features: Tensor, grid: Grid, before: Sequence[Tile], after: Sequence[Tile], newline: Tensor
) -> Piece:
    """The features of one image in the order of the stock model.

    Args:
        features: [t, h, w, D] of its t tiles, the whole image first; grid: [t, h, w].
        before, after: its tiles before and after the merges.
        newline: [D].
    """
    height, width = before[0].sides
    base = height * width
    out = list(features[0].flatten(0, 1))
    slots, sizes = grid.slots[0].flatten().tolist(), grid.sizes[0].flatten().tolist()
    if len(after) == 1:
        return _piece([*out, newline], [*slots, base], [*sizes, 1.0])
    at = {tile.place: index for index, tile in enumerate(after)}
    rows, columns = (1 + max(tile.place[i] for tile in after[1:] if tile.place) for i in range(2))

    def kept(tiles: Sequence[Tile], axis: int) -> list[tuple[int, int]]:
        places = [(i, 0) if axis == 0 else (0, i) for i in range((rows, columns)[axis])]
        return [tiles[at[place]].valid[axis] for place in places]

    old_rows, old_columns = kept(before, 0), kept(before, 1)
    wide = 1 + sum(b - a for a, b in old_columns)  # placeholders of a composite row, its newline last
    top = 0  # composite rows above, before the merges
    for i, (run, old) in enumerate(zip(kept(after, 0), old_rows, strict=True)):
        ends = newlines(old[1] - old[0], run[1] - run[0])
        for r, (end, stands_for) in zip(range(*run), ends, strict=True):
            left = 0
            for j, (a, b) in enumerate(kept(after, 1)):
                tile = at[i, j]
                for c in range(a, b):
                    row, column = divmod(int(grid.slots[tile, r, c]), width)
                    out.append(features[tile, r, c])
                    slots.append(base + (top + row - old[0]) * wide + left + column - old_columns[j][0])
                    sizes.append(float(grid.sizes[tile, r, c]))
                left += old_columns[j][1] - old_columns[j][0]
            out.append(newline)
            slots.append(base + (top + end) * wide + wide - 1)
            sizes.append(float(stands_for))
        top += old[1] - old[0]
    return _piece(out, slots, sizes)


def _piece(features: list[Tensor], slots: list[int], sizes: list[float]) -> Piece:
    device = features[0].device
    return Piece(
        torch.stack([feature.to(features[0].dtype) for feature in features]),
        torch.tensor(slots, device=device),
        torch.tensor(sizes, dtype=torch.float32, device=device),
    )


def interpolated(model: nn.Module, tiles: Sequence[Tile]) -> bool:
    """Whether OneVision resamples the composite of an image, before any merge (anyres_max_N)."""
    aspect = getattr(model.config, "vision_aspect_ratio", "")
    if not aspect.startswith("anyres_max_"):
        return False
    most = int(aspect.removeprefix("anyres_max_"))
    for image in {tile.image for tile in tiles}:
        own = [tile for tile in tiles if tile.image == image and tile.place is not None]
        area = sum((b - a) * (d - c) for (a, b), (c, d) in (tile.valid for tile in own))
        if math.sqrt(area / (most * tiles[0].sides[0] ** 2)) > 1.1:
            return True
    return False


def _images(
    model: nn.Module, schedule: Schedule, vision: dict[str, Tensor], gaps: list[float]
) -> list[Piece]:
    """The images of a batch, slots among each image's own placeholders."""
    tiles = tile_layout(model, vision)
    count = 1 + max(tile.image for tile in tiles)
    if interpolated(model, tiles):
        if schedule.merge:
            raise NotImplementedError("the oracle does not merge where the features are interpolated")
        stock = {name: value for name, value in vision.items() if name != "pixel_values_videos"}
        return [_whole(features) for features in model.get_image_features(**stock).pooler_output]
    own = [[tile for tile in tiles if tile.image == image] for image in range(count)]
    pixels = vision["pixel_values"]
    if pixels.ndim == 5:
        pixels = torch.cat([pixels[image, : len(own[image])] for image in range(count)])
    features, grid, after = encode_tiles(model, schedule, pixels, tiles, gaps)
    pieces, first = [], 0
    for image in range(count):
        last = first + len(own[image])
        part = Grid(grid.x[first:last], grid.sizes[first:last], grid.slots[first:last])
        newline = model.model.image_newline
        pieces.append(pack_image(features[first:last], part, own[image], after[first:last], newline))
        first = last
    return pieces


def _videos(
    model: nn.Module, schedule: Schedule, vision: dict[str, Tensor], gaps: list[float]
) -> list[Piece]:
    """The videos of a batch, slots among each video's own placeholders."""
    pixels = vision["pixel_values_videos"]
    videos, frames = pixels.shape[:2]
    tiles = frame_layout(model, vision)
    features, _, after = encode_tiles(model, schedule, pixels.flatten(0, 1), tiles, gaps)
    old, new = pooled(tiles[0].sides), pooled(after[0].sides)
    small = nn.functional.interpolate(features.permute(0, 3, 1, 2), size=new, mode="bilinear")
    small = small.permute(0, 2, 3, 1).reshape(videos, frames * new[0] * new[1], -1)
    area = old[0] * old[1]
    slots = [frame * area + place for frame in range(frames) for place in pooled_places(old, new)]
    share = area / (new[0] * new[1])
    return [
        _piece([*video, model.model.image_newline], [*slots, frames * area], [*[share] * len(slots), 1.0])
        for video in small
    ]


def _whole(features: Tensor) -> Piece:
    """Stock features [n, D], of which none has merged."""
    n = len(features)
    return Piece(features, torch.arange(n, device=features.device), torch.ones(n, device=features.device))


def tile_rows(
    model: nn.Module, schedule: Schedule, input_ids: Tensor, vision: dict[str, Tensor], gaps: list[float]
) -> VisualRows:
    """The visual tokens of each row, images and videos in the order in which they stand in it."""
    visual = placeholders(model, input_ids)
    found: list[tuple[int, Piece]] = []
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if name not in vision:
            continue
        pieces = {"image": _images, "video": _videos}[kind](model, schedule, vision, gaps)
        counts = [round(float(piece.sizes.double().sum())) for piece in pieces]
        mine = input_ids == getattr(model.config, f"{kind}_token_id")
        owners = shared_out(visual, mine, counts, kind)
        found += [
            (row, replace(piece, slots=places[piece.slots]))
            for piece, (row, places) in zip(pieces, owners, strict=True)
        ]
    return assemble(len(input_ids), found)
