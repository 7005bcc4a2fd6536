"""The oracle's rules for Qwen-VL towers: packed frames, rotary angles, slots, deepstack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.models_qwen import (
    VIDEO,
    patchify,
    qwen_inputs,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
    tiny_qwen3_vl,
)
from tests.support.oracle import Frame, Grid, encode_packed, merge_grid, oracle_forward, visual_rows
from tests.support.oracle.packed import _Tower

BOTH = Schedule(merge=(Merge("width", keep=0.5, layer=0), Merge("height", keep=0.5, layer=1)))


def image(model: nn.Module, *sides: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pixels and grid of one image of `sides` patches (or a video's, of three)."""
    kind = "image" if len(sides) == 2 else "video"
    batch = qwen_inputs(model, [[(kind, *sides), 1]], seed)  # type: ignore[list-item]
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
    pixels, grid = names[kind]
    return batch[pixels], batch[grid]


def encode(model: nn.Module, schedule: Schedule, *sides: int) -> list[Frame]:
    """The frames of one image or video."""
    return encode_packed(model, schedule, *image(model, *sides), [])[0]


def test_patches_are_those_of_the_image_processor() -> None:
    pixels = torch.randint(0, 256, (3, 16, 24), generator=torch.Generator().manual_seed(0)).float()
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=False
    )
    made = processor(pixels.numpy(), return_tensors="pt", input_data_format="channels_first")
    assert made["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert torch.equal(patchify(pixels.repeat(2, 1, 1, 1)), made["pixel_values"])


@pytest.mark.parametrize("make", [tiny_qwen2_vl, tiny_qwen3_vl])
def test_angles_are_those_of_the_stock_tower(make: Any) -> None:
    model = make()
    thw = [(1, 4, 6), (2, 6, 4)]
    angles = _Tower(model).angles(thw)
    where = get_vision_position_ids(torch.tensor(thw), 2)
    cos, sin = model.model.visual.rotary_pos_emb(angles, where)
    assert torch.equal(angles.cos(), cos) and torch.equal(angles.sin(), sin)


@torch.no_grad()
def test_whole_blocks_merge() -> None:
    """One merge by hand: after the last block, of two columns of blocks into one."""
    model = tiny_qwen2_vl()
    pixels, grid = image(model, 4, 4)
    hidden = model.model.visual(pixels, grid_thw=grid).last_hidden_state.reshape(2, 2, 4, -1)
    expected = model.model.visual.merger(hidden.mean(dim=1).flatten(0, 1))
    (frame,) = encode(model, Schedule(merge=(Merge("width", length=2, layer=-1),)), 4, 4)
    assert frame.grid == (2, 1) and frame.placeholders == 4
    assert frame.slots.tolist() == [1, 3] and frame.sizes.tolist() == [2, 2]
    assert torch.allclose(frame.features, expected, atol=1e-5)


@torch.no_grad()
def test_angles_merge_to_those_of_the_mean_coordinates() -> None:
    """Columns 0 and 1 of blocks become one, which the next block turns by the mean of both."""
    model = tiny_qwen2_vl(encoder_layers=2)
    pixels, grid = image(model, 4, 4)
    tower = model.model.visual
    first, second = tower.blocks
    where = get_vision_position_ids(grid, 2).float()  # [16, 2]: rows, columns of patches
    ends = torch.tensor([0, 16], dtype=torch.int32)
    hidden = first(
        tower.patch_embed(pixels), cu_seqlens=ends, position_embeddings=tower.rotary_pos_emb(pixels, where)
    )
    merged = hidden.reshape(2, 2, 4, -1).mean(dim=1).flatten(0, 1)
    mean = where.reshape(2, 2, 4, 2).mean(dim=1).flatten(0, 1)
    assert mean[:4].tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    out = second(
        merged,
        cu_seqlens=torch.tensor([0, 8], dtype=torch.int32),
        position_embeddings=tower.rotary_pos_emb(pixels, mean),
    )
    (frame,) = encode(model, Schedule(merge=(Merge("width", keep=0.5, layer=0),)), 4, 4)
    assert torch.allclose(frame.features, tower.merger(out), atol=1e-5)


def test_sizes_weigh_the_angles() -> None:
    x = torch.ones(1, 1, 4, 2)
    angles = torch.arange(4.0).reshape(1, 1, 4, 1)
    grid = merge_grid(Grid.of(x, angles=angles), "width", 1, [])
    assert grid.angles is not None and float(grid.angles) == 1.5 and float(grid.sizes) == 4
    assert grid.angles.dtype == torch.float32
    tall = merge_grid(Grid.of(x, angles=angles).transposed(), "height", 2, [])
    assert tall.angles is not None and tall.angles.flatten().tolist() == [0.5, 2.5]


@torch.no_grad()
def test_keys_are_compared_after_the_rotation() -> None:
    model = tiny_qwen2_vl()
    pixels, grid = image(model, 4, 6)
    tower, block = model.model.visual, model.model.visual.blocks[0]
    hidden = tower.patch_embed(pixels)
    cos, sin = tower.rotary_pos_emb(hidden, get_vision_position_ids(grid, 2))
    query, key, _ = block.attn.qkv(block.norm1(hidden)).reshape(24, 3, 4, -1).unbind(1)
    turned = apply_rotary_pos_emb_vision(query, key, cos, sin)[1].flatten(1)
    mine = _Tower(model)
    assert torch.allclose(mine.keys(block, hidden, mine.angles([(1, 4, 6)])), turned, atol=1e-6)
    assert float((turned - key.flatten(1)).abs().max()) > 0.1
    # and its cosines choose
    out = block(hidden, cu_seqlens=torch.tensor([0, 24]).int(), position_embeddings=(cos, sin))
    by_hand = Grid.of(out.reshape(1, 2, 3, -1), turned.reshape(1, 2, 3, -1))
    expected = merge_grid(by_hand, "width", 2, [], feature="keys")
    schedule = Schedule(merge=(Merge("width", length=4, layer=0, feature="keys"),))
    (frame,) = encode(model, schedule, 4, 6)
    assert torch.equal(frame.slots, expected.slots.flatten())


@pytest.mark.parametrize("make", [tiny_qwen2_vl, tiny_qwen3_vl])
def test_frames_do_not_depend_on_each_other(make: Any) -> None:
    model = make()
    schedule = Schedule(merge=(*BOTH.merge, Merge("width", keep=0.75, layer=1, pairing="shared")))
    one, two = image(model, 8, 6), image(model, 3, 4, 10, seed=1)
    pixels, grid = (torch.cat(parts) for parts in zip(one, two, strict=True))
    together = encode_packed(model, schedule, pixels, grid, [])
    assert [len(item) for item in together] == [1, 3]
    assert [frame.grid for item in together for frame in item] == [(2, 2)] + 3 * [(1, 2)]
    frames = two[0].split(4 * 10)
    for frame, alone in zip(together[1], frames, strict=True):
        (want,) = encode_packed(model, schedule, alone, torch.tensor([[1, 4, 10]]), [])[0]
        assert torch.equal(frame.slots, want.slots) and torch.equal(frame.sizes, want.sizes)
        assert torch.allclose(frame.features, want.features, atol=1e-5)
        for mine, theirs in zip(frame.deep, want.deep, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


def test_slots_are_distinct_and_ascend_within_lines() -> None:
    model = tiny_qwen2_vl()
    width = Schedule(merge=(Merge("width", keep=0.6, layer=1),))
    frames = encode(model, width, 2, 8, 12)
    for frame in frames:
        lines = frame.slots.reshape(frame.grid)
        assert frame.grid == (4, 4) and bool((lines.diff(dim=1) > 0).all())
        assert torch.equal(lines // 6, torch.arange(4)[:, None].expand(4, 4))
        assert float(frame.sizes.sum()) == frame.placeholders == 24
    batch = qwen_inputs(model, [[3, ("image", 4, 6), 2, ("video", 2, 8, 8), ("image", 4, 4), 1]])
    rows = visual_rows(model, BOTH, batch["input_ids"], batch, [])
    assert rows is not None and rows.grid is None and float(rows.sizes.sum()) == 6 + 32 + 4
    assert rows.slots.unique().numel() == rows.slots.numel()
    owner = [(slot >= 6) + (slot >= 22) + (slot >= 38) for slot in rows.slots[0].tolist()]
    assert owner == sorted(owner) and set(owner) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "rows", [[[1, ("image", 4, 8), 1, ("video", 2, 4, 8)], [2, ("image", 4, 8), ("video", 2, 4, 8)]]]
)
def test_a_grid_that_all_share(rows: Any) -> None:
    model = tiny_qwen2_vl()
    batch = qwen_inputs(model, rows)
    result = oracle_forward(model, BOTH, **batch)
    assert result.grid == (1, 2) and result.features.shape[:2] == (2, 6)
    assert (batch["input_ids"] == VIDEO).sum() == 2 * 16
    filtered = Schedule(merge=BOTH.merge, prune=(Prune(keep=0.5, layer=1, per_image=True),))
    assert oracle_forward(model, filtered, **batch).tokens_per_layer == [6, 3, 3, 3]


def test_lengths_are_checked_against_every_image() -> None:
    model = tiny_qwen2_vl()
    encode(model, Schedule(merge=(Merge("height", length=4, layer=0),)), 4, 6)
    with pytest.raises(ValueError, match="length"):
        encode(model, Schedule(merge=(Merge("height", length=5, layer=0),)), 4, 6)


# ------------------------------------------------------------------------------------ other families


def test_windows_are_not_merged() -> None:
    model = tiny_qwen2_5_vl()
    with pytest.raises(NotImplementedError, match="window"):
        encode(model, BOTH, 8, 8)
    assert [frame.grid for frame in encode(model, Schedule(), 2, 8, 6)] == [(4, 3), (4, 3)]


@torch.no_grad()
def test_deepstack_features_follow_the_merged_tokens() -> None:
    model = tiny_qwen3_vl(taps=(1, 2))
    last = Schedule(merge=(Merge("width", keep=0.5, layer=1),))
    pixels, grid = image(model, 4, 4)
    tower = model.model.visual
    seen = []
    hooks = [tower.deepstack_merger_list[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    stock = tower(pixels, grid_thw=grid)
    merged = encode_packed(model, last, pixels, grid, [])[0][0]
    hooks[0].remove()
    assert torch.allclose(seen[1], seen[0].reshape(2, 2, 4, -1).mean(dim=1).flatten(0, 1), atol=1e-6)
    assert [tuple(deep.shape) for deep in merged.deep] == [(2, 48)] * 2
    plain = encode_packed(model, Schedule(), pixels, grid, [])[0][0]
    for mine, theirs in zip(plain.deep, stock.deepstack_features, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    with pytest.raises(NotImplementedError, match="deepstack"):
        encode(model, Schedule(merge=(Merge("width", keep=0.5, layer=2),)), 4, 4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_deepstack_features_are_added_to_the_rows_that_are_left(layer: int) -> None:
    """Text reads the features that layer 0 leaves in layer 1, so not where all go before that."""
    model = tiny_qwen3_vl(taps=(0, 2))
    batch = qwen_inputs(model, [[2, ("image", 4, 6), 3]])
    none = Schedule(prune=(Prune(0.0, layer=layer),))
    before = oracle_forward(model, none, **batch)
    for reader in model.model.visual.deepstack_merger_list:
        reader.linear_fc2.weight.zero_()
        reader.linear_fc2.bias.zero_()
    after = oracle_forward(model, none, **batch)
    assert torch.equal(before.logits, after.logits) == (layer < 2)
