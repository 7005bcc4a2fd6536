"""The vision side of the oracle: each family's tower block by block, with the merges between.

Shapes: I images (where a picture is cut into tiles, each tile is one), u x u patches per feature
(u = 1 for LLaVA, 2 for InternVL's pixel shuffle), D channels of the text model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, LlavaForConditionalGeneration

from luvc_fx.schedule import Merge, Schedule
from tests.support.oracle.merge import Grid, merge_grid
from tests.support.oracle.tome import Patches, merge_patches, placed

# ----------------------------------------------------------------------------------------- families


class _Llava:
    """CLIP with CLS in front; one feature a patch."""

    unit = 1

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.model = model
        self.tower = model.model.vision_tower
        self.blocks: nn.ModuleList = self.tower.encoder.layers

    def embed(self, pixel_values: Tensor) -> Tensor:
        """What enters the first block, [I, 1 + patches, C]."""
        return self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))

    def run(self, block: Any, hidden: Tensor) -> Tensor:
        """`hidden` after `block`."""
        return block(hidden, None)

    def keys(self, block: Any, hidden: Tensor) -> Tensor:
        """[I, 1 + patches, heads * d]: what attention in `block` takes as keys, `hidden` entering."""
        return block.self_attn.k_proj(block.layer_norm1(hidden))

    def features(self, hidden: Tensor, height: int, width: int) -> Tensor:
        """[I, features, D] of the last block's output; the grid of patches is height x width."""
        return self.model.model.multi_modal_projector(hidden[:, 1:])


class _InternVL:
    """InternViT with CLS in front; a pixel shuffle makes 2 x 2 patches one feature."""

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        self.model = model
        self.tower = model.model.vision_tower
        self.blocks: nn.ModuleList = self.tower.encoder.layer
        self.unit = round(1 / model.config.downsample_ratio)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """What enters the first block, [I, 1 + patches, C]."""
        return self.tower.embeddings(pixel_values)

    def run(self, block: Any, hidden: Tensor) -> Tensor:
        """`hidden` after `block`."""
        return block(hidden)

    def keys(self, block: Any, hidden: Tensor) -> Tensor:
        """[I, 1 + patches, heads * d]: what attention in `block` takes as keys, `hidden` entering."""
        return block.attention.k_norm(block.attention.k_proj(block.layernorm_before(hidden)))

    def features(self, hidden: Tensor, height: int, width: int) -> Tensor:
        """[I, features, D] of the last block's output; the grid of patches is height x width."""
        if self.model.config.vision_feature_layer == -1:
            hidden = self.tower.layernorm(hidden)
        images, _, channels = hidden.shape
        patches = hidden[:, 1:].reshape(images, height, width, channels)
        shuffled = self.model.model.pixel_shuffle(patches, self.model.config.downsample_ratio)
        return self.model.model.multi_modal_projector(shuffled.flatten(1, 2))


def _family(model: nn.Module) -> _Llava | _InternVL:
    if isinstance(model, LlavaForConditionalGeneration):
        return _Llava(model)
    if isinstance(model, InternVLForConditionalGeneration):
        return _InternVL(model)
    raise NotImplementedError(f"the oracle does not know {type(model).__name__}")


# ------------------------------------------------------------------------------------------- blocks


