"""The oracle's rules for images in tiles: crop, padding, newlines, slots."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.models_anyres import anyres_inputs, cut, tiny_llava_next, tiny_onevision
from tests.support.oracle import (
    Grid,
    Tile,
    choose,
    merge_grid,
    newlines,
    oracle_forward,
    tile_counts,
    tile_layout,
    visual_rows,
)
from tests.support.oracle.crop import crop, shortened, target
from tests.support.oracle.tiles import encode_tiles, frame_layout, pooled, pooled_places

TALL = (100, 30)  # 2 x 1 tiles of 24 pixels, 6 x 6 patches: the width of 6 keeps 4, [1, 5)
FLAT = (20, 120)  # 1 x 3 tiles: the height of 6 keeps 4
SQUARE = (80, 100)  # 2 x 2 tiles: the height of 12 keeps 10, [1, 6) and [0, 5)
HEIGHT, WIDTH = Merge("height", keep=0.5, layer=0), Merge("width", keep=0.5, layer=0)


def tile(side: int, valid: tuple[int, int], place: tuple[int, int] = (0, 0)) -> Tile:
    """A tile whose height is cropped."""
    return Tile(0, place, (valid, (0, side)), (side, side))


def layout(model: nn.Module, *sizes: tuple[int, int]) -> list[Tile]:
    """The tiles of images that are all cut."""
    return tile_layout(model, {"image_sizes": torch.tensor(sizes)})


# ------------------------------------------------------------------------------------- prompts, crop


@pytest.mark.parametrize("several", [False, True])
def test_tiles_are_shaped_as_by_the_image_processors(several: bool) -> None:
    model = tiny_onevision() if several else tiny_llava_next()
    kind = LlavaOnevisionImageProcessorPil if several else LlavaNextImageProcessorPil
    processor = kind(
        size={"height": 24, "width": 24} if several else {"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
        do_rescale=False,
        do_normalize=False,
    )
    numbers = torch.Generator().manual_seed(0)
    for size in (TALL, FLAT, SQUARE, (20, 30), (24, 48)):
        pixels = torch.randint(100, 256, (3, *size), dtype=torch.uint8, generator=numbers)
        made = processor([pixels.numpy()], return_tensors="pt", input_data_format="channels_first")
        mine = cut(model, *size, numbers)
        assert made["pixel_values"].shape == (1, *mine.shape)
        assert made["image_sizes"].tolist() == [list(size)]
        assert "batch_num_images" not in made or made["batch_num_images"].tolist() == [1]
        assert several == ("batch_num_images" in made)
        theirs = made["pixel_values"][0, 1:]  # zeros around the image, too
        assert torch.equal((mine[1:] != 0).all(dim=1), (theirs != 0).all(dim=1))


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(10, 200), st.integers(10, 200)), tall=st.integers(1, 3), wide=st.integers(1, 3)
)
def test_the_crop_is_that_of_unpad_image(size: tuple[int, int], tall: int, wide: int) -> None:
    composite = torch.arange(36.0 * tall * wide).reshape(1, 6 * tall, 6 * wide)
    rows, columns = crop((6 * tall, 6 * wide), size)
    mine = composite[:, rows : 6 * tall - rows, columns : 6 * wide - columns]
    assert torch.equal(mine, unpad_image(composite, size))


def test_valid_runs() -> None:
    model = tiny_llava_next()
    assert [t.valid for t in layout(model, SQUARE)] == [
        ((0, 6), (0, 6)),
        *2 * [((1, 6), (0, 6))],
        *2 * [((0, 5), (0, 6))],
    ]
    assert [t.valid for t in layout(model, FLAT)[1:]] == 3 * [((1, 5), (0, 6))]
    assert [t.partly(0) for t in layout(model, FLAT)] == [None, (1, 5), (1, 5), (1, 5)]
    assert [t.partly(1) for t in layout(model, FLAT)] == 4 * [None]
    wide = tiny_llava_next(tiles=((3, 3),))
    gone = [t.valid[0] for t in layout(wide, (10, 50))[1::3]]
    assert gone == [(0, 0), (1, 5), (0, 0)]


# ---------------------------------------------------------------------------------------- the target


def test_a_target_is_raised_until_the_shortest_run_survives() -> None:
    free, partly = tile(6, (0, 6)), tile(6, (1, 5))
    assert target([free], HEIGHT) == 3
    assert target([free, partly], HEIGHT) == 3  # four positions lose three
    assert target([free, partly], Merge("height", length=1, layer=0)) == 3
    assert target([free, partly], Merge("width", length=1, layer=0)) == 1
    assert target([partly, tile(6, (4, 6))], HEIGHT) == 5
    assert target([partly, tile(6, (5, 6))], HEIGHT) == 6
    assert target([free, tile(6, (0, 0))], HEIGHT) == 3  # wholly padded
    with pytest.raises(ValueError, match="length"):
        target([free], Merge("height", length=7, layer=0))


def test_runs_after_a_merge() -> None:
    tiles = [tile(6, (0, 6)), tile(6, (1, 5)), tile(6, (2, 6)), tile(6, (0, 0))]
    assert [t.valid[0] for t in shortened(tiles, HEIGHT)] == [(0, 3), (1, 2), (2, 3), (0, 0)]
    assert {t.sides for t in shortened(tiles, HEIGHT)} == {(3, 6)}
    assert [t.valid for t in shortened(tiles, WIDTH)] == [(t.valid[0], (0, 3)) for t in tiles]


# --------------------------------------------------------------------------- what merges with what


def run_line(x: list[float], run: tuple[int, int] | None, left: int, **options: Any) -> Grid:
    """One line of angles (degrees) after a merge along its width within `run`."""
    radians = torch.deg2rad(torch.tensor(x))
    tokens = torch.stack([radians.cos(), radians.sin()], dim=-1)[None, None]
    return merge_grid(Grid.of(tokens), "width", left, [], runs=[run], **options)


def test_only_neighbours_in_the_run_pair() -> None:
    # padding at 0, 1 and 6, 7; without a run 0 -> 1 and 2 -> 1 are the best proposals
    line = [0.0, 0.0, 0.0, 40.0, 50.0, 120.0, 120.0, 120.0]
    assert run_line(line, None, 6).slots.flatten().tolist() == [1, 3, 4, 5, 6, 7]
    grid = run_line(line, (2, 6), 7)
    assert grid.slots.flatten().tolist() == [0, 1, 2, 3, 5, 6, 7]  # 4 -> 3, its ten degrees
    assert grid.sizes.flatten().tolist() == [1, 1, 1, 2, 1, 1, 1]
    # position 2 may only go right, and two merges use up the run of four
    assert run_line(line, (2, 6), 6).slots.flatten().tolist() == [0, 1, 3, 5, 6, 7]
    # more than half of the run takes another round, in which the run starts at 2 still
    grid = run_line(line, (2, 6), 5)
    assert grid.slots.flatten().tolist() == [0, 1, 5, 6, 7]
    assert grid.sizes.flatten().tolist() == [1, 1, 4, 1, 1]


def test_the_parity_is_that_of_the_line() -> None:
    line = [0.0, 10.0, 11.0, 60.0, 61.0, 90.0]
    # in [1, 6) the even positions 2 and 4 propose, to 1 and to 3
    grid = run_line(line, (1, 6), 4)
    assert grid.slots.flatten().tolist() == [0, 1, 3, 5]


def test_other_tiles_lose_as_many_a_round() -> None:
    x = torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(0))
    alone = merge_grid(Grid.of(x[:1]), "width", 4, [])
    beside = merge_grid(Grid.of(x), "width", 4, [], runs=[None, (3, 8)])  # two, then two a line
    assert beside.x.shape == (2, 3, 4, 5) and not torch.equal(alone.slots, beside.slots[:1])
    twice = merge_grid(merge_grid(Grid.of(x[:1]), "width", 6, []), "width", 5, [])
    assert torch.equal(merge_grid(twice, "width", 4, []).slots, beside.slots[:1])


def test_an_infinite_score_is_never_chosen() -> None:
    similarity = torch.tensor([-math.inf, 0.2, -math.inf, -math.inf, -math.inf]).numpy()
    gaps: list[float] = []
    assert choose(similarity, 1, gaps) == [(2, 1)]
    assert all(gap == math.inf for gap in gaps)


FAMILIES = {"onevision": tiny_onevision, "next": tiny_llava_next}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [TALL, FLAT, SQUARE, (50, 130)])
@pytest.mark.parametrize("pairing", ["line", "shared"])
def test_padding_never_mixes_with_image(family: str, size: tuple[int, int], pairing: str) -> None:
    """All of the image, and nothing else, is in the tokens that stay; the padding stays as it is."""
    model = FAMILIES[family](grid=8)
    batch = anyres_inputs(model, [[2, ("image", *size), 1]])
    schedule = Schedule(
        merge=tuple(
            Merge(axis, keep=0.6, layer=layer, pairing=pairing)
            for layer, axis in ((0, "height"), (0, "width"), (1, "width"), (1, "height"))
        )
    )
    tiles = layout(model, size)
    features, grid, after = encode_tiles(model, schedule, batch["pixel_values"][0], tiles, [])
    for place, (old, new) in enumerate(zip(tiles, after, strict=True)):
        (top, bottom), (low, high) = new.valid
        kept = grid.sizes[place, top:bottom, low:high]
        rows, columns = (b - a for a, b in old.valid)
        assert float(kept.sum()) == rows * columns
        row, column = (
            grid.slots[place, top:bottom, low:high] // 8,
            grid.slots[place, top:bottom, low:high] % 8,
        )
        assert bool(((row >= old.valid[0][0]) & (row < old.valid[0][1])).all())
        assert bool(((column >= old.valid[1][0]) & (column < old.valid[1][1])).all())
    # the padding that is left is padding: as many of size one as before, along the cropped axis
    for place, (old, new) in enumerate(zip(tiles, after, strict=True)):
        for axis in range(2):
            if old.partly(axis):
                sizes = grid.sizes[place].sum(dim=1 - axis) / old.sides[1 - axis]
                gone = torch.cat([sizes[: new.valid[axis][0]], sizes[new.valid[axis][1] :]])
                assert gone.tolist() == [1.0] * (old.sides[axis] - (old.valid[axis][1] - old.valid[axis][0]))
    assert features.shape[:3] == grid.sizes.shape


# --------------------------------------------------------------------------------- newlines and slots


def test_newlines_take_the_last_of_those_they_stand_for() -> None:
    assert newlines(6, 3) == [(1, 2), (3, 2), (5, 2)]
    assert newlines(5, 3) == [(0, 1), (2, 2), (4, 2)]
    assert newlines(5, 5) == [(i, 1) for i in range(5)]
    assert newlines(7, 1) == [(6, 7)] and newlines(0, 0) == []


def test_where_everything_goes_by_hand() -> None:
    """2 x 2 tiles of 6 x 6, rows [1, 6) and [0, 5) stay; widths go from 6 to 3."""
    model = tiny_llava_next()
    batch = anyres_inputs(model, [[2, ("image", *SQUARE), 1]])
    rows = visual_rows(model, Schedule(merge=(WIDTH,)), batch["input_ids"], batch, [])
    assert rows is not None and rows.grid is None
    slots, sizes = rows.slots[0], rows.sizes[0]
    assert len(slots) == 6 * 3 + 10 * (3 + 3 + 1) and float(sizes.sum()) == 36 + 10 * 13
    composite = slots[18:].reshape(10, 7) - 36
    assert torch.equal(composite // 13, torch.arange(10)[:, None].expand(10, 7))
    columns = composite % 13
    assert bool((columns[:, :3] < 6).all() and (columns[:, 3:6] >= 6).all() and (columns[:, 6] == 12).all())
    assert bool((columns.diff(dim=1) > 0).all())
    newline = model.model.image_newline
    assert torch.equal(rows.features[0, 18:].reshape(10, 7, -1)[:, 6], newline.expand(10, -1))
    # shorter heights: each tile row has five composite rows, of which two are left
    rows = visual_rows(model, Schedule(merge=(Merge("height", 0.5, layer=0),)), batch["input_ids"], batch, [])
    assert rows is not None
    composite = rows.slots[0, 18:].reshape(4, 13) - 36
    assert composite[:, 12].tolist() == [13 * i + 12 for i in (1, 4, 6, 9)]
    assert rows.sizes[0, 18:].reshape(4, 13)[:, 12].tolist() == [2, 3, 2, 3]
    assert bool((composite[:2, :12] // 13 < 5).all() and (composite[2:, :12] // 13 >= 5).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_are_distinct_and_counts_known_without_a_tower(family: str) -> None:
    model = FAMILIES[family]()
    schedules = [
        (),
        (WIDTH,),
        (HEIGHT, WIDTH),
        (Merge("height", length=1, layer=0), Merge("width", length=2, layer=1, feature="keys")),
    ]
    for rows in ([[2, ("image", *SQUARE), 1]], [[2, ("image", *TALL), ("image", *FLAT), 1]]):
        batch = anyres_inputs(model, rows)
        placeholders = int((batch["input_ids"] == model.config.image_token_id).sum())
        for merges in schedules:
            found = visual_rows(model, Schedule(merge=merges), batch["input_ids"], batch, [])
            assert found is not None
            assert found.slots.unique().numel() == found.slots.numel()
            assert int(found.slots.min()) >= 0 and int(found.slots.max()) < placeholders
            assert sum(tile_counts(model, merges, batch)) == found.features.shape[1]
            assert float(found.sizes.sum()) == placeholders


@torch.no_grad()
def test_a_token_that_did_not_merge_is_the_stock_one_and_sits_at_its_slot() -> None:
    for make in FAMILIES.values():
        model = make()
        batch = anyres_inputs(model, [[2, ("image", *SQUARE), 1]])
        schedule = Schedule(merge=(Merge("height", keep=0.75, layer=-1), Merge("width", keep=0.75, layer=-1)))
        rows = visual_rows(model, schedule, batch["input_ids"], batch, [])
        images = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
        stock = model.get_image_features(**images).pooler_output[0]
        assert rows is not None
        apart = (rows.features[0] - stock[rows.slots[0]]).abs().amax(dim=-1)
        newline = (rows.features[0] == model.model.image_newline).all(dim=-1)
        alone = (rows.sizes[0] == 1) | newline
        assert float(apart[alone].max()) < 1e-5 and float(apart[~alone].max()) > 0.1
        assert 0 < int(alone.sum()) < len(alone)


def test_one_tile_and_one_newline_of_several_images() -> None:
    model = tiny_onevision()
    batch = anyres_inputs(model, [[2, ("image", *FLAT), 1, ("image", *TALL), 3]])
    assert batch["pixel_values"].shape[:2] == (2, 1) and batch["batch_num_images"].tolist() == [2]
    rows = visual_rows(model, Schedule(merge=(WIDTH, HEIGHT)), batch["input_ids"], batch, [])
    assert rows is not None and rows.slots.shape == (1, 2 * (9 + 1))
    assert rows.slots[0, [9, 19]].tolist() == [36, 73]
    assert torch.equal(rows.features[0, [9, 19]], model.model.image_newline.expand(2, -1))


# ------------------------------------------------------------------------------------ pooled videos


def test_places_of_pooled_features_by_hand() -> None:
    assert [pooled(sides) for sides in ((6, 6), (7, 5), (1, 2), (3, 4))] == [(3, 3), (4, 3), (1, 1), (2, 2)]
    assert pooled_places((3, 3), (3, 3)) == list(range(9))
    assert pooled_places((3, 3), (3, 2)) == [0, 2, 3, 5, 6, 8]
    assert pooled_places((3, 3), (1, 2)) == [3, 5]
    assert pooled_places((4, 4), (2, 1)) == [6, 14]
    assert pooled_places((4, 4), (3, 4)) == [*range(4), *range(8, 16)]
    for old in range(1, 12):
        for new in range(1, old + 1):
            places = pooled_places((1, old), (1, new))
            assert places == sorted(set(places)) and places[0] >= 0 and places[-1] < old


@pytest.mark.parametrize(
    ("grid", "merges", "counts", "slots"),
    [
        (6, (), 3 * 9 + 1, list(range(9))),
        (7, (), 3 * 16 + 1, list(range(16))),
        (6, (WIDTH,), 3 * 3 * 2 + 1, [0, 2, 3, 5, 6, 8]),  # 6 x 3
        (7, (WIDTH,), 3 * 4 * 2 + 1, [1, 3, 5, 7, 9, 11, 13, 15]),  # 7 x 4
        (6, (Merge("height", length=5, layer=0),), 3 * 9 + 1, list(range(9))),  # 5 x 6, as many as before
        (7, (Merge("height", length=5, layer=0), Merge("width", length=1, layer=1)), 3 * 3 + 1, [2, 10, 14]),
    ],
)
def test_counts_and_places_of_videos(
    grid: int, merges: tuple[Merge, ...], counts: int, slots: list[int]
) -> None:
    model = tiny_onevision(grid=grid)
    batch = anyres_inputs(model, [[2, ("video", 3), 1, ("video", 3), 1]])
    rows = visual_rows(model, Schedule(merge=merges), batch["input_ids"], batch, [])
    assert rows is not None and rows.grid is None
    assert tile_counts(model, merges, batch) == [counts, counts] and rows.features.shape[1] == 2 * counts
    area = math.ceil(grid / 2) ** 2
    video = [frame * area + slot for frame in range(3) for slot in slots] + [3 * area]
    assert rows.slots[0].tolist() == [*video, *(3 * area + 1 + slot for slot in video)]
    assert float(rows.sizes.sum()) == pytest.approx(2 * (3 * area + 1))
    newline = model.model.image_newline
    assert torch.equal(rows.features[0, [counts - 1, -1]], newline.expand(2, -1))


@torch.no_grad()
@pytest.mark.parametrize("grid", [6, 7])
def test_videos_are_pooled_from_the_merged_grid(grid: int) -> None:
    model = tiny_onevision(grid=grid)
    batch = anyres_inputs(model, [[2, ("video", 2), 1, ("video", 2), 1]])
    pixels, ids = batch["pixel_values_videos"], batch["input_ids"]
    stock = model.get_video_features(pixels).pooler_output
    rows = visual_rows(model, Schedule(), ids, batch, [])
    assert rows is not None and torch.allclose(rows.features[0], stock.flatten(0, 1), atol=1e-5)
    # every frame merges by itself, as if it were the only one
    schedule = Schedule(merge=(WIDTH, Merge("height", keep=0.7, layer=1, pairing="shared", feature="keys")))
    rows = visual_rows(model, schedule, ids, batch, [])
    assert rows is not None
    left = math.ceil(grid / 2)
    features, grids, after = encode_tiles(
        model, schedule, pixels[1, :1], frame_layout(model, {"pixel_values_videos": pixels[1:, :1]}), []
    )
    height, width = after[0].sides
    assert (height, width) == tuple(grids.sizes.shape[1:]) and width == left < height < grid
    small = pooled((height, width))
    count = small[0] * small[1]
    mine = rows.features[0].reshape(2, 2 * count + 1, -1)[1, :count].reshape(*small, -1)
    # the middle of an even grid is half a position off: the mean of 2 x 2; an odd one has weights by hand
    weights = [_weights(side) for side in (height, width)]
    by_hand = torch.einsum("ih,jw,hwd->ijd", *weights, features[0])
    assert torch.allclose(mine, by_hand, atol=1e-5)


def _weights(side: int) -> Tensor:
    """[ceil(side / 2), side]: what bilinear interpolation takes of each position."""
    new = -(-side // 2)
    out = torch.zeros(new, side)
    for i in range(new):
        at = min(max((i + 0.5) * side / new - 0.5, 0.0), side - 1)
        low = int(at)
        out[i, low] += 1 - (at - low)
        if low + 1 < side:
            out[i, low + 1] += at - low
    return out


def test_padding_of_an_image_does_not_raise_the_targets_of_a_video() -> None:
    model = tiny_onevision()
    batch = anyres_inputs(model, [[2, ("image", *FLAT), 1, ("video", 2), 1]])
    merges = (Merge("height", length=1, layer=0),)
    rows = visual_rows(model, Schedule(merge=merges), batch["input_ids"], batch, [])
    assert rows is not None
    # the image's 6 are left with 3, of the 4 that the crop keeps 1, 3 x 6 columns and a newline
    assert tile_counts(model, merges, batch) == [3 * 6 + 19, 2 * 3 + 1]
    assert rows.features.shape[1] == 37 + 7


# ----------------------------------------------------------------------------------- what is refused


def features_of(model: nn.Module, batch: dict[str, Tensor], schedule: Schedule) -> Tensor | None:
    return oracle_forward(model, schedule, **batch).features


def test_interpolated_features_are_pruned_only() -> None:
    prune, merge = Schedule(prune=(Prune(keep=0.5, layer=1),)), Schedule(merge=(WIDTH,))
    model = tiny_onevision(most=1)
    batch = anyres_inputs(model, [[2, ("image", *SQUARE), 1]])
    plain = tiny_onevision()
    assert (
        batch["input_ids"].shape[1] < anyres_inputs(plain, [[2, ("image", *SQUARE), 1]])["input_ids"].shape[1]
    )
    with pytest.raises(NotImplementedError, match="interpolated"):
        features_of(model, batch, merge)
    real = oracle_forward(model, Schedule(), **batch)
    assert torch.allclose(real.logits, model(**batch).logits, atol=2e-5)
    fused = real.features.shape[1]
    assert oracle_forward(model, prune, **batch).tokens_per_layer == [
        fused,
        *3 * [math.floor(fused / 2 + 0.5)],
    ]
    assert (
        features_of(model, anyres_inputs(model, [[2, ("image", 24, 24), ("image", 24, 24)]]), merge)
        is not None
    )
    video = anyres_inputs(model, [[2, ("image", *SQUARE), 1, ("video", 2), 1]])
    with pytest.raises(NotImplementedError, match="interpolated"):
        features_of(model, video, merge)
