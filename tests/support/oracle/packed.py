"""The vision side of the oracle for Qwen-VL: frames of any size, packed one after another.

Patches are packed block by block (2 x 2 patches, u = 2 on a side), so a whole block is one token of a
`Grid`. Each frame of each image or video is a grid of its own: it merges by itself, to targets of its
own sides, and attention stays within it.

The tower's rotary embedding turns each patch by angles that are its row's and its column's multiples
of the frequencies. They merge with the block as the tokens do (size-weighted means of the same
pairs), which is the rotation by the mean coordinates; later blocks of the tower take the cos/sin of
the merged angles. `feature="keys"` compares what attention takes as keys: after the rotation.

Qwen3-VL reads its deepstack features at blocks on the way (taps). A merge after the tap's block comes
before the tap; after the first tap no block may merge, or its features would have another grid.
Qwen2.5-VL attends in windows, which merges would tear: it is pruned only, on the stock features.

GLM-4.1V adds learned positions resampled to each image, and makes a block one feature by a convolution;
its images only, whose videos have other placeholders.

Shapes: P patches, F frames, C channels, R rotary channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Glm4vForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from luvc_fx.schedule import Merge, Schedule
from tests.support.oracle.merge import Grid, merge_grid
from tests.support.oracle.rows import Piece, VisualRows, assemble, placeholders, shared_out
from tests.support.oracle.tome import Patches, merge_patches, placed
from tests.support.oracle.vision import shorter, target_blocks

FAMILIES = (
    Glm4vForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)


@dataclass
class Frame:
    """What the tower made of a frame: of features that are a row-major grid.

    Attributes:
        features: [h * w, D].
        slots: [h * w] int64, each one's representative: its raster index among the unmerged blocks.
        sizes: [h * w] float32; grid: (h, w).
        deep: each [h * w, D], the deepstack features.
        placeholders: the blocks of the frame before any merge.
    """

    features: Tensor
    slots: Tensor
    sizes: Tensor
    grid: tuple[int, int]
    deep: Sequence[Tensor]
    placeholders: int


class _Tower:
    """Qwen2-VL's, Qwen3-VL's and GLM-4.1V's tower, step by step on packed patches [P, C]."""

    def __init__(self, model: nn.Module) -> None:
        self.tower = model.model.visual
        self.unit = self.tower.spatial_merge_size
        self.blocks: nn.ModuleList = self.tower.blocks
        self.taps: Sequence[int] = getattr(self.tower, "deepstack_visual_indexes", ())

    def embed(self, pixels: Tensor, thw: Sequence[Sequence[int]]) -> Tensor:
        """What enters the first block, [P, C]."""
        hidden = self.tower.patch_embed(pixels.to(self.tower.dtype))
        if hasattr(self.tower, "post_conv_layernorm"):
            hidden = self.tower.post_conv_layernorm(hidden)
        if not hasattr(self.tower, "pos_embed") and not hasattr(self.tower, "embeddings"):
            return hidden
        learned = [self._learned(h, w).repeat(t, 1) for t, h, w in thw]
        return hidden + torch.cat(learned).to(hidden.dtype)

    def _learned(self, h: int, w: int) -> Tensor:
        """[h * w, C]: the learned positions, resampled to h x w patches.

        Qwen3-VL's bilinearly, corners on corners; GLM-4.1V's bicubically, edges on edges.
        """
        bicubic = hasattr(self.tower, "embeddings")
        table = self.tower.embeddings.position_embedding if bicubic else self.tower.pos_embed
        side = math.isqrt(table.num_embeddings)
        image = table.weight.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        mode, on_corners = ("bicubic", False) if bicubic else ("bilinear", True)
        grid = nn.functional.interpolate(image, (h, w), mode=mode, align_corners=on_corners)
        return self._by_block(grid[0].permute(1, 2, 0))

    def features(self, hidden: Tensor) -> Tensor:
        """[P / u ** 2, D]: one feature of each block of the last block's output, [P, C]."""
        if not hasattr(self.tower, "downsample"):
            return self.tower.merger(hidden)
        blocks = self.tower.post_layernorm(hidden).unflatten(0, (-1, self.unit**2))
        # A kernel as large as a block is a sum over its patches, in the order in which they are packed.
        kernel = self.tower.downsample.weight.flatten(2)  # [D, C, u * u]
        return self.tower.merger(torch.einsum("npc,dcp->nd", blocks, kernel) + self.tower.downsample.bias)

    def _by_block(self, raster: Tensor) -> Tensor:
        """[h * w, C] block by block, of [h, w, C]."""
        h, w, channels = raster.shape
        split = raster.reshape(h // self.unit, self.unit, w // self.unit, self.unit, channels)
        return split.transpose(1, 2).reshape(h * w, channels)

    def angles(self, thw: Sequence[Sequence[int]]) -> Tensor:
        """[P, R] float32: by how much each patch's channels are turned (row, column, row, column)."""
        frequencies = self.tower.rotary_pos_emb.inv_freq.float()
        out = []
        for t, h, w in thw:
            rows, columns = (
                torch.arange(side, device=frequencies.device).float()[:, None] * frequencies
                for side in (h, w)
            )
            turned = torch.cat([rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)], dim=-1)
            out.append(self._by_block(torch.cat([turned, turned], dim=-1)).repeat(t, 1))
        return torch.cat(out)

    def run(self, block: Any, hidden: Tensor, angles: Tensor, lengths: Sequence[int]) -> Tensor:
        """`hidden` [P, C] after `block`; attention within frames of `lengths` patches."""
        ends = torch.tensor([0, *lengths], device=hidden.device).cumsum(0).int()
        scale = self.tower.rotary_pos_emb.attention_scaling
        turn = (angles.cos() * scale, angles.sin() * scale)
        return block(hidden, cu_seqlens=ends, position_embeddings=turn)

    def keys(self, block: Any, hidden: Tensor, angles: Tensor) -> Tensor:
        """[P, heads * R]: what attention in `block` takes as keys, `hidden` entering."""
        heads = block.attn.num_heads
        keys = block.attn.qkv(block.norm1(hidden)).reshape(len(hidden), 3, heads, -1)[:, 1]
        scale = self.tower.rotary_pos_emb.attention_scaling
        cos, sin = (wave[:, None] * scale for wave in (angles.cos(), angles.sin()))
        first, second = keys.float().chunk(2, dim=-1)
        turned = keys.float() * cos + torch.cat([-second, first], dim=-1) * sin
        return turned.to(keys.dtype).flatten(1)


