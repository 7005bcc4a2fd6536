"""The least that is a packed encoder: patches of all images in a row, 2-D rotary tables, blocks of 2 x 2.

`Packed` is captured as it is; `eager` runs it with merges, step by step, on NumPy's twin of OIM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from luvc_fx.graph import markers
from luvc_fx.ops import reference
from luvc_fx.schedule import Merge, Schedule
from tests.support.replay import Captured, capture

CHANNELS, HEADS, UNIT = 8, 2, 2
WIDE = CHANNELS // HEADS
FREQUENCIES = (1.0, 0.3)

Frame = tuple[int, int]
"""Height and width in patches."""


def tables(where: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[P, WIDE]`` for coordinates ``[P, 2]``: half of the channels turn by each."""
    angles = (where.float() * torch.tensor(FREQUENCIES, device=where.device)).flatten(1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[P, HEADS, WIDE]``, each head turned."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(-2) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(-2)


class Block(nn.Module):
    """Attention within frames, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.out, self.norm = nn.Linear(CHANNELS, CHANNELS), nn.LayerNorm(CHANNELS)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[P, HEADS, WIDE]``."""
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], 3, HEADS, WIDE).unbind(1)
        return turned(q, cos, sin), turned(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        parts = (part.transpose(0, 1).unsqueeze(0) for part in self.heads(x, cos, sin))
        frames = zip(*(part.split(list(lengths), dim=2) for part in parts), strict=True)
        joined = torch.cat([attend(q, k, v) for q, k, v in frames], dim=2)
        x = x + self.out(joined.squeeze(0).transpose(0, 1).reshape(x.shape[0], CHANNELS))
        return x + self.up(self.norm(x))


class Packed(nn.Module):
    """Linear patches, three blocks and a merger; each block but the first may meet something more.

    Args:
        frames: of the images that it is captured on.
        rows: of the prompt that they belong to.
        meet: given the hidden states behind the first block, the coordinates and `extra`.
        tables: as the function of that name.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        rows: int = 1,
        meet: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        tables: Callable[[Tensor], tuple[Tensor, Tensor]] = tables,
    ) -> None:
        super().__init__()
        self.patch = nn.Linear(6, CHANNELS)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.merger = nn.Sequential(nn.Linear(UNIT**2 * CHANNELS, 12), nn.GELU(), nn.Linear(12, 10))
        self.frames, self.rows, self.meet, self.tables = tuple(frames), rows, meet, tables

    def features(self, x: Tensor) -> Tensor:
        """``[N, 10]`` of patches ``[P, C]``."""
        return self.merger(x.view(-1, UNIT**2 * CHANNELS))

    def forward(self, pixels: Tensor, where: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        grids = [size for height, width in self.frames for size in (1, height, width)]
        x = self.patch(markers.PATCHES(pixels, grids, UNIT)) + extra
        cos, sin = self.tables(where)
        for number, block in enumerate(self.blocks):
            if number and self.meet is not None:
                x = self.meet(x, where, extra)
            x = block(x, cos, sin, [height * width for height, width in self.frames])
        features = self.features(x)
        return features, markers.REPRESENTATIVES(features, self.rows)


def coordinates(frame: Frame) -> Tensor:
    """``[h * w, 2]``, block by block."""
    height, width = frame
    raster = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
    blocks = raster.reshape(height // UNIT, UNIT, width // UNIT, UNIT, 2)
    return blocks.transpose(1, 2).reshape(-1, 2)


def packed(*frames: Frame, seed: int = 0, **options: object) -> Packed:
    """A `Packed` with weights from `seed`."""
    torch.manual_seed(seed)
    return Packed(frames, **options).eval().requires_grad_(False)  # type: ignore[arg-type]


def packed_inputs(*frames: Frame, seed: int = 1) -> dict[str, Tensor]:
    """Random patches of `frames`, where they are, and something of each to be added."""
    generator = torch.Generator().manual_seed(seed)
    patches = sum(height * width for height, width in frames)
    return {
        "pixels": 2 * torch.randn(patches, 6, generator=generator),
        "where": torch.cat([coordinates(frame) for frame in frames]),
        "extra": torch.randn(patches, CHANNELS, generator=generator),
    }


def packed_whole(model: Packed) -> Captured:
    """The graph of `model` on `packed_inputs` of its frames."""
    return capture(model, **packed_inputs(*model.frames))


@dataclass
class _Grid:
    """Blocks of one image, ``[1, h, w, ...]`` each, as arrays."""

    x: np.ndarray
    where: np.ndarray
    keys: np.ndarray
    sizes: np.ndarray
    slots: np.ndarray

    def merged(self, merge: Merge) -> _Grid:
        axis = 2 if merge.axis == "width" else 1
        blocks = self.sizes.shape[axis]
        length = merge.length // UNIT if merge.length is not None else merge.target(blocks)
        compared = self.keys if merge.feature == "keys" else self.x
        found = {
            name: reference.orthogonal_merge(
                getattr(self, name), self.sizes, self.slots, merge.axis, length, merge.pairing, compared
            )
            for name in ("x", "where", "keys")
        }
        return _Grid(*(found[name][0] for name in found), *found["x"][1:3])


@torch.no_grad()
def eager(model: Packed, schedule: Schedule, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Features and slots with the merges of `schedule`; coordinates merge in place of angles."""
    x, where = model.patch(inputs["pixels"]) + inputs["extra"], inputs["where"].float()
    shapes = [(1, height // UNIT, width // UNIT) for height, width in model.frames]
    sizes = [np.ones(shape, np.float32) for shape in shapes]
    slots = [np.arange(np.prod(shape)).reshape(shape) for shape in shapes]
    for number, block in enumerate(model.blocks):
        cos, sin = tables(where)
        keys = block.heads(x, cos, sin)[1].flatten(1)
        x = block(x, cos, sin, [UNIT**2 * part.size for part in slots])
        here = [merge for at, merge in schedule.merges_at(len(model.blocks)) if at == number]
        lengths = [UNIT**2 * part.size for part in slots]
        grids = []
        for index, parts in enumerate(zip(*(t.split(lengths) for t in (x, where, keys)), strict=True)):
            shape = slots[index].shape
            grid = _Grid(*(part.reshape(*shape, -1).numpy() for part in parts), sizes[index], slots[index])
            for merge in here:
                grid = grid.merged(merge)
            grids.append(grid)
        x = torch.cat([torch.from_numpy(grid.x).reshape(-1, CHANNELS) for grid in grids])
        where = torch.cat([torch.from_numpy(grid.where).reshape(-1, 2) for grid in grids])
        sizes, slots = [grid.sizes for grid in grids], [grid.slots for grid in grids]
    starts = np.cumsum([0, *(height * width // UNIT**2 for height, width in model.frames)])
    placed = [start + part.flatten() for start, part in zip(starts, slots, strict=False)]
    return model.features(x), torch.from_numpy(np.concatenate(placed))
