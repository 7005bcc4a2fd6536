"""`luvc_fx.picture`: what it shows is what the oracle keeps and merges; what cannot be drawn is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.apps.picture.areas import GONE, Stage, stages_of
from luvc_fx.apps.picture.drawing import ABSORBED_SHADE, GONE_SHADE, panel
from luvc_fx.apps.picture.owners import owners
from luvc_fx.apps.picture.pixels import frames_of
from luvc_fx.apps.picture.recording import Recording, record
from luvc_fx.cli.main import main as cli
from luvc_fx.ops import absorb, mask_to_index, orthogonal_merge, sequence_merge
from tests.support.models import inputs, tiny_internvl, tiny_llava
from tests.support.models_anyres import anyres_inputs, tiny_llava_next, tiny_onevision
from tests.support.models_qwen import (
    PATCH,
    TEMPORAL,
    patchify,
    qwen_inputs,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
    tiny_qwen3_vl,
)
from tests.support.oracle import Grid, oracle_forward, packed, vision
from tests.support.oracle.merge import merge_grid

SCHEDULE = Schedule(
    merge=(Merge("width", keep=0.75, layer=0), Merge("height", keep=0.5, layer=1)),
    prune=(
        Prune(keep=0.75, layer=1, coverage="global"),
        Prune(keep=0.5, layer=2, selector="distinct", absorb=True),
        Prune(keep=0.0, layer=-1),
    ),
)
WHITE = torch.full((32, 32, 3), 255, dtype=torch.uint8)


# -- which rows went into which ---------------------------------------------------------------------


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def _check_means(x: Tensor, sizes: Tensor, merged: Tensor, left: Tensor) -> None:
    """Every row of x ``[1, n, C]`` is in one token: sizes add up, and a token is the mean of its rows."""
    owner = owners(x, merged)[0]
    assert owner.min() == 0
    assert owner.max() == merged.shape[1] - 1
    assert torch.equal(torch.zeros_like(left).index_add(0, owner, sizes), left)
    sums = torch.zeros_like(merged[0]).index_add(0, owner, x.detach()[0] * sizes.unsqueeze(-1))
    torch.testing.assert_close(sums / left.unsqueeze(-1), merged.detach()[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_owners_of_an_orthogonal_merge(length: int) -> None:
    x, sizes = _leaf(1, 4, 9, 5), torch.arange(1.0, 37.0).reshape(1, 4, 9)
    slots = torch.arange(36).reshape(1, 4, 9)
    flat = x.detach().flatten(1, 2).requires_grad_()
    merged, left, _ = orthogonal_merge(flat.unflatten(1, (4, 9)), sizes, slots, "width", length)
    _check_means(flat, sizes.flatten(), merged.flatten(1, 2), left.flatten())


@pytest.mark.parametrize("length", [1, 5, 13])
def test_owners_of_a_sequence_merge(length: int) -> None:
    x, sizes = _leaf(1, 20, 5), torch.arange(1.0, 21.0).reshape(1, 20)
    merged, left, _ = sequence_merge(x, sizes, torch.arange(20).reshape(1, 20), length)
    _check_means(x, sizes[0], merged, left[0])


def test_owners_where_tokens_are_dropped_and_absorbed() -> None:
    x = _leaf(1, 12, 5)
    keep = torch.tensor([[False, True, False, False, True, False, True, False, False, False, True, False]])
    kept = mask_to_index(keep, 4)
    assert owners(x, x.index_select(1, kept[0]))[0].tolist() == [-1, 0, -1, -1, 1, -1, 2, -1, -1, -1, 3, -1]
    ahead = keep.cumsum(-1) - keep.long()
    averaged = absorb(x, keep, ahead, kept)
    owner = owners(x, averaged)[0]
    assert owner[kept[0]].tolist() == [0, 1, 2, 3]
    for number in range(4):
        mean = x.detach()[0][owner == number].mean(0)
        torch.testing.assert_close(mean, averaged.detach()[0, number])


def test_owners_in_half_precision() -> None:
    x = _leaf(1, 300, 8, dtype=torch.bfloat16)
    merged, left, _ = sequence_merge(x, torch.ones(1, 300), torch.arange(300).reshape(1, 300), 40)
    assert torch.equal(torch.bincount(owners(x, merged)[0]).float(), left[0])


def test_rows_that_went_into_two_have_no_owner() -> None:
    x = _leaf(1, 6, 4)
    with pytest.raises(RuntimeError, match="mean of tokens that went into it alone"):
        owners(x, (x[:, :-1] + x[:, 1:]) / 2)


# -- against the oracle -----------------------------------------------------------------------------


class _Groups:
    """Stands for the oracle's `merge_grid`, and lets a one-hot per token merge along: who is in which."""

    def __init__(self, frames: int) -> None:
        self.members: list[list[Tensor]] = [[] for _ in range(frames)]
        self.calls = 0

    def __call__(self, grid: Grid, *args: Any, **options: Any) -> Grid:
        history = self.members[self.calls % len(self.members)]
        self.calls += 1
        images, height, width = grid.sizes.shape
        whole = torch.eye(height * width).reshape(1, height, width, -1).repeat(images, 1, 1, 1)
        hot = history[-1] if history else whole
        rest = hot[..., :0] if grid.angles is None else grid.angles
        along = dataclasses.replace(grid, angles=torch.cat([rest, hot], dim=-1))
        merged = merge_grid(along, *args, **options)
        assert merged.angles is not None
        history.append(merged.angles[..., rest.shape[-1] :])
        angles = None if grid.angles is None else merged.angles[..., : rest.shape[-1]]
        return dataclasses.replace(merged, angles=angles)

    def owners(self, merges: int) -> list[list[int]]:
        """Per frame and token before all merges, its token after so many of them."""
        found = []
        for history in self.members:
            for hot in history[merges - 1].flatten(1, 2):
                assert ((hot > 0).sum(0) == 1).all()
                found.append((hot > 0).int().argmax(0).tolist())
        return found


