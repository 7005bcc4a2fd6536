"""The oracle of packed and tiled towers against the stock models, and against masks in place of drops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.models_anyres import anyres_inputs, tiny_llava_next, tiny_onevision
from tests.support.models_qwen import qwen_inputs, tiny_qwen2_5_vl, tiny_qwen2_vl, tiny_qwen3_vl
from tests.support.oracle import (
    encoder_blocks,
    generate_positions,
    oracle_continue,
    oracle_forward,
    oracle_generate,
    oracle_greedy,
    schedules,
    tile_counts,
    visual_rows,
)

MAKERS = {
    "qwen2": tiny_qwen2_vl,
    "qwen2.5": tiny_qwen2_5_vl,
    "qwen3": tiny_qwen3_vl,
    "onevision": tiny_onevision,
    "next": tiny_llava_next,
}
QWEN = {
    "an image": [[3, ("image", 8, 6), 4]],
    "two rows, padding": [[3, ("image", 4, 6), 4], [1, ("image", 6, 4), 3]],
    "images of two sizes": [[2, ("image", 8, 4), 1, ("image", 4, 4), 3]],
    "a video": [[2, ("video", 3, 4, 6), 2]],
    "image and video": [
        [2, ("image", 4, 6), 3, ("video", 2, 4, 4), 2],
        [3, ("video", 2, 4, 4), 3, ("image", 6, 4), 5],
    ],
}
ANYRES = {
    "an image": [[3, ("image", 30, 44), 4]],
    "rows of other sizes, padding": [[3, ("image", 80, 100), 4], [1, ("image", 40, 50), 3]],
    "two images": [[2, ("image", 20, 30), 1, ("image", 70, 30), 3]],
    "two images, two rows, padding": [
        [2, ("image", 20, 50), ("image", 50, 20), 3],
        [1, ("image", 50, 20), ("image", 20, 50), 2],
    ],
}
VIDEO = {
    "a video": [[2, ("video", 3), 2]],
    "image and video": [[2, ("image", 30, 40), 3, ("video", 2), 2], [1, ("video", 2), ("image", 30, 40), 1]],
}
PROMPTS: dict[str, dict[str, Any]] = {
    "qwen2": QWEN,
    "qwen2.5": QWEN,
    "qwen3": QWEN,
    "onevision": {**ANYRES, **VIDEO},
    "next": ANYRES,
}
CASES = [(family, name) for family, prompts in PROMPTS.items() for name in prompts]
PRUNES = (Prune(keep=0.5, layer=1), Prune(tokens=2, layer=2, selector="random"), Prune(keep=0.0, layer=-1))
MIXED = Schedule(merge=(Merge("width", keep=0.5, layer=0), Merge("height", keep=0.75, layer=1)), prune=PRUNES)


@cache
def build(family: str, **options: Any) -> nn.Module:
    """A tiny model; do not change it."""
    return MAKERS[family](**options)


def prompt(family: str, rows: Sequence[Sequence[Any]], seed: int = 0) -> dict[str, Tensor]:
    """What the family's processor would give the model."""
    made = qwen_inputs if family.startswith("qwen") else anyres_inputs
    return made(build(family), rows, seed)


def schedule_for(family: str) -> Schedule:
    """`MIXED`, without merges where they are not defined."""
    return Schedule(prune=PRUNES) if family == "qwen2.5" else MIXED


def alike(family: str, name: str) -> list[list[Any]]:
    """The rows of a prompt, all with the images of the first: merges leave others other counts."""
    first = PROMPTS[family][name][0]
    return [[*[1] * row, *first, *[1] * row] for row in range(len(PROMPTS[family][name]))]


def visual(model: nn.Module, ids: Tensor) -> Tensor:
    """Which of `ids` are placeholders."""
    return (ids == model.config.image_token_id) | (ids == getattr(model.config, "video_token_id", -1))


# ----------------------------------------------------------------------- nothing to do: stock model


