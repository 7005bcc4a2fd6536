"""What a merger is: it shortens one axis of the token grid, and says in what form it takes the tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from luvc_fx.methods.registry import Method, Registry

FEATURES = ("hidden", "keys")
"""What mergers may compare: the hidden states after a block, or the keys of its attention."""


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """How the rows of an encoder are patches of a grid.

    A *block* is what the projector makes one feature of: `unit` patches, ``(1, 1)`` in most models.

    Attributes:
        grid: ``(H, W)`` of one image, in patches.
        unit: ``(h, w)`` of one block, in patches; the grid holds whole blocks.
        blockwise: the rows of an image are in order of blocks, and of patches within each; else they are
            in raster order of patches.
    """

    grid: tuple[int, int]
    unit: tuple[int, int]
    blockwise: bool

    @property
    def blocks(self) -> tuple[int, int]:
        """The grid in blocks, ``(H / h, W / w)``."""
        return self.grid[0] // self.unit[0], self.grid[1] // self.unit[1]

    def to_blocks(self, rows: Tensor) -> Tensor:
        """``[n, H W, C]`` to ``[n, H / h, W / w, h w C]``, in raster order of blocks."""
        (high, wide), (height, width) = self.unit, self.blocks
        images, _, channels = rows.shape
        if not self.blockwise:
            rows = rows.reshape(images, height, high, width, wide, channels).transpose(2, 3)
        return rows.reshape(images, height, width, high * wide * channels)

    def to_rows(self, blocks: Tensor) -> Tensor:
        """The inverse of `to_blocks`: ``[n, H / h, W / w, h w C]`` to ``[n, H W, C]``."""
        images, height, width, _ = blocks.shape
        high, wide = self.unit
        if self.blockwise:
            return blocks.reshape(images, height * width * high * wide, -1)
        return blocks.reshape(images, height, width, high, wide, -1).transpose(2, 3).flatten(1, 4)


@dataclass(frozen=True, slots=True)
class Shortening:
    """One axis of the grid gets shorter.

    Attributes:
        axis: ``"width"`` or ``"height"``.
        before, after: its length in patches, whole blocks.
        runs: int64 ``[n, 2]``, for each image the first and the last + 1 of the places on the axis (in
            blocks) that show the picture and not its padding: only those may merge. None: all may.
        shortest: length of the shortest of `runs` that is not the whole axis, at least 1 + (what the axis
            loses); None without such a run.
    """

    axis: str
    before: int
    after: int
    runs: Tensor | None = None
    shortest: int | None = None


@dataclass(frozen=True, slots=True)
class Merger(Method, ABC):
    """Merges visual tokens after an encoder block: pure functions on tensors with static shapes.

    A merger of luvc_fx is one file in this folder: a frozen, slotted dataclass with a `name`, its
    parameters (each with a default, and checked in ``__post_init__``) and `merge`, under ``@MERGERS.add``.
    Schedules, JSON files and commands then know it by its name.

    It sees *tokens* in a form of its own, which `to_tokens` and `to_rows` convert: here blocks on their grid,
    ``[n, H, W, C]``. Beside them go `sizes` (how many original tokens each one stands for, float32) and
    `representatives` (the number of the original token whose place it takes, int64, raster order of blocks
    within one image), both of the shape of the tokens without channels.

    Attributes:
        needs_keys: it compares the keys of the block, and not its hidden states.
        keeps_places: after a merge neighbours on the grid are neighbours in the picture. Where they are not,
            a model that puts the tiles of an image together by place cannot be merged so.
    """

    @property
    def needs_keys(self) -> bool:
        return False

    @property
    def keeps_places(self) -> bool:
        return True

    @abstractmethod
    def merge(
        self,
        tokens: Tensor,
        sizes: Tensor,
        representatives: Tensor,
        shortening: Shortening,
        feature: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shorten one axis.

        Args:
            tokens: ``[n, H, W, C]`` here, any floating dtype: hidden states, with the angles of rotary
                tables and the keys as further channels behind them where there are such.
            feature: ``[n, H, W, F]``, what is compared in place of `tokens`.

        Returns:
            Tokens, sizes and representatives of the shorter grid.
        """

    def to_tokens(self, rows: Tensor, grid: PatchGrid) -> Tensor:
        """Rows ``[n, H W, C]`` of one kind of image in the form that `merge` takes."""
        return grid.to_blocks(rows)

    def to_rows(self, tokens: Tensor, grid: PatchGrid) -> Tensor:
        """The inverse of `to_tokens`: ``[n, H W, C]``."""
        return grid.to_rows(tokens)

    def keys_to_compare(self, keys: Tensor) -> Tensor:
        """Keys ``[images, heads, rows, dim]`` of an attention call as ``[images, rows, C]``."""
        return keys.transpose(1, 2).flatten(2)

    def unmerged(self, tokens: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
        """Sizes and representatives of `tokens` of which none has merged."""
        height, width = grid.blocks
        numbers = torch.arange(height * width, device=tokens.device).reshape(1, height, width)
        shape = tokens.shape[:-1]
        return torch.ones(shape, dtype=torch.float32, device=tokens.device), numbers.expand(shape)

    def feature_representatives(self, representatives: Tensor, before: PatchGrid, after: PatchGrid) -> Tensor:
        """The representative of each feature: int64 ``[n, H / h, W / w]`` of the last grid.

        Args:
            representatives: of the tokens after the last merge.
            before, after: the grid before the first merge, and after the last one.
        """
        return representatives


MERGERS: Registry[Merger] = Registry("merger")
"""The mergers by name. `luvc_fx.mergers` fills it with the files of this folder."""