def _patches(grids: Sequence[Tensor], unit: int) -> Tensor:
    """[P, C] of grids of blocks, each [1, h, w, u * u * C]."""
    return torch.cat([grid.reshape(-1, grid.shape[-1] // unit**2) for grid in grids])


def _blocks(patches: Tensor, frames: Sequence[Grid], unit: int) -> list[Tensor]:
    """The patches [P, C] as grids of blocks in the shapes of `frames`."""
    shapes = [frame.sizes.shape for frame in frames]
    parts = patches.split([unit**2 * h * w for _, h, w in shapes])
    return [part.reshape(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def encode_packed(
    model: nn.Module, schedule: Schedule, pixels: Tensor, grid_thw: Tensor, gaps: list[float]
) -> list[list[Frame]]:
    """The tower block by block with the merges, then the projector: of each image (video) its frames.

    Args:
        pixels: [P, 3 * frames * patch * patch], packed by the processor.
        grid_thw: [images, 3], the patches of each.
        gaps: gets the distance of every decision from its runner-up.
    """
    thw = [tuple(sides) for sides in grid_thw.tolist()]
    tower = _Tower(model)
    merges = schedule.merges_at(len(tower.blocks))
    if isinstance(model, Qwen2_5_VLForConditionalGeneration):
        if merges:
            raise NotImplementedError("the oracle does not merge in a tower with windowed attention")
        return _stock(model, pixels, grid_thw)
    if tower.taps and any(at > min(tower.taps) for at, _ in merges):
        raise NotImplementedError(f"the oracle does not merge after the first deepstack tap, {tower.taps}")
    unit = tower.unit
    shapes = [(1, h // unit, w // unit, -1) for t, h, w in thw for _ in range(t)]
    lengths = [h * w for t, h, w in thw for _ in range(t)]
    frames = [
        Grid.of(x.reshape(shape), angles=turn.reshape(shape))
        for x, turn, shape in zip(
            tower.embed(pixels, thw).split(lengths), tower.angles(thw).split(lengths), shapes, strict=True
        )
    ]
    deep: list[Tensor] = []
    rows = [Patches(torch.empty(0), torch.ones(1, n), torch.arange(n)[None]) for n in lengths]
    for index, block in enumerate(tower.blocks):
        hidden = _patches([frame.x for frame in frames], unit)
        angles = _patches([frame.angles for frame in frames if frame.angles is not None], unit)
        here = [merge for at, merge in merges if at == index]
        keys: Sequence[Tensor | None] = [None] * len(frames)
        if any(merge.feature == "keys" for merge in here):
            keys = _blocks(tower.keys(block, hidden, angles), frames, unit)
        before = hidden
        hidden = tower.run(block, hidden, angles, [unit**2 * frame.sizes.numel() for frame in frames])
        frames = [
            replace(frame, x=x, keys=key)
            for frame, x, key in zip(frames, _blocks(hidden, frames, unit), keys, strict=True)
        ]
        if any(merge.method.name == "tome" for merge in here):
            turned = tower.keys(block, before, angles).unflatten(1, (block.attn.num_heads, -1)).mean(1)
            by_frame = [part[None] for part in turned.split([row.sizes.numel() for row in rows])]
            for number, (frame, key) in enumerate(zip(frames, by_frame, strict=True)):
                assert frame.angles is not None
                own = rows[number]
                patches = [values.reshape(1, own.sizes.numel(), -1) for values in (frame.x, frame.angles)]
                rows[number], frames[number] = _tome(here, frame, own, key, *patches, unit, gaps)
            here = []
        for merge in here:
            axis = {"height": 1, "width": 2}[merge.axis]
            frames = [
                merge_grid(
                    frame,
                    merge.axis,
                    target_blocks(merge, frame.sizes.shape[axis], unit),
                    gaps,
                    merge.pairing,
                    merge.feature,
                )
                for frame in frames
            ]
        if index in tower.taps:
            reader = tower.tower.deepstack_merger_list[list(tower.taps).index(index)]
            deep.append(reader(_patches([frame.x for frame in frames], unit)))
    features = tower.features(_patches([frame.x for frame in frames], unit))
    counts = [frame.sizes.numel() for frame in frames]
    if any(merge.method.name == "tome" for _, merge in merges):
        for frame, row, length in zip(frames, rows, lengths, strict=True):
            frame.slots = placed(row.slots.reshape(1, -1, unit**2)[..., 0], length // unit**2, unit == 1)
            frame.sizes = (row.sizes.reshape(-1, unit**2).sum(1) / unit**2).reshape(frame.sizes.shape)
    made = [
        Frame(
            feature,
            frame.slots.flatten(),
            frame.sizes.flatten(),
            (frame.sizes.shape[1], frame.sizes.shape[2]),
            taps,
            length // unit**2,
        )
        for feature, frame, taps, length in zip(
            features.split(counts),
            frames,
            list(zip(*(tap.split(counts) for tap in deep), strict=True)) or [()] * len(frames),
            lengths,
            strict=True,
        )
    ]
    return _by_item(made, thw)


def _tome(
    merges: Sequence[Merge],
    frame: Grid,
    row: Patches,
    keys: Tensor,
    x: Tensor,
    angles: Tensor,
    unit: int,
    gaps: list[float],
) -> tuple[Patches, Grid]:
    """The patches of one frame after `merges`, and what the tower has of them: a grid of other sides."""
    height, width = (unit * side for side in frame.sizes.shape[1:])
    row = Patches(x, row.sizes, row.slots, keys, angles)
    for merge in merges:
        height, width = shorter(merge, height, width, unit)
        row = merge_patches(row, height * width, gaps, merge.feature)
    assert row.angles is not None
    shape = (1, height // unit, width // unit, -1)
    return row, Grid.of(row.x.reshape(shape), angles=row.angles.reshape(shape))


def _stock(model: nn.Module, pixels: Tensor, grid_thw: Tensor) -> list[list[Frame]]:
    """The frames of the stock tower, which nothing merges in."""
    features = torch.cat(list(model.get_image_features(pixels, grid_thw).pooler_output))
    unit = model.model.visual.spatial_merge_size
    thw = [tuple(sides) for sides in grid_thw.tolist()]
    grids = [(h // unit, w // unit) for t, h, w in thw for _ in range(t)]
    made = []
    for feature, (h, w) in zip(features.split([h * w for h, w in grids]), grids, strict=True):
        slots = torch.arange(h * w, device=feature.device)
        made.append(Frame(feature, slots, torch.ones(h * w, device=feature.device), (h, w), (), h * w))
    return _by_item(made, thw)


def _by_item(frames: list[Frame], thw: Sequence[Sequence[int]]) -> list[list[Frame]]:
    rest = iter(frames)
    return [[next(rest) for _ in range(t)] for t, _, _ in thw]


def packed_rows(
    model: nn.Module, schedule: Schedule, input_ids: Tensor, vision: dict[str, Tensor], gaps: list[float]
) -> VisualRows:
    """The visual tokens of each row, images and videos in the order in which they stand in it."""
    visual = placeholders(model, input_ids)
    pieces: list[tuple[int, Piece]] = []
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if name not in vision:
            continue
        if kind == "video" and isinstance(model, Glm4vForConditionalGeneration):
            raise NotImplementedError("the oracle does not know the placeholders of GLM-4.1V's videos")
        items = encode_packed(model, schedule, vision[name], vision[f"{kind}_grid_thw"], gaps)
        mine = input_ids == getattr(model.config, f"{kind}_token_id")
        counts = [sum(frame.placeholders for frame in item) for item in items]
        for item, (row, places) in zip(items, shared_out(visual, mine, counts, kind), strict=True):
            own = places.split([frame.placeholders for frame in item])
            pieces += [
                (row, Piece(frame.features, place[frame.slots], frame.sizes, frame.grid, frame.deep))
                for frame, place in zip(item, own, strict=True)
            ]
    return assemble(len(input_ids), pieces)