@pytest.mark.parametrize(("family", "name"), CASES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_without_sites_it_is_the_stock_forward(family: str, name: str, attn: str) -> None:
    model = build(family, attn=attn)
    batch = prompt(family, PROMPTS[family][name])
    real = batch["attention_mask"].bool()
    stock = model(**batch)
    result = oracle_forward(model, Schedule(), **batch)
    assert float((result.logits - stock.logits)[real].abs().max()) < 2e-5
    assert result.gap == math.inf and float(stock.logits[real].std()) > 0.1
    for mine, theirs in zip(result.cache.layers, stock.past_key_values.layers, strict=True):
        assert float((mine.keys - theirs.keys).abs().amax(dim=(1, 3))[real].max()) < 2e-5


@pytest.mark.parametrize(("family", "name"), CASES)
def test_without_sites_it_is_the_stock_generate(family: str, name: str) -> None:
    model = build(family)
    batch = prompt(family, PROMPTS[family][name])
    stock = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert torch.equal(oracle_generate(model, Schedule(), 8, **batch), stock)


@pytest.mark.parametrize(("family", "name"), CASES)
@torch.no_grad()
def test_a_second_turn_of_text_is_the_stock_one(family: str, name: str) -> None:
    model = build(family)
    batch = prompt(family, PROMPTS[family][name])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**batch, max_new_tokens=3, **options)
    new = torch.randint(5, 90, (len(ids), 4), generator=torch.Generator().manual_seed(1))
    whole = torch.cat([first.sequences, new], dim=1)
    seen = torch.cat([mask, mask.new_ones(len(ids), whole.shape[1] - ids.shape[1])], dim=1)
    second = model.generate(
        input_ids=whole,
        attention_mask=seen,
        past_key_values=first.past_key_values,
        max_new_tokens=5,
        output_logits=True,
        **options,
    )
    own = {} if family.startswith("qwen") else {"position_ids": generate_positions(mask)}
    result = oracle_forward(model, Schedule(), **batch, **own)
    tokens = oracle_greedy(model, result, 3)
    assert torch.equal(first.sequences[:, ids.shape[1] :], tokens)
    turn = oracle_forward(model, Schedule(), input_ids=torch.cat([tokens[:, -1:], new], 1), past=result.state)
    assert float((turn.logits[:, -1] - second.logits[0]).abs().max()) < 2e-5
    assert torch.equal(second.sequences[:, whole.shape[1] :], oracle_greedy(model, turn, 5))


@pytest.mark.parametrize(("family", "name"), CASES)
@torch.no_grad()
def test_images_in_the_second_turn_are_the_whole_prompt_at_once(family: str, name: str) -> None:
    model = build(family)
    rows = alike(family, name)[:1]
    batch = prompt(family, rows)
    new = torch.randint(5, 90, (1, 4), generator=torch.Generator().manual_seed(2))
    whole = {**batch, "input_ids": torch.cat([new, batch["input_ids"]], dim=1)}
    for key, filled in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in batch:
            whole[key] = torch.cat([torch.full_like(new, filled), batch[key]], dim=1)
    head = oracle_forward(model, Schedule(), input_ids=new)
    for schedule in (Schedule(), schedule_for(family)):
        tail = oracle_forward(model, schedule, past=head.state, **batch)
        if not schedule.prune:
            assert float((tail.logits - model(**whole).logits[:, 4:]).abs().max()) < 2e-5
        once = oracle_forward(model, schedule, **whole)
        assert float((tail.logits - once.logits[:, 4:]).abs().max()) < 2e-5
        assert torch.equal(tail.state.next_position, once.state.next_position)


@pytest.mark.parametrize("family", MAKERS)
@torch.no_grad()
def test_a_prompt_of_text_alone(family: str) -> None:
    model, ids = build(family), torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    result = oracle_forward(model, MIXED, input_ids=ids, attention_mask=mask)
    stock = model(input_ids=ids, attention_mask=mask).logits
    assert float((result.logits - stock)[mask.bool()].abs().max()) < 2e-5
    assert result.tokens_per_layer == [0] * 4
    tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(oracle_generate(model, MIXED, 6, input_ids=ids, attention_mask=mask), tokens)


# ------------------------------------------------------------------------------- what a budget does


@pytest.mark.parametrize(("family", "name"), CASES)
@torch.no_grad()
def test_two_turns_equal_a_cache_free_pass_with_masks(family: str, name: str) -> None:
    """The rows at the fusion and the new tokens together, nothing dropped, only hidden by masks."""
    model = build(family)
    batch = prompt(family, alike(family, name))
    schedule = schedule_for(family)
    result = oracle_forward(model, schedule, **batch)
    assert result.gap > 1e-6
    vision = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    tokens = visual_rows(model, schedule, batch["input_ids"], vision, [])
    assert tokens is not None and torch.equal(tokens.features, result.features)
    rows = result.layer_rows[0]
    size, (short, length) = len(rows), (rows.shape[1], 7)
    new = torch.randint(5, 90, (size, length), generator=torch.Generator().manual_seed(5))
    ids = batch["input_ids"].gather(1, rows)
    hidden = model.get_input_embeddings()(torch.cat([ids, new], dim=1))
    seen = torch.cat([visual(model, ids), torch.zeros(size, length, dtype=torch.bool)], dim=1)
    hidden = hidden.masked_scatter(seen[..., None], tokens.features)
    decoder = model.model.language_model
    if family.startswith("qwen"):
        grids = {k: v for k, v in vision.items() if not k.startswith("pixel")}
        where, _ = model.model.get_rope_index(
            batch["input_ids"], attention_mask=batch["attention_mask"], **grids
        )
        after = where.amax(dim=(0, 2))[:, None] + 1 + torch.arange(length)
        where = torch.cat([where[:, torch.arange(size)[:, None], rows], after.expand(3, -1, -1)], dim=2)
    else:
        after = batch["input_ids"].shape[1] + torch.arange(length)
        where = torch.cat([rows, after.expand(size, -1)], dim=1)
    pads = batch["attention_mask"].gather(1, rows).bool()
    causal, own = torch.ones(2 * [short + length], dtype=torch.bool).tril(), torch.eye(short + length).bool()
    for layer, module in enumerate(decoder.layers):
        alive = torch.stack([torch.isin(rows[b], result.layer_rows[layer][b]) for b in range(size)])
        keys = torch.cat([alive & pads, torch.ones(size, length, dtype=torch.bool)], dim=1)
        hidden = module(
            hidden,
            attention_mask=((causal & keys[:, None]) | own)[:, None],
            position_embeddings=decoder.rotary_emb(hidden, position_ids=where),
        )
        if layer < len(tokens.deep):
            hidden[seen] += tokens.deep[layer].flatten(0, 1)
    reference = model.lm_head(decoder.norm(hidden))[:, short:]
    first = oracle_continue(model, result.state, new[:, :3])
    second = oracle_continue(model, result.state, new[:, 3:])
    assert float((torch.cat([first, second], dim=1) - reference).abs().max()) < 5e-5
    assert result.kv_lengths == [short - tokens.features.shape[1] + n for n in result.tokens_per_layer]