@dataclasses.dataclass
class Case:
    """One family: what was recorded of a prompt, and the oracle's word on it."""

    recording: Recording
    stages: list[Stage]
    groups: _Groups
    kept: dict[int, Tensor]
    unit: int


def _llava() -> tuple[Any, dict[str, Tensor], int, int, Any]:
    model = tiny_llava()
    return model, inputs(model), 1, 1, vision


def _internvl() -> tuple[Any, dict[str, Tensor], int, int, Any]:
    model = tiny_internvl()
    return model, inputs(model, tiles=2), 1, 2, vision


def _qwen2_vl() -> tuple[Any, dict[str, Tensor], int, int, Any]:
    model = tiny_qwen2_vl()
    return model, qwen_inputs(model, [[3, ("image", 8, 12), 2, ("image", 8, 8), 4]]), 2, 2, packed


@pytest.fixture(scope="module", params=[_llava, _internvl, _qwen2_vl])
def case(request: pytest.FixtureRequest) -> Case:
    make: Callable[[], tuple[Any, dict[str, Tensor], int, int, Any]] = request.param
    model, prompt, frames, unit, oracle = make()
    groups = _Groups(frames)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "merge_grid", groups)
        truth = oracle_forward(model, SCHEDULE, **prompt)
    recording = record(model, prompt, SCHEDULE)
    assert recording.refusals == []
    return Case(recording, stages_of(recording), groups, truth.kept, unit)


def _as_blocks(stage: Stage, unit: int) -> list[Tensor]:
    """The owners of blocks, all of whose patches have the same."""
    found = []
    for owner in stage.owners:
        blocks = owner[::unit, ::unit]
        assert torch.equal(blocks.repeat_interleave(unit, 0).repeat_interleave(unit, 1), owner)
        found.append(blocks.flatten())
    return found


def test_merged_areas_are_the_oracles_groups(case: Case) -> None:
    first, *rest = case.stages
    total = sum(len(blocks) for blocks in _as_blocks(first, case.unit))
    assert (first.tokens, first.before) == (total, total)
    for merges in (1, 2):
        stage, start = rest[merges - 1], 0
        expected = case.groups.owners(merges)
        for blocks, owner in zip(_as_blocks(stage, case.unit), expected, strict=True):
            assert (blocks - start).tolist() == owner
            start += max(owner) + 1
        assert (stage.tokens, stage.before) == (start, total)


def test_pruned_areas_are_what_the_oracle_drops(case: Case) -> None:
    fused, plain, absorbed, none = case.stages[2:]
    kept = case.kept[1][0].tolist()
    for before, after in zip(fused.owners, plain.owners, strict=True):
        expected = [kept.index(token) if token in kept else GONE for token in before.flatten().tolist()]
        assert after.flatten().tolist() == expected
    assert not any(part.any() for part in plain.absorbed)
    kept = case.kept[2][0].tolist()
    for before, after, dim in zip(plain.owners, absorbed.owners, absorbed.absorbed, strict=True):
        for old, new, is_dim in zip(*(x.flatten().tolist() for x in (before, after, dim)), strict=True):
            assert (new == GONE) == (old == GONE)
            assert is_dim == (old != GONE and old not in kept)
            assert is_dim or old == GONE or new == kept.index(old)
    assert all((owner == GONE).all() for owner in none.owners)
    assert [stage.tokens for stage in (plain, absorbed, none)] == [len(case.kept[i][0]) for i in (1, 2, 3)]


