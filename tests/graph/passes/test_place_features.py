"""Which placeholder each merged feature stands for: packed frames, and tiles with crops and separators."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import luvc_fx
from luvc_fx.graph import markers
from luvc_fx.ops import reference
from luvc_fx.report import Reason
from luvc_fx.schedule import Merge, Schedule
from tests.support.replay import Block, Captured, assert_close, capture, code, quietly, reasons
from tests.support.toy_packed import Frame, packed, packed_whole

# ------------------------------------------------------------------------------- frames in a row


def slots_of(captured: Captured, schedule: Schedule) -> Tensor:
    backend = luvc_fx.backend(schedule, inner="eager", strict=True)
    return captured.rewritten(backend)[0][1]


WIDTH = Schedule(merge=Merge("width", keep=0.5, layer=-1))


def test_frames_alike_are_answered_as_grids() -> None:
    slots = slots_of(packed_whole(packed((4, 8), (4, 8))), WIDTH)
    assert slots.shape == (2, 2, 2)
    first, second = slots
    assert (first < 8).all() and (second >= 8).all() and (second < 16).all()
    assert (slots.diff(dim=2) > 0).all()


def test_other_frames_are_answered_in_a_row() -> None:
    """Image after image, each one's own placeholders line by line."""
    frames: tuple[Frame, ...] = ((4, 8), (8, 4), (4, 8))
    slots = slots_of(packed_whole(packed(*frames)), WIDTH)
    assert slots.shape == (1, 1, 4 + 4 + 4)
    one, two, three = slots.flatten().split([4, 4, 4])
    for part, first, width in ((one, 0, 4), (two, 8, 2), (three, 16, 4)):
        left = part - first
        assert (left >= 0).all() and (left < 8).all()
        assert torch.equal(left // width, torch.arange(8 // width).repeat_interleave(width // 2))
    assert torch.equal(slots.flatten(), slots.flatten().sort().values)


def test_without_merges_frames_alike_stand_for_themselves() -> None:
    schedule = Schedule(prune=WIDTH.prune, merge=Merge("width", keep=1.0, layer=0))
    backend = luvc_fx.LuvcBackend(schedule, "eager", strict=True, identity_sites=True)
    slots = packed_whole(packed((4, 8), (4, 8))).rewritten(backend)[0][1]
    assert torch.equal(slots, torch.arange(16).reshape(2, 2, 4))


EVEN: dict[str, tuple[tuple[Frame, ...], Merge]] = {
    "an image a row": (((4, 8), (8, 4)), Merge("width", keep=0.5, layer=0)),
    "one image and two": (((4, 12), (4, 4), (4, 8)), Merge("width", keep=0.5, layer=0)),
}
UNEVEN: dict[str, tuple[tuple[Frame, ...], Merge, list[int]]] = {
    "only one is as wide": (((4, 8), (8, 4)), Merge("width", length=4, layer=0), [4, 8]),
    "roundings": (((4, 12), (4, 4), (4, 8)), Merge("width", keep=0.6, layer=0), [8, 6]),
    "an image in two rows": (((4, 8), (4, 8), (4, 8)), Merge("width", keep=0.5, layer=0), [8, 4]),
}


@pytest.mark.parametrize("name", EVEN)
def test_rows_that_keep_as_many_merge(name: str) -> None:
    frames, merge = EVEN[name]
    slots = slots_of(packed_whole(packed(*frames, rows=2)), Schedule(merge=merge)).flatten()
    each = sum(height * width for height, width in frames) // 8
    assert (slots < each).sum() == (slots >= each).sum()


@pytest.mark.parametrize("name", UNEVEN)
def test_rows_that_would_keep_different_counts_are_refused(name: str) -> None:
    frames, merge, left = UNEVEN[name]
    captured = packed_whole(packed(*frames, rows=2))
    got, gm, report = captured.rewritten(quietly(Schedule(merge=merge)))
    assert reasons(report.refusals) == [Reason.UNEVEN_BATCH]
    assert f"would leave {left} visual tokens in the rows" in report.refusals[0].text
    assert not report.rewritten and code(gm.graph) == code(captured.gm.graph)
    assert all(torch.equal(a, b) for a, b in zip(got, captured.plain(), strict=True))


# ----------------------------------------------------------------------------------------- tiles

C, SIDE, CROP = 8, 4, 1


class Tiles(nn.Module):
    """A whole image, and `high` x `wide` tiles of it as one picture: without padding, with separators.

    One line of padding lies above the upper tiles and one below the lower ones.
    """

    def __init__(self, high: int, wide: int, rows: int) -> None:
        super().__init__()
        self.conv, self.project = nn.Conv2d(3, C, 2, 2), nn.Linear(C, C)
        self.blocks, self.newline = nn.ModuleList([Block(False), Block(False)]), nn.Parameter(torch.randn(C))
        self.high, self.wide, self.rows = high, wide, rows

    def image(self, x: Tensor, side: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
        """``[N, C]`` of one image's tiles ``[1 + high * wide, side * side, C]``."""
        height, width = side
        tiles = x[1:].view(self.high, self.wide, height, width, C).permute(4, 0, 2, 1, 3).contiguous()
        whole = tiles.flatten(1, 2).flatten(2, 3)
        whole = whole[:, CROP : self.high * height - CROP, :]
        ends = self.newline[:, None, None].expand(*whole.shape[:-1], 1)
        lines = torch.cat((whole, ends), dim=-1).flatten(1, 2).transpose(0, 1)
        return torch.cat((x[0], lines))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        x = self.project(x)
        features = torch.cat([self.image(part) for part in x.split(1 + self.high * self.wide)])
        return features, markers.REPRESENTATIVES(features, self.rows)


@cache
def tiles(high: int, wide: int, images: int = 1, rows: int = 1) -> tuple[Tiles, Captured]:
    torch.manual_seed(0)
    model = Tiles(high, wide, rows).eval().requires_grad_(False)
    return model, capture(model, pixels=pixels_of(high, wide, images))


def pixels_of(high: int, wide: int, images: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(images * (1 + high * wide), 3, 2 * SIDE, 2 * SIDE, generator=generator)


def runs_of(high: int, wide: int, images: int, axis: str) -> list[tuple[int, int]]:
    if axis == "width":
        return [(0, SIDE)] * (images * (1 + high * wide))
    row = [(CROP if i == 0 else 0, SIDE - CROP if i == high - 1 else SIDE) for i in range(high)]
    return [run for _ in range(images) for run in [(0, SIDE), *(r for r in row for _ in range(wide))]]


def features_of(slots: np.ndarray, high: int, wide: int, before: int) -> list[int]:
    """One image's placeholders, feature by feature, from its tiles' ``[1 + high * wide, h, w]``."""
    base, line = SIDE * SIDE, wide * SIDE + 1
    out = slots[0].flatten().tolist()
    top = 0
    for i in range(high):
        first = CROP if i == 0 else 0
        trimmed = first + (CROP if i == high - 1 else 0)
        old, new = SIDE - trimmed, slots.shape[1] - trimmed
        for y in range(new):
            for j in range(wide):
                for slot in slots[1 + i * wide + j, first + y]:
                    out.append(base + (top + slot // SIDE - first) * line + j * SIDE + slot % SIDE)
            out.append(base + (top + (y + 1) * old // new - 1) * line + wide * SIDE)
        top += old
    return [before + place for place in out]


TILED: dict[str, tuple[tuple[int, ...], Schedule]] = {
    "width": ((2, 2), Schedule(merge=Merge("width", length=2, layer=0))),
    "height beside padding": ((2, 1), Schedule(merge=Merge("height", length=3, layer=1))),
    "most of the height": ((2, 2), Schedule(merge=Merge("height", length=2, layer=0))),
    "both, two blocks": (
        (2, 2),
        Schedule(merge=(Merge("height", length=3, layer=0), Merge("width", length=3, layer=1))),
    ),
    "two images, two rows": ((2, 1, 2, 2), Schedule(merge=Merge("height", length=2, layer=0))),
}


@pytest.mark.parametrize("name", TILED)
@torch.no_grad()
def test_tiles_keep_their_layout(name: str) -> None:
    shape, schedule = TILED[name]
    high, wide, images = (*shape, 1)[:3]
    model, captured = tiles(*shape)
    (features, slots), _, report = captured.rewritten(luvc_fx.backend(schedule, inner="eager", strict=True))
    assert report.refusals == []
    x = model.conv(pixels_of(high, wide, images)).flatten(2).transpose(1, 2)
    grid = [x.reshape(-1, SIDE, SIDE, C).numpy(), np.ones((len(x), SIDE, SIDE), np.float32)]
    grid.append(np.tile(np.arange(SIDE * SIDE).reshape(1, SIDE, SIDE), (len(x), 1, 1)))
    for number, block in enumerate(model.blocks):
        rows = torch.from_numpy(np.ascontiguousarray(grid[0])).flatten(1, 2)
        grid[0] = block(rows).reshape(grid[0].shape).numpy()
        for merge in (m for at, m in schedule.merges_at(2) if at == number):
            runs = np.array(runs_of(high, wide, images, merge.axis))
            assert merge.length is not None
            grid = list(reference.orthogonal_merge(*grid, merge.axis, merge.length, runs=runs))
    each = 1 + high * wide
    hidden = model.project(torch.from_numpy(np.ascontiguousarray(grid[0]))).flatten(1, 2)
    want = torch.cat([model.image(part, grid[0].shape[1:3]) for part in hidden.split(each)])
    assert_close(features, want, 2e-5, "features")
    total = captured.plain()[0].shape[0] // images
    places = [
        place
        for image in range(images)
        for place in features_of(grid[2][image * each :][:each], high, wide, image * total)
    ]
    assert slots.shape == (1, 1, len(places))
    assert slots.flatten().tolist() == places
    assert len(set(places)) == len(places)


def test_a_merge_never_takes_all_of_a_run() -> None:
    """Three of four lines show the picture: they may become one, so of four at least two stay."""
    captured = tiles(2, 1)[1]
    (features, _), _, report = captured.rewritten(quietly(Schedule(merge=Merge("height", length=1, layer=0))))
    assert reasons(report.refusals) == [Reason.SCHEDULE]
    assert "Merge.length 1 became 2, as 3 of 4 places in a tile are no padding" in report.refusals[0].text
    assert report.rewritten
    # The whole image as two lines, and one line of each tile with its separator.
    assert features.shape[0] == 2 * SIDE + 2 * (SIDE + 1)


def refused_tail(kind: str) -> Any:
    def tail(x: Tensor) -> Tensor:
        grid = x[0].view(SIDE, SIDE, C).permute(2, 0, 1)
        if kind == "mixes":
            grid = grid + grid.flip(1)
        if kind == "channels":
            return grid.permute(1, 2, 0).reshape(SIDE * SIDE * C // 4, 4)
        return torch.cat([grid[:, 1 : SIDE - 1].flatten(1).transpose(0, 1), x[1]])

    return tail


@pytest.mark.parametrize("kind", ["mixes", "channels"])
def test_features_that_are_more_than_moved_tokens_are_refused(kind: str) -> None:
    torch.manual_seed(0)
    model, tail = Tiles(1, 1, 1).eval().requires_grad_(False), refused_tail(kind)

    def call(pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = model.blocks[1](model.blocks[0](model.conv(pixels).flatten(2).transpose(1, 2)))
        features = tail(x)
        return features, markers.REPRESENTATIVES(features, 1)

    captured = capture(call, pixels=pixels_of(1, 1, 1))
    got, _, report = captured.rewritten(quietly(WIDTH))
    assert not report.rewritten and len(report.refusals) == 1
    assert report.refusals[0].reason in (Reason.TOKEN_AXIS, Reason.NO_GRID)
    assert all(torch.equal(a, b) for a, b in zip(got, captured.plain(), strict=True))
