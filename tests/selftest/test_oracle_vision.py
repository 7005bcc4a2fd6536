"""The oracle's vision side: blocks of patches, tiles and features of each family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luvc_fx.schedule import Merge, Schedule
from tests.support.models import IMAGE, inputs, patch_grid, tiny_internvl, tiny_llava, visual_tokens
from tests.support.oracle import encode, encoder_blocks, from_blocks, oracle_forward, target_blocks, to_blocks


@cache
def build(family: str, **options: Any) -> nn.Module:
    """A tiny model; do not change it."""
    return {"llava": tiny_llava, "internvl": tiny_internvl}[family](**options)


def internvl(**options: Any) -> nn.Module:
    """A tiny InternVL; do not change it."""
    return build("internvl", **options)


def stock_features(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[I, N, D] of the stock model."""
    return torch.stack(list(model.get_image_features(batch["pixel_values"]).pooler_output))


def test_blocks_are_those_of_the_stock_pixel_shuffle() -> None:
    x = torch.randn(3, 4 * 6, 5, generator=torch.Generator().manual_seed(0))
    blocks = to_blocks(x, 4, 6, 2)
    stock = internvl().model.pixel_shuffle(x.reshape(3, 4, 6, 5), 0.5)
    assert blocks.shape == (3, 2, 3, 20)
    assert torch.equal(blocks, stock)
    assert torch.equal(from_blocks(blocks, 2), x)
    assert torch.equal(to_blocks(x, 4, 6, 1), x.reshape(3, 4, 6, 5))
    assert torch.equal(from_blocks(x.reshape(3, 4, 6, 5), 1), x)
    # the first block holds the patches at (0, 0), (0, 1), (1, 0) and (1, 1)
    assert torch.equal(blocks[0, 0, 0].reshape(4, 5), x[0, [0, 1, 6, 7]])


def test_keep_counts_blocks_and_length_counts_patches() -> None:
    def left(**amount: Any) -> int:
        return target_blocks(Merge("width", **amount, layer=0), 4, 2)

    assert [left(keep=keep) for keep in (1.0, 0.625, 0.6, 0.01)] == [4, 3, 2, 1]
    assert [left(length=length) for length in range(1, 9)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert target_blocks(Merge("height", length=3, layer=0), 8, 1) == 3
    with pytest.raises(ValueError, match="length"):
        target_blocks(Merge("width", length=9, layer=0), 4, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"text": "llama"},
        {"qk_norm": True},
        {"mean_pooling": False},
        {"mean_pooling": False, "vision_feature_layer": -2},
        {"grid": 12, "seed": 3},
    ],
)
def test_without_sites_every_kind_of_internvl_is_the_stock_one(options: dict[str, Any]) -> None:
    model = internvl(**options)
    batch = inputs(model, 2, padding=(0, 2), tiles=2)
    real = batch["attention_mask"].bool()
    stock = model(**batch).logits[real]
    result = oracle_forward(model, Schedule(), **batch)
    assert float((result.logits[real] - stock).abs().max()) < 1e-5
    assert float(stock.std()) > 0.1


