"""The oracle against the stock model and against masks in place of drops, for every family."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.models import (
    IMAGE,
    inputs,
    patch_grid,
    patches_per_side,
    rename_everything,
    tiny_internvl,
    tiny_llava,
    visual_tokens,
)
from tests.support.oracle import (
    OracleResult,
    encoder_blocks,
    generate_positions,
    oracle_continue,
    oracle_forward,
    oracle_generate,
    oracle_greedy,
    schedules,
    score_gap,
)

MIXED = Schedule(
    merge=(Merge("width", keep=0.5, layer=0), Merge("height", length=5, layer=2)),
    prune=(
        Prune(keep=0.5, layer=1),
        Prune(tokens=3, layer=2, selector="random", seed=3),
        Prune(keep=0.0, layer=-1),
    ),
)
CASES = [
    {"batch": 1},
    {"batch": 2},
    {"batch": 2, "padding": (3, 0)},
    {"batch": 2, "images": 2, "padding": (0, 2)},
]


INTERNVL_CASES = [
    *CASES,
    {"batch": 1, "tiles": 3},
    {"batch": 2, "tiles": 2, "padding": (0, 3)},
    {"batch": 2, "images": 2, "tiles": (1, 3), "padding": (2, 0)},
]
FAMILY_CASES = [("llava", case) for case in CASES] + [("internvl", case) for case in INTERNVL_CASES]
FAMILIES = ["llava", "internvl"]


@cache
def build(family: str, **options: Any) -> nn.Module:
    """A tiny model; do not change it."""
    return {"llava": tiny_llava, "internvl": tiny_internvl}[family](**options)


def tiles_a_row(case: dict[str, Any]) -> int:
    """How many grids of `inputs(**case)` belong to one row."""
    images, tiles = case.get("images", 1), case.get("tiles", 1)
    return images * tiles if isinstance(tiles, int) else sum(tiles)


def relative_gap(first: Tensor, second: Tensor, mask: Tensor | None = None) -> float:
    """The largest difference over rows in `mask` [B, S]; logits here are of size 1."""
    difference = (first - second).abs().amax(dim=-1)
    return float(difference[mask.bool()].max() if mask is not None else difference.max())


# ----------------------------------------------------------------------- nothing to do: stock model


@pytest.mark.parametrize(("family", "case"), FAMILY_CASES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_without_sites_it_is_the_stock_forward(family: str, case: dict[str, Any], attn: str) -> None:
    model = build(family, attn=attn)
    batch = inputs(model, **case)
    result = oracle_forward(model, Schedule(), **batch)
    stock = model(**batch)
    assert relative_gap(result.logits, stock.logits, batch["attention_mask"]) < 1e-5
    for mine, theirs in zip(result.cache.layers, stock.past_key_values.layers, strict=True):
        real = batch["attention_mask"].bool()
        keys = (mine.keys - theirs.keys).abs().amax(dim=(1, 3))
        assert float(keys[real].max()) < 1e-5
    assert result.gap == math.inf
    assert torch.equal(result.rows, torch.arange(result.rows.shape[1]).expand_as(result.rows))
    assert torch.equal(result.mask, batch["attention_mask"].bool())


@pytest.mark.parametrize(("family", "case"), FAMILY_CASES)
def test_without_sites_it_is_the_stock_generate(family: str, case: dict[str, Any]) -> None:
    model = build(family)
    batch = inputs(model, **case)
    stock = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert torch.equal(oracle_generate(model, Schedule(), 12, **batch), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_explicit_positions_reach_the_stock_model_too(family: str) -> None:
    model = build(family)
    batch = inputs(model, 2)
    positions = torch.arange(batch["input_ids"].shape[1]) * 2 + 7
    result = oracle_forward(model, Schedule(), **batch, position_ids=positions[None])
    stock = model(**batch, position_ids=positions[None])
    plain = model(**batch)
    assert relative_gap(result.logits, stock.logits) < 1e-5
    assert relative_gap(plain.logits, stock.logits) > 1e-2
    assert result.state.next_position.tolist() == [int(positions[-1]) + 1] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_renamed_classes_change_nothing(family: str) -> None:
    model, renamed = build(family), rename_everything(build.__wrapped__(family))
    assert {type(m).__module__ for m in renamed.modules()} == {"nowhere"}
    batch = inputs(model, 2, padding=(0, 2))
    assert torch.equal(model(**batch).logits, renamed(**batch).logits)
    first, second = oracle_forward(model, MIXED, **batch), oracle_forward(renamed, MIXED, **batch)
    assert torch.equal(first.logits, second.logits)


# ---------------------------------------------------------------------------------- what is counted


def expected_counts(model: nn.Module, schedule: Schedule, grids: int) -> list[int]:
    """Visual tokens per decoder layer, from the schedule alone, for `grids` images or tiles a row."""
    unit = patches_per_side(model)
    size = dict(zip(("height", "width"), (side // unit for side in patch_grid(model)), strict=True))
    for _, merge in schedule.merges_at(encoder_blocks(model)):
        before = size[merge.axis]
        size[merge.axis] = (
            math.ceil(merge.length / unit)
            if merge.keep is None
            else max(1, math.floor(merge.keep * before + 0.5))
        )
        assert size[merge.axis] <= before
    fused = grids * size["width"] * size["height"]
    counts = [fused] * model.config.text_config.num_hidden_layers
    for layer, prune in schedule.prunes_at(len(counts), fused):
        counts[layer:] = [prune.count(fused)] * (len(counts) - layer)
    return counts


def check_rows(batch: dict[str, Tensor], result: OracleResult) -> None:
    """Text rows all kept, in order, with their positions; visual rows and ids belong together."""
    ids, full = batch["input_ids"], torch.arange(batch["input_ids"].shape[1])
    for b in range(len(ids)):
        text = full[ids[b] != IMAGE]
        assert torch.equal(result.rows[b][~result.visual[b]], text)
        assert (ids[b, result.rows[b][result.visual[b]]] == IMAGE).all()
        assert result.rows[b].unique().numel() == result.rows[b].numel()
        assert torch.equal(result.position_ids[b], result.rows[b])
        assert torch.equal(result.mask[b], batch["attention_mask"][b, result.rows[b]].bool())


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_counts_and_rows_follow_the_schedule(family: str, data: st.DataObject) -> None:
    side = {"llava": 6, "internvl": 8}[family]
    model = build(family, grid=side)
    case: dict[str, Any] = {"images": data.draw(st.integers(1, 2)), "padding": (0, 2)}
    if family == "internvl":
        case["tiles"] = data.draw(st.integers(1, 2))
    grids, unit = tiles_a_row(case), patches_per_side(model)
    schedule = data.draw(
        schedules(encoder_blocks(model), (side, side), 4, images=grids, unit=unit, ragged=True)
    )
    batch = inputs(model, 2, **case)
    result = oracle_forward(model, schedule, **batch)
    counts = expected_counts(model, schedule, grids)
    text = batch["input_ids"].shape[1] - grids * visual_tokens(model)
    assert result.tokens_per_layer == counts
    assert result.kv_lengths == [text + count for count in counts]
    assert [rows.shape[1] for rows in result.layer_rows] == result.kv_lengths
    assert result.logits.shape[:2] == result.rows.shape
    check_rows(batch, result)
    for layer, kept in result.kept.items():
        assert kept.shape == (2, counts[layer])
        assert (kept.diff(dim=1) > 0).all()
    assert result.logits[result.mask].isfinite().all()
    assert score_gap(model, schedule, **batch) == result.gap


@pytest.mark.parametrize("family", FAMILIES)
def test_gaps_are_comfortable_for_ordinary_schedules(family: str) -> None:
    model = build(family)
    found = [score_gap(model, MIXED, **inputs(model, 2, seed=seed)) for seed in range(20)]
    assert sum(gap > 1e-5 for gap in found) >= 18


@pytest.mark.parametrize("family", FAMILIES)
def test_colliding_sizes(family: str) -> None:
    model = build(family, collide=True)
    batch = inputs(model, 4)
    text, vision = model.config.text_config, model.config.vision_config
    heads = text.num_attention_heads * model.model.language_model.layers[0].self_attn.head_dim
    assert (
        heads == text.hidden_size == vision.hidden_size == int((batch["input_ids"][0] == IMAGE).sum()) == 16
    )
    assert text.vocab_size == text.intermediate_size == batch["input_ids"].shape[1] == 24
    if family == "internvl":
        assert math.prod(patch_grid(model)) == patches_per_side(model) ** 2 * vision.hidden_size == 64
    result = oracle_forward(model, MIXED_SMALL, **batch)
    assert result.tokens_per_layer == [8, 4, 3, 0]
    check_rows(batch, result)


MIXED_SMALL = Schedule(
    merge=(Merge("width", keep=0.5, layer=1),),
    prune=(Prune(keep=0.5, layer=1), Prune(tokens=3, layer=2), Prune(keep=0.0, layer=3)),
)


# ------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_all_before_layer_0_is_the_text_alone(family: str) -> None:
    model = build(family)
    batch = inputs(model, 2, padding=(0, 3))
    schedule = Schedule(merge=(Merge("width", keep=0.5, layer=0),), prune=(Prune(0.0, layer=0),))
    result = oracle_forward(model, schedule, **batch)
    keep = batch["input_ids"][0] != IMAGE
    assert torch.equal(batch["input_ids"][1] != IMAGE, keep)
    rows = torch.arange(len(keep))[keep]
    mask = batch["attention_mask"][:, rows]
    stock = model(
        input_ids=batch["input_ids"][:, rows],
        attention_mask=mask,
        position_ids=rows[None].expand(2, -1),
    )
    assert relative_gap(result.logits, stock.logits, mask) < 1e-5
    other = dict(batch, pixel_values=torch.randn_like(batch["pixel_values"]))
    assert torch.equal(oracle_forward(model, schedule, **other).logits, result.logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("selector", ["uniform", "random"])
def test_a_nan_in_a_dropped_row_cannot_reach_the_logits(family: str, selector: str) -> None:
    model = build(family)
    batch = inputs(model, 2, padding=(0, 3))
    schedule = Schedule(prune=(Prune(0.5, layer=2, selector=selector),))
    result = oracle_forward(model, schedule, **batch)
    planted = []

    def plant(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.clone()
        for b in range(2):
            gone = ~torch.isin(torch.arange(output.shape[1]), result.rows[b])
            planted.append(int(gone.sum()))
            output[b, gone] = math.nan
        return output

    hook = model.model.language_model.layers[1].register_forward_hook(plant)
    try:
        poisoned = oracle_forward(model, schedule, **batch)
    finally:
        hook.remove()
    assert planted == [visual_tokens(model) // 2] * 2
    assert torch.equal(poisoned.logits, result.logits)


@torch.no_grad()
def cache_free(model: nn.Module, prompt: dict[str, Tensor], result: OracleResult, new: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] of `new` [B, T] with nothing dropped, only hidden by masks.

    The rows at the fusion (`result.layer_rows[0]` where layer 0 has no prune) and the new tokens
    run together, without a cache, through all layers; a layer sees the keys that the oracle kept.
    """
    assert 0 not in result.kept
    decoder = model.model.language_model
    rows = result.layer_rows[0]
    batch, short = rows.shape
    length = new.shape[1]
    prompt_hidden = model.get_input_embeddings()(prompt["input_ids"].gather(1, rows))
    visual = prompt["input_ids"].gather(1, rows) == IMAGE
    prompt_hidden = prompt_hidden.masked_scatter(visual[..., None], result.features)
    hidden = torch.cat([prompt_hidden, model.get_input_embeddings()(new)], dim=1)
    size = prompt["input_ids"].shape[1]
    positions = torch.cat([rows, torch.arange(size, size + length).expand(batch, -1)], dim=1)
    pads = prompt["attention_mask"].gather(1, rows).bool()
    causal = torch.ones(short + length, short + length, dtype=torch.bool).tril()
    own = torch.eye(short + length, dtype=torch.bool)
    for layer, module in enumerate(decoder.layers):
        alive = torch.stack([torch.isin(rows[b], result.layer_rows[layer][b]) for b in range(batch)])
        seen = torch.cat([alive & pads, torch.ones(batch, length, dtype=torch.bool)], dim=1)
        mask = (causal & seen[:, None, :]) | own
        hidden = module(
            hidden,
            attention_mask=mask[:, None],
            position_embeddings=decoder.rotary_emb(hidden, position_ids=positions),
        )
    return model.lm_head(decoder.norm(hidden))[:, short:]