@pytest.mark.slow
def test_compiled_code_keeps_what_is_drawn() -> None:
    model = tiny_llava()
    prompt = inputs(model)
    schedule = dataclasses.replace(SCHEDULE, prune=SCHEDULE.prune[:2])
    last = stages_of(record(model, prompt, schedule))[-1]
    luvc_fx.compile(model, schedule, strict=True)
    with torch.inference_mode():
        rows = model(**prompt).row_index[0]
        drawn = stages_of(record(model, prompt, schedule))[-1]
    visual = prompt["input_ids"][0, rows] == model.config.image_token_id
    first = int((prompt["input_ids"][0] == model.config.image_token_id).int().argmax())
    owner = last.owners[0].flatten()[rows[visual] - first]
    assert sorted(owner.tolist()) == list(range(last.tokens))
    assert not last.absorbed[0].flatten()[rows[visual] - first].any()
    assert torch.equal(drawn.owners[0], last.owners[0])


# -- the drawing ------------------------------------------------------------------------------------


def test_dark_are_exactly_the_areas_of_dropped_tokens(case: Case) -> None:
    for stage in case.stages:
        for number, (owner, absorbed) in enumerate(zip(stage.owners, stage.absorbed, strict=True)):
            drawn = panel(WHITE, stage, number, side=16 * max(owner.shape))
            assert drawn.size == (16 * owner.shape[1], 16 * owner.shape[0])
            for y, x in torch.cartesian_prod(*map(torch.arange, owner.shape)).tolist():
                shade = ABSORBED_SHADE if absorbed[y, x] else GONE_SHADE if owner[y, x] == GONE else 1.0
                assert drawn.getpixel((16 * x + 8, 16 * y + 8)) == (round(255 * shade),) * 3