@pytest.mark.parametrize("family", ["llava", "internvl"])
@pytest.mark.parametrize("layer", [-1, -2, -4, 2])
def test_the_feature_layer_is_the_stock_one(family: str, layer: int) -> None:
    model = build(family, vision_feature_layer=layer)
    assert encoder_blocks(model) == {-1: 4, -2: 3, -4: 1, 2: 2}[layer]
    batch = inputs(model)
    result = oracle_forward(model, Schedule(), **batch)
    stock = stock_features(model, batch)[0]
    assert torch.allclose(result.features[0], stock, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_a_token_that_did_not_merge_is_the_stock_one_and_sits_at_its_slot(family: str) -> None:
    model = build(family)
    case: dict[str, Any] = {"images": 2, "padding": (0, 3)}
    if family == "internvl":
        case["tiles"] = (2, 1)
    batch = inputs(model, 2, **case)
    schedule = Schedule(merge=(Merge("height", keep=0.75, layer=-1), Merge("width", 0.5, layer=-1)))
    tokens = encode(model, schedule, batch["pixel_values"], [])
    stock = stock_features(model, batch)
    each, grids = visual_tokens(model), {"llava": 2, "internvl": 3}[family]
    count = tokens.grid[0] * tokens.grid[1]
    assert tokens.grid == {"llava": (6, 4), "internvl": (3, 2)}[family]
    assert torch.equal(tokens.sizes.sum(dim=1), torch.full((2 * grids,), float(each)))
    alone = tokens.sizes == 1
    at = torch.arange(2 * grids)[:, None]
    assert 0 < int(alone.sum()) < alone.numel()
    apart = (tokens.features - stock[at, tokens.slots]).abs().amax(dim=-1)
    assert float(apart[alone].max()) < 1e-5 and float(apart[~alone].max()) > 0.1

    result = oracle_forward(model, schedule, **batch)
    assert torch.equal(result.features.reshape(2 * grids, count, -1), tokens.features)
    for b in range(2):
        places = (batch["input_ids"][b] == IMAGE).nonzero()[:, 0]
        slots = torch.cat([each * i + tokens.slots[grids * b + i] for i in range(grids)])
        assert torch.equal(result.slots[b], slots)
        assert torch.equal(result.rows[b][result.visual[b]], places[slots])


def test_a_tile_is_a_run_of_placeholders_of_its_own() -> None:
    model = internvl()
    one = inputs(model, 2, images=2, tiles=(3, 1))
    assert one["pixel_values"].shape[0] == 8
    runs = (one["input_ids"][0] == model.config.image_token_id).int().diff(prepend=torch.zeros(1)).nonzero()
    assert runs.flatten().tolist() == [3, 3 + 3 * 16, 4 + 3 * 16, 4 + 4 * 16]
    # merging a tile does not depend on the tiles beside it
    schedule = Schedule(merge=(Merge("width", keep=0.5, layer=0), Merge("height", keep=0.75, layer=1)))
    together = encode(model, schedule, one["pixel_values"], [])
    for tile in range(8):
        alone = encode(model, schedule, one["pixel_values"][tile : tile + 1], [])
        assert torch.equal(alone.slots[0], together.slots[tile])
        assert torch.allclose(alone.features[0], together.features[tile], atol=1e-5)


@torch.no_grad()
def test_whole_blocks_merge() -> None:
    """One merge by hand: after the last block, of all columns of blocks into half as many."""
    model = internvl(grid=4)
    pixels = inputs(model)["pixel_values"]
    hidden = model.model.vision_tower(pixels).last_hidden_state[0, 1:].reshape(4, 4, -1)
    lines = [
        [hidden[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten() for column in range(2)]
        for row in range(2)
    ]
    # two blocks in a line: block 0 goes into block 1, whatever their cosine
    merged = torch.stack([(line[0] + line[1]) / 2 for line in lines])
    expected = model.model.multi_modal_projector(merged)
    tokens = encode(model, Schedule(merge=(Merge("width", length=2, layer=-1),)), pixels, [])
    assert tokens.grid == (2, 1) and tokens.placeholders == 4
    assert tokens.slots.tolist() == [[1, 3]] and tokens.sizes.tolist() == [[2, 2]]
    assert torch.allclose(tokens.features[0], expected, atol=1e-5)
    rounded = encode(model, Schedule(merge=(Merge("width", length=1, layer=-1),)), pixels, [])
    assert torch.equal(rounded.features, tokens.features)


def test_sizes_of_the_models() -> None:
    assert patch_grid(internvl(grid=12)) == (12, 12) and visual_tokens(internvl(grid=12)) == 36
    assert patch_grid(build("llava", grid=6)) == (6, 6) and visual_tokens(build("llava", grid=6)) == 36