def to_blocks(patches: Tensor, height: int, width: int, unit: int) -> Tensor:
    """[I, height / u, width / u, u * u * C] of patches [I, height * width, C] in raster order.

    Inside a block row-major, then channels.
    """
    images, _, channels = patches.shape
    split = patches.reshape(images, height // unit, unit, width // unit, unit, channels)
    return split.permute(0, 1, 3, 2, 4, 5).reshape(images, height // unit, width // unit, -1)


def from_blocks(blocks: Tensor, unit: int) -> Tensor:
    """[I, height * width, C]: the inverse of `to_blocks`."""
    images, rows, columns, numbers = blocks.shape
    split = blocks.reshape(images, rows, columns, unit, unit, numbers // unit**2)
    return split.permute(0, 1, 3, 2, 4, 5).reshape(images, rows * columns * unit**2, -1)


def target_blocks(merge: Merge, blocks: int, unit: int) -> int:
    """How many of `blocks` along the axis are left: `keep` counts blocks, `length` patches."""
    if merge.length is None:
        return merge.target(blocks)
    return -(-merge.target(blocks * unit) // unit)


def shorter(merge: Merge, height: int, width: int, unit: int) -> tuple[int, int]:
    """The grid of patches after `merge`."""
    along = width if merge.axis == "width" else height
    left = unit * target_blocks(merge, along // unit, unit)
    return (height, left) if merge.axis == "width" else (left, width)


# ----------------------------------------------------------------------------------------- encoding


@dataclass
class VisualTokens:
    """What the tower and the projector made of the images.

    Attributes:
        features: [I, h * w, D], one row per image.
        slots: [I, h * w] int64, each one's representative: the index, among the image's
            placeholders, of the feature that it would be without merges.
        sizes: [I, h * w] float32, how many of those features each one stands for.
        grid: (h, w), features after the merges; placeholders: features of an image before them.
    """

    features: Tensor
    slots: Tensor
    sizes: Tensor
    grid: tuple[int, int]
    placeholders: int


def encoder_blocks(model: nn.Module) -> int:
    """How many encoder blocks feed the features."""
    if not hasattr(model.config, "vision_feature_layer"):
        return len(model.model.visual.blocks)
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int):
        raise NotImplementedError("the oracle takes one vision feature layer")
    states = model.config.vision_config.num_hidden_layers + 1
    return layer if layer >= 0 else states + layer


def encode(
    model: nn.Module,
    schedule: Schedule,
    pixel_values: Tensor,
    gaps: list[float],
) -> VisualTokens:
    """The tower block by block with the merges, then the projector.

    Args:
        pixel_values: [I, 3, size, size].
        gaps: gets the distance of every decision from its runner-up.
    """
    if model.config.vision_feature_select_strategy != "default":
        raise NotImplementedError("the oracle takes the features without CLS")
    family = _family(model)
    unit = family.unit
    count = encoder_blocks(model)
    merges = schedule.merges_at(count)
    convolution = next(m for m in family.tower.modules() if isinstance(m, nn.Conv2d))
    height, width = (
        side // patch for side, patch in zip(pixel_values.shape[-2:], convolution.kernel_size, strict=True)
    )
    hidden = family.embed(pixel_values)
    grid = Grid.of(to_blocks(hidden[:, 1:], height, width, unit))
    placeholders = grid.slots[0].numel()
    numbers = torch.arange(height * width, device=hidden.device).reshape(*grid.slots[:1].shape, unit**2)
    row = Patches(hidden[:, 1:], torch.ones_like(hidden[:, 1:, 0]), from_blocks(numbers, unit)[..., 0])
    row.slots = row.slots.expand(len(hidden), -1)
    for index, block in enumerate(family.blocks[:count]):
        here = [merge for at, merge in merges if at == index]
        keys = None
        if any(merge.feature == "keys" for merge in here):
            keys = to_blocks(family.keys(block, hidden)[:, 1:], height, width, unit)
        before, hidden = hidden, family.run(block, hidden)
        if not here:
            continue
        if here[0].method.name == "tome":
            heads = model.config.vision_config.num_attention_heads
            keys = family.keys(block, before)[:, 1:].unflatten(2, (heads, -1)).mean(2)
            row = Patches(hidden[:, 1:], row.sizes, row.slots, keys)
            for merge in here:
                height, width = shorter(merge, height, width, unit)
                row = merge_patches(row, height * width, gaps, merge.feature)
            hidden = torch.cat([hidden[:, :1], row.x], dim=1)
            continue
        grid = Grid(to_blocks(hidden[:, 1:], height, width, unit), grid.sizes, grid.slots, keys)
        for merge in here:
            blocks = (width if merge.axis == "width" else height) // unit
            grid = merge_grid(
                grid,
                merge.axis,
                target_blocks(merge, blocks, unit),
                gaps,
                merge.pairing,
                merge.feature,
            )
            height, width = (unit * side for side in grid.sizes.shape[1:])
        hidden = torch.cat([hidden[:, :1], from_blocks(grid.x, unit)], dim=1)
    if any(merge.method.name == "tome" for _, merge in merges):
        first = to_blocks(row.slots[..., None], height, width, unit)
        grid.slots = placed(first[..., 0].flatten(1), placeholders, unit == 1)
        grid.sizes = to_blocks(row.sizes[..., None], height, width, unit).sum(-1) / unit**2
    return VisualTokens(
        family.features(hidden, height, width),
        grid.slots.flatten(1),
        grid.sizes.flatten(1),
        (height // unit, width // unit),
        placeholders,
    )