def strategy(family: str, model: nn.Module, rows: Sequence[Sequence[Any]], batch: dict[str, Tensor]) -> Any:
    """Schedules that are defined for a prompt whose rows all have the same images and videos."""
    blocks = encoder_blocks(model)
    if family.startswith("qwen"):
        grids = [item[-2:] for item in rows[0] if not isinstance(item, int) for _ in range(frames(item))]
        options = {"qwen2": {}, "qwen2.5": {"merges": 0}, "qwen3": {"last": 1}}[family]
        return schedules(blocks, layers=4, unit=2, ragged=True, grids=grids, **options)

    def fused(merges: tuple[Merge, ...]) -> int:
        return sum(tile_counts(model, merges, batch)) // len(rows)

    return schedules(blocks, layers=4, grids=[(6, 6)], fused=fused)


def frames(item: tuple[Any, ...]) -> int:
    """How many grids an image or a video has."""
    return item[1] if item[0] == "video" else 1


@pytest.mark.parametrize(("family", "name"), CASES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_counts_rows_and_positions_follow_any_schedule(family: str, name: str, data: st.DataObject) -> None:
    model, rows = build(family), alike(family, name)
    batch = prompt(family, rows)
    schedule = data.draw(strategy(family, model, rows, batch))
    result = oracle_forward(model, schedule, **batch)
    ids = batch["input_ids"]
    text = int((~visual(model, ids[0])).sum())
    assert result.kv_lengths == [text + n for n in result.tokens_per_layer]
    fused = result.features.shape[1]
    expected = [fused] * 4
    for layer, prune in schedule.prunes_at(4, fused):
        expected[layer:] = [prune.count(fused)] * (4 - layer)
    assert result.tokens_per_layer == expected
    full = torch.arange(ids.shape[1])
    for b in range(len(ids)):
        kept = result.rows[b]
        assert torch.equal(kept[~result.visual[b]], full[~visual(model, ids[b])])
        assert bool(visual(model, ids[b, kept[result.visual[b]]]).all()) and kept.unique().numel() == len(
            kept
        )
        assert result.slots[b].unique().numel() == fused
    if family.startswith("qwen"):
        grids = {k: v for k, v in batch.items() if not k.startswith(("pixel", "input_ids"))}
        where, _ = model.model.get_rope_index(ids, **grids)
        at = torch.arange(len(ids))[:, None]
        assert torch.equal(result.position_ids, where[:, at, result.rows])
    else:
        assert torch.equal(result.position_ids, result.rows)
    assert bool(result.logits[result.mask].isfinite().all())


@pytest.mark.parametrize("family", MAKERS)
def test_gaps_are_comfortable_for_ordinary_schedules(family: str) -> None:
    rows = PROMPTS[family]["an image"]
    batches = [prompt(family, rows, seed) for seed in range(10)]
    gaps = [oracle_forward(build(family), schedule_for(family), **b).gap for b in batches]
    assert sum(gap > 1e-5 for gap in gaps) >= 9


@pytest.mark.parametrize("family", MAKERS)
def test_rows_need_as_many_visual_tokens_as_the_others(family: str) -> None:
    model = build(family)
    rows = {"q": [[9, ("image", 4, 4)], [("image", 8, 4)]]}.get(
        family[0], [[("image", 20, 50)], [("image", 50, 20)]]
    )
    batch = prompt(family, rows)
    with pytest.raises(ValueError, match="every row needs as many"):
        oracle_forward(model, schedule_for(family), **batch)