def test_a_merged_area_has_one_colour_and_a_border() -> None:
    frame = (torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    owner = torch.tensor([[0, 0, 1, 2], [3, 3, 1, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    stage = Stage("", (owner,), (torch.zeros(4, 4, dtype=torch.bool),), 13, 16, 1)
    drawn = panel(frame, stage, 0, side=40)
    inside = {drawn.getpixel((x, y)) for x in range(1, 20) for y in range(1, 10)}
    assert len(inside) == 1
    assert drawn.getpixel((20, 5)) not in inside
    single = {drawn.getpixel((x, y)) for x in range(31, 40) for y in range(1, 10)}
    assert len(single) > 1  # the picture itself


def test_the_picture_of_a_compiled_model_and_the_model_after_it(tmp_path: Path) -> None:
    model = luvc_fx.prepare(tiny_llava())
    prompt = inputs(model)
    before = dict(vars(model))
    file = tmp_path / "kept.png"
    drawn = luvc_fx.picture(model, prompt, SCHEDULE, path=file)
    assert dict(vars(model)) == before
    with Image.open(file) as saved:
        assert list(saved.convert("RGB").tobytes()) == list(drawn.tobytes())
    luvc_fx.compile(model, SCHEDULE, inner="eager")
    report = luvc_fx.report_of(model)
    again = luvc_fx.picture(model, prompt)
    assert again.tobytes() == drawn.tobytes()
    assert luvc_fx.report_of(model) is report
    assert report.graphs == []
    plain = luvc_fx.picture(model, prompt, Schedule())
    assert plain.size[0] < drawn.size[0]


def test_only_some_of_many_frames_are_drawn() -> None:
    model = tiny_llava(grid=4, decoder_layers=2, encoder_layers=3)
    few, many = (
        luvc_fx.picture(model, inputs(model, images=images), Schedule(prune=Prune(keep=0.5, layer=1)))
        for images in (6, 8)
    )
    assert many.height - few.height == 20  # one more line of words


# -- the picture that the encoder saw ---------------------------------------------------------------


def test_colours_are_undone_by_the_processor() -> None:
    model = tiny_llava(grid=4, decoder_layers=2, encoder_layers=3)
    colours = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mean, spread = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    scale = [torch.tensor(numbers).reshape(3, 1, 1) for numbers in (mean, spread)]
    prompt = {**inputs(model), "pixel_values": (colours - scale[0]) / scale[1]}
    (seen,) = record(model, prompt, Schedule()).visions
    processor = SimpleNamespace(image_processor=SimpleNamespace(image_mean=mean, image_std=spread))
    (frame,) = frames_of(seen, model, processor)
    assert torch.equal(frame, (colours[0].permute(1, 2, 0) * 255).round().to(torch.uint8))
    (stretched,) = frames_of(seen, model, None)
    assert (int(stretched.min()), int(stretched.max())) == (0, 255)


@pytest.mark.parametrize("make", [tiny_qwen2_5_vl, tiny_qwen3_vl])
def test_packed_patches_become_pictures_again(make: Callable[..., Any]) -> None:
    model = make(decoder_layers=2)
    prompt = qwen_inputs(model, [[3, ("image", 8, 12), 2, ("image", 8, 4), 4]])
    shapes = [(8, 12), (8, 4)]
    colours = [torch.rand(3, PATCH * height, PATCH * width) for height, width in shapes]
    prompt["pixel_values"] = torch.cat([patchify(image.repeat(TEMPORAL, 1, 1, 1)) for image in colours])
    recording = record(model, prompt, Schedule(prune=Prune(keep=0.5, layer=1)))
    processor = SimpleNamespace(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    frames = frames_of(recording.visions[0], model, processor)
    for frame, image in zip(frames, colours, strict=True):
        assert torch.equal(frame, (image.permute(1, 2, 0) * 255).round().to(torch.uint8))
    picture, pruned = stages_of(recording)
    assert [tuple(part.shape) for part in picture.owners] == shapes
    assert (pruned.tokens, pruned.before) == (16, 32)


@pytest.mark.parametrize("make", [tiny_onevision, tiny_llava_next])
def test_tiles_lose_their_padding_and_line_ends_have_no_area(make: Callable[..., Any]) -> None:
    model = make(decoder_layers=2, encoder_layers=3)
    prompt = anyres_inputs(model, [[3, ("image", 48, 30), 4]])
    count = int((prompt["input_ids"] == model.config.image_token_id).sum())
    merge = Merge("width", keep=0.5, layer=0)
    stages = stages_of(record(model, prompt, Schedule(merge=merge, prune=Prune(keep=0.5, layer=1))))
    whole, merged, fused, pruned = stages
    tiles = len(whole.owners)
    assert (whole.tokens, whole.before, fused.before) == (36 * tiles, 36 * tiles, count)
    assert merged.tokens < whole.tokens
    for stage in (fused, pruned):
        areas = [owner[owner != GONE].unique() for owner in stage.owners]
        assert stage.tokens == sum(map(len, areas)) + stage.ends
    assert fused.ends > 0
    assert (fused.owners[0] != GONE).all()  # the whole picture
    columns = (fused.owners[1] != GONE).any(0)
    assert columns.tolist() == sorted(columns.tolist())  # padding is to the left of the first tile
    assert not columns[0]


# -- what cannot be drawn ---------------------------------------------------------------------------


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    model = tiny_llava(grid=4, decoder_layers=2, encoder_layers=3)
    prompt = inputs(model)
    with pytest.raises(ValueError, match="not compiled by luvc_fx"):
        luvc_fx.picture(model, prompt)
    with pytest.raises(ValueError, match=r"input_ids are \[2, .*allowed: a tensor \[1, rows\]"):
        luvc_fx.picture(model, inputs(model, batch=2), "image")
    with pytest.raises(ValueError, match="neither pixel_values nor"):
        luvc_fx.picture(model, {"input_ids": prompt["input_ids"]}, "image")
    for name, text in (("kept.xyz", "Pillow writes no such file"), ("no/kept.png", "does not exist")):
        with pytest.raises(ValueError, match=text):
            luvc_fx.picture(model, prompt, "image", path=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_videos_of_pooled_frames_and_mixed_prompts_are_refused() -> None:
    model = tiny_onevision(decoder_layers=2, encoder_layers=2)
    with pytest.raises(ValueError, match="resamples its features"):
        luvc_fx.picture(model, anyres_inputs(model, [[3, ("video", 2), 4]]), Schedule())
    qwen = tiny_qwen2_vl(decoder_layers=2, encoder_layers=2)
    with pytest.raises(ValueError, match="images and videos"):
        luvc_fx.picture(qwen, qwen_inputs(qwen, [[3, ("image", 4, 4), ("video", 2, 4, 4), 4]]), Schedule())


def test_the_picture_says_what_was_left_alone() -> None:
    model = tiny_qwen2_5_vl(decoder_layers=2, encoder_layers=2)
    prompt = qwen_inputs(model, [[3, ("image", 8, 8), 4]])
    prune = Prune(keep=0.5, layer=1)
    full = luvc_fx.picture(model, prompt, Schedule(prune=prune))
    partly = luvc_fx.picture(model, prompt, Schedule(merge=Merge("width", keep=0.5, layer=0), prune=prune))
    assert partly.height > full.height  # a line more: windows do not merge
    assert partly.crop((0, 0, *full.size)).width == full.width


# -- the command ------------------------------------------------------------------------------------


def test_wrong_picture_files(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli(["demo", "--picture", str(tmp_path / "kept.xyz")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("luvc-fx: picture ")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_draws_the_demo(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "kept.png"
    assert cli(["demo", "--json", "--inner", "eager", "--runs", "1", "--picture", str(file)]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["picture"] == str(file)
    with Image.open(file) as saved:
        assert saved.width <= 1208
