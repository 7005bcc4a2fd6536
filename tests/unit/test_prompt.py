"""The prompt without what merged away: positions of one and of several axes, and all that goes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

import luvc_fx
from luvc_fx.generate.families import family_of
from luvc_fx.generate.prompt import PromptState, compact
from luvc_fx.schedule import Schedule
from tests.support.models import tiny_llava
from tests.support.models_qwen import qwen_inputs, tiny_qwen2_5_vl, tiny_qwen2_vl, tiny_qwen3_vl

IMAGE = 1


@st.composite
def prompts(draw: st.DrawFn) -> tuple[dict[str, Tensor], Tensor, Tensor, int]:
    """Rows with as many placeholders each, everything that a forward may get, and slots in any order."""
    batch, text, each = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    left = draw(st.integers(1, each))
    rows, slots = [], []
    for b in range(batch):
        rows.append(draw(st.permutations([IMAGE] * each + list(range(10, 10 + text)))))
        slots += [b * each + slot for slot in draw(st.permutations(range(each)))[:left]]
    ids = torch.tensor(rows)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sizes: list[tuple[int, ...]] = [(3, batch, text + each), (4, 1, text + each), (batch, text + each)]
    kwargs = {
        "input_ids": ids,
        "position_ids": torch.randint(0, 99, draw(st.sampled_from(sizes)), generator=generator),
        "labels": torch.randint(0, 99, ids.shape, generator=generator),
        "attention_mask": torch.randint(0, 2, ids.shape, generator=generator),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "token_type_ids": torch.randint(0, 2, ids.shape, generator=generator),
        "cache_position": torch.arange(7),
    }
    return kwargs, ids == IMAGE, torch.tensor(slots).reshape(1, 1, -1), batch * each


def by_hand(row: list[int], chosen: list[int], length: int) -> tuple[list[int], list[int]]:
    """Of one row: whose position each new row has, and which old rows are left, in plain Python."""
    places = [i for i in range(length) if row[i] == IMAGE]
    kept = {places[slot] for slot in chosen}
    ascending = [i for i in range(length) if row[i] != IMAGE or i in kept]
    tokens = iter([places[slot] for slot in chosen])
    return [next(tokens) if row[i] == IMAGE else i for i in ascending], ascending


@given(prompts())
def test_everything_follows_the_representatives(
    case: tuple[dict[str, Tensor], Tensor, Tensor, int],
) -> None:
    kwargs, visual, slots, placeholders = case
    shorter, places = compact(PromptState.of(kwargs), visual, slots, placeholders, needs_mask=False)
    short = shorter.as_kwargs()
    batch, length = kwargs["input_ids"].shape
    each = placeholders // batch
    chosen = (slots.reshape(batch, -1) - torch.arange(batch).unsqueeze(1) * each).tolist()
    for b, row in enumerate(kwargs["input_ids"].tolist()):
        moved, ascending = by_hand(row, chosen[b], length)
        assert places[b].tolist() == moved
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            assert torch.equal(short[name][b], kwargs[name][b, ascending]), name
        assert torch.equal(short["labels"][b], kwargs["labels"][b, moved])
        old, new = kwargs["position_ids"], short["position_ids"]
        if old.dim() == 2:
            assert torch.equal(new[b], old[b, moved])
        else:
            assert new.shape == (len(old), batch, len(moved))
            assert torch.equal(new[:, b], old.expand(len(old), batch, length)[:, b, moved])
    assert short["cache_position"] is kwargs["cache_position"]
    assert short.keys() == kwargs.keys()


def test_what_is_not_given_is_not_made() -> None:
    ids = torch.tensor([[5, IMAGE, IMAGE, 6]])
    kwargs = {"input_ids": ids, "labels": None, "attention_mask": None}
    prompt = PromptState.of(kwargs)
    short, places = compact(prompt, ids == IMAGE, torch.tensor([[[1]]]), 2, needs_mask=False)
    assert short.as_kwargs().keys() == {"input_ids", "position_ids", "labels"}
    assert short.rest == {"labels": None} and short.mask is None
    assert places.tolist() == short.positions.tolist() == [[0, 2, 3]]
    assert short.ids.tolist() == [[5, IMAGE, 6]]
    later, _ = compact(prompt, ids == IMAGE, torch.tensor([[[1]]]), 2, needs_mask=False, past=7)
    assert later.positions.tolist() == [[7, 9, 10]], "counted on from the conversation before"
    short, _ = compact(prompt, ids == IMAGE, torch.tensor([[[1]]]), 2, needs_mask=True)
    assert short.mask.tolist() == [[1, 1, 1]]
    assert prompt.mask is None, "what was given is not changed"


def test_a_mask_that_is_given_stays_one() -> None:
    ids = torch.tensor([[0, 5, IMAGE, IMAGE], [6, IMAGE, 7, IMAGE]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    kwargs = {"input_ids": ids, "attention_mask": mask}
    short, _ = compact(PromptState.of(kwargs), ids == IMAGE, torch.tensor([0, 3]), 4, needs_mask=True)
    assert short.mask.tolist() == [[0, 1, 1], [1, 1, 1]]


# --------------------------------------------------------------------------- positions of the prompt

QWEN: dict[str, Callable[..., Any]] = {f.__name__: f for f in (tiny_qwen2_vl, tiny_qwen2_5_vl, tiny_qwen3_vl)}
PROMPTS: dict[str, list[Any]] = {
    "an image": [[3, ("image", 4, 8), 2]],
    "a padded batch": [[3, ("image", 4, 8), 2], [1, ("image", 4, 8), 1]],
    "a video and images": [[2, ("image", 4, 4), ("video", 2, 4, 8), 1, ("image", 8, 4), 3]],
}


@pytest.mark.parametrize("rows", PROMPTS)
@pytest.mark.parametrize("make", QWEN)
@torch.no_grad()
def test_positions_are_the_stock_models(make: str, rows: str) -> None:
    """Those that its decoder gets when nothing is given, and it remembers where the text goes on."""
    model, stock = QWEN[make](decoder_layers=1), QWEN[make](decoder_layers=1)
    batch = qwen_inputs(model, PROMPTS[rows])
    seen: list[Tensor] = []
    stock.model.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    stock(**batch)
    positions = family_of(model).positions(batch)
    assert positions is not None
    assert torch.equal(positions[-3:], seen[0][-3:])
    assert torch.equal(model.model.rope_deltas, stock.model.rope_deltas)


def tiny_omni() -> Any:
    """Qwen2.5-Omni's thinker: a sound and an image in one prompt, counted on all axes."""
    config = Qwen2_5OmniThinkerConfig(
        audio_config={
            "d_model": 16,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "encoder_layers": 1,
            "num_mel_bins": 8,
            "output_dim": 32,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        text_config={
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        audio_token_index=6,
        image_token_index=IMAGE,
        video_token_index=2,
        audio_start_token_id=7,
        audio_end_token_id=8,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config).eval()


@torch.no_grad()
def test_positions_behind_a_sound() -> None:
    """By hand. The forward takes the lengths of sounds from their mask, and so do we."""
    model = tiny_omni()
    row = [9, 7, *[6] * 7, 8, 10, 3, *[IMAGE] * 4, 4, 11, 12]
    batch = {
        "input_ids": torch.tensor([row]),
        "attention_mask": torch.ones(1, len(row), dtype=torch.int64),
        "input_features": torch.zeros(1, 8, 30),
        "feature_attention_mask": torch.ones(1, 30, dtype=torch.int64),
        "pixel_values": torch.zeros(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    positions = family_of(model).positions(batch)
    assert positions is not None
    # 9, the sound's start, 7 of it, its end, 10, the image's start: 12 in a row; then rows and columns.
    assert positions[-3:, 0, :12].tolist() == [list(range(12))] * 3
    assert (positions[-3:, 0, 12:16] - 12).tolist() == [[0] * 4, [0, 0, 1, 1], [0, 1, 0, 1]]
    assert positions[-3:, 0, 16:].tolist() == [[14, 15, 16]] * 3


@torch.no_grad()
def test_positions_of_several_axes_follow_the_representatives() -> None:
    """Of 2 x 4 blocks the upper right and lower left of each half: rows and columns are theirs."""
    model = tiny_qwen2_vl(decoder_layers=1)
    batch = qwen_inputs(model, [[3, ("image", 4, 8), 2]])
    whole = {**batch, "position_ids": family_of(model).positions(batch)}
    visual = batch["input_ids"] == model.config.image_token_id
    first = int(visual[0].int().argmax())
    slots = torch.tensor([[[1, 3], [4, 6]]])
    shorter, places = compact(PromptState.of(whole), visual, slots, 8, needs_mask=False)
    short = shorter.as_kwargs()
    assert places[0].tolist()[first : first + 4] == [first + slot for slot in (1, 3, 4, 6)]
    time, row, column = short["position_ids"][-3:, 0, first : first + 4] - first
    assert (time.tolist(), row.tolist(), column.tolist()) == ([0] * 4, [0, 0, 1, 1], [1, 3, 0, 2])
    behind = slice(first + 8, None)
    assert torch.equal(short["position_ids"][..., first + 4 :], whole["position_ids"][..., behind])
    assert short["mm_token_type_ids"].sum() == 4


@torch.no_grad()
def test_positions_that_are_not_computed() -> None:
    """Without a grid, and in a model that counts."""
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    assert family_of(tiny_qwen2_vl(decoder_layers=1)).positions(text) is None
    llava = {**text, "pixel_values": torch.zeros(1, 3, 8, 8)}
    assert family_of(tiny_llava(decoder_layers=1)).positions(llava) is None


@torch.no_grad()
def test_positions_of_the_callers_own_are_the_ones_that_count() -> None:
    model = tiny_qwen2_vl(encoder_layers=1, decoder_layers=1)
    batch = qwen_inputs(model, [[3, ("image", 8, 8), 2]])
    own = torch.arange(batch["input_ids"].shape[1]).flip(0)[None]
    stock, computed = model(**batch, position_ids=own).logits, model(**batch).logits
    assert not torch.allclose(computed, stock, atol=1e-4)
    with luvc_fx.applied(model, Schedule(), inner="eager"):
        got = model(**batch, position_ids=own).logits
    torch.testing.assert_close(got, stock, atol=1e-5, rtol=1e-5)