@pytest.mark.parametrize(("family", "case"), FAMILY_CASES)
def test_two_turns_equal_a_cache_free_pass_with_masks(family: str, case: dict[str, Any]) -> None:
    model = build(family)
    batch = inputs(model, **case)
    result = oracle_forward(model, MIXED, **batch)
    before = result.state.clone()
    new = torch.randint(2, 90, (case["batch"], 11), generator=torch.Generator().manual_seed(5))
    first = oracle_continue(model, result.state, new[:, :1])
    second = oracle_continue(model, result.state, new[:, 1:6])
    third = oracle_continue(model, result.state, new[:, 6:])
    reference = cache_free(model, batch, result, new)
    assert relative_gap(torch.cat([first, second, third], dim=1), reference) < 2e-5
    assert [layer.keys.shape[-2] for layer in result.cache.layers] == [
        length + 11 for length in result.kv_lengths
    ]
    assert (result.state.next_position == batch["input_ids"].shape[1] + 11).all()
    # the clone was not touched, and one turn of all tokens says the same
    assert relative_gap(oracle_continue(model, before, new), reference) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_turn_by_forward_and_an_image_in_the_second_turn(family: str) -> None:
    model = build(family)
    batch = inputs(model, 2)
    result = oracle_forward(model, MIXED, **batch)
    lengths = list(result.kv_lengths)
    new = torch.full((2, 4), 9)
    turn = oracle_forward(model, MIXED, input_ids=new, past=result.state)
    assert [layer.keys.shape[-2] for layer in result.cache.layers] == lengths
    assert torch.equal(turn.logits, oracle_continue(model, result.state.clone(), new))
    # text first, then the image with no site, is the whole prompt at once
    ids = torch.cat([new, batch["input_ids"]], dim=1)
    whole = oracle_forward(model, Schedule(), input_ids=ids, pixel_values=batch["pixel_values"])
    head = oracle_forward(model, Schedule(), input_ids=new)
    tail = oracle_forward(model, Schedule(), **batch, past=head.state)
    assert relative_gap(tail.logits, whole.logits[:, 4:]) < 1e-5
    pruned = oracle_forward(model, MIXED, **batch, past=head.state)
    assert pruned.kv_lengths == [length + 4 for length in lengths]


@pytest.mark.parametrize(("family", "case"), FAMILY_CASES)
def test_generate_is_forward_and_continue(family: str, case: dict[str, Any]) -> None:
    model = build(family)
    batch = inputs(model, **case)
    tokens = oracle_generate(model, MIXED, 6, **batch)
    positions = generate_positions(batch["attention_mask"])
    result = oracle_forward(model, MIXED, **batch, position_ids=positions)
    assert torch.equal(result.state.next_position, batch["attention_mask"].sum(dim=1))
    length = batch["input_ids"].shape[1]
    assert torch.equal(tokens[:, :length], batch["input_ids"])
    assert torch.equal(tokens[:, length], result.logits[:, -1].argmax(dim=-1))
    twin = oracle_forward(model, MIXED, **batch, position_ids=positions)
    assert torch.equal(tokens[:, length:], oracle_greedy(model, twin, 6))
    logits = oracle_continue(model, result.state, tokens[:, length:-1])
    assert torch.equal(tokens[:, length + 1 :], logits.argmax(dim=-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only_prompts_ignore_the_schedule(family: str) -> None:
    model = build(family)
    ids = torch.randint(2, 90, (2, 6), generator=torch.Generator().manual_seed(3))
    result = oracle_forward(model, MIXED, input_ids=ids)
    assert relative_gap(result.logits, model(input_ids=ids).logits) < 1e-5
    assert result.tokens_per_layer == [0] * 4 and result.kept == {}
