"""The oracle against the stock model, against masks in place of drops, and hand-made cases."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IMAGE, inputs, rename_everything, tiny_llava
from oracle import (
    OracleResult,
    encode,
    encoder_blocks,
    energies,
    generate_positions,
    merge_grid,
    merge_line,
    oracle_continue,
    oracle_forward,
    oracle_generate,
    oracle_greedy,
    random_scores,
    schedules,
    score_gap,
    select,
)
from torch import Tensor, nn

from luvc_fx.schedule import Merge, Prune, Schedule

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


@cache
def llava(**options: Any) -> nn.Module:
    return tiny_llava(**options)


def relative_gap(first: Tensor, second: Tensor, mask: Tensor | None = None) -> float:
    """The largest difference over rows in `mask` [B, S]; logits here are of size 1."""
    difference = (first - second).abs().amax(dim=-1)
    return float(difference[mask.bool()].max() if mask is not None else difference.max())


# ----------------------------------------------------------------------- nothing to do: stock model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_without_sites_it_is_the_stock_forward(case: dict[str, Any], attn: str) -> None:
    model = llava(attn=attn)
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


@pytest.mark.parametrize("layer", [-1, -2, -4, 2])
def test_the_feature_layer_is_the_stock_one(layer: int) -> None:
    model = llava(vision_feature_layer=layer)
    assert encoder_blocks(model) == {-1: 4, -2: 3, -4: 1, 2: 2}[layer]
    batch = inputs(model)
    result = oracle_forward(model, Schedule(), **batch)
    stock = model.get_image_features(batch["pixel_values"]).pooler_output[0]
    assert relative_gap(result.features[0], stock) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_without_sites_it_is_the_stock_generate(case: dict[str, Any]) -> None:
    model = llava()
    batch = inputs(model, **case)
    stock = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert torch.equal(oracle_generate(model, Schedule(), 12, **batch), stock)


def test_explicit_positions_reach_the_stock_model_too() -> None:
    model = llava()
    batch = inputs(model, 2)
    positions = torch.arange(batch["input_ids"].shape[1]) * 2 + 7
    result = oracle_forward(model, Schedule(), **batch, position_ids=positions[None])
    stock = model(**batch, position_ids=positions[None])
    plain = model(**batch)
    assert relative_gap(result.logits, stock.logits) < 1e-5
    assert relative_gap(plain.logits, stock.logits) > 1e-2
    assert result.state.next_position.tolist() == [int(positions[-1]) + 1] * 2


def test_renamed_classes_change_nothing() -> None:
    model, renamed = llava(), rename_everything(tiny_llava())
    assert {type(m).__module__ for m in renamed.modules()} == {"nowhere"}
    batch = inputs(model, 2, padding=(0, 2))
    assert torch.equal(model(**batch).logits, renamed(**batch).logits)
    first, second = oracle_forward(model, MIXED, **batch), oracle_forward(renamed, MIXED, **batch)
    assert torch.equal(first.logits, second.logits)


# ---------------------------------------------------------------------------------- what is counted


def expected_counts(model: nn.Module, schedule: Schedule, images: int) -> list[int]:
    """Visual tokens per decoder layer, from the schedule alone."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    size = {"width": side, "height": side}
    for _, merge in schedule.merges_at(encoder_blocks(model)):
        size[merge.axis] = merge.target(size[merge.axis])
    fused = images * size["width"] * size["height"]
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


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_counts_and_rows_follow_the_schedule(data: st.DataObject) -> None:
    images = data.draw(st.integers(1, 2))
    model = llava(grid=6)
    schedule = data.draw(schedules(3, (6, 6), 4, images=images))
    batch = inputs(model, 2, padding=(0, 2), images=images)
    result = oracle_forward(model, schedule, **batch)
    counts = expected_counts(model, schedule, images)
    text = batch["input_ids"].shape[1] - images * 36
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


def test_a_token_that_did_not_merge_is_the_stock_one_and_sits_at_its_slot() -> None:
    model = llava()
    batch = inputs(model, 2, padding=(0, 3), images=2)
    schedule = Schedule(merge=(Merge("height", keep=0.75, layer=-1), Merge("width", 0.5, layer=-1)))
    tokens = encode(model, schedule, batch["pixel_values"], [])
    stock = torch.stack(model.get_image_features(batch["pixel_values"]).pooler_output)
    assert tokens.grid == (6, 4) and torch.equal(tokens.sizes.sum(dim=1), torch.full((4,), 64.0))
    alone = tokens.sizes == 1
    at = torch.arange(4)[:, None]
    assert 0 < int(alone.sum()) < alone.numel()
    assert relative_gap(tokens.features[alone][None], stock[at, tokens.slots][alone][None]) < 1e-5
    assert relative_gap(tokens.features[~alone][None], stock[at, tokens.slots][~alone][None]) > 0.1

    result = oracle_forward(model, schedule, **batch)
    assert torch.equal(result.features.reshape(4, 24, -1), tokens.features)
    for b in range(2):
        places = (batch["input_ids"][b] == IMAGE).nonzero()[:, 0]
        slots = torch.cat([tokens.slots[2 * b], 64 + tokens.slots[2 * b + 1]])
        assert torch.equal(result.slots[b], slots)
        assert torch.equal(result.rows[b][result.visual[b]], places[slots])


def test_gaps_are_comfortable_for_ordinary_schedules() -> None:
    model = llava()
    found = [score_gap(model, MIXED, **inputs(model, 2, seed=seed)) for seed in range(20)]
    assert sum(gap > 1e-5 for gap in found) >= 18


def test_colliding_sizes() -> None:
    model = llava(collide=True)
    batch = inputs(model, 4)
    text = model.config.text_config
    heads = text.num_attention_heads * text.head_dim
    assert heads == text.hidden_size == int((batch["input_ids"][0] == IMAGE).sum()) == 16
    assert text.vocab_size == text.intermediate_size == batch["input_ids"].shape[1] == 24
    result = oracle_forward(model, MIXED_SMALL, **batch)
    assert result.tokens_per_layer == [8, 4, 3, 0]
    check_rows(batch, result)


MIXED_SMALL = Schedule(
    merge=(Merge("width", keep=0.5, layer=1),),
    prune=(Prune(keep=0.5, layer=1), Prune(tokens=3, layer=2), Prune(keep=0.0, layer=3)),
)


# ------------------------------------------------------------------------------------- independence


def test_dropping_all_before_layer_0_is_the_text_alone() -> None:
    model = llava()
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


@pytest.mark.parametrize("selector", ["uniform", "random"])
def test_a_nan_in_a_dropped_row_cannot_reach_the_logits(selector: str) -> None:
    model = llava()
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
    assert planted == [32, 32]
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


@pytest.mark.parametrize("case", CASES)
def test_two_turns_equal_a_cache_free_pass_with_masks(case: dict[str, Any]) -> None:
    model = llava()
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


def test_a_text_turn_by_forward_and_an_image_in_the_second_turn() -> None:
    model = llava()
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


@pytest.mark.parametrize("case", CASES)
def test_generate_is_forward_and_continue(case: dict[str, Any]) -> None:
    model = llava()
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


# ------------------------------------------------------------------------------- the rules, by hand


def angles(*degrees: float) -> np.ndarray:
    """Unit vectors [n, 2] float32: the similarity of two is the cosine of their angle."""
    radians = np.radians(np.array(degrees))
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1).astype(np.float32)


def line(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(n, dtype=np.float32), np.arange(n)


def test_a_line_merges_its_best_proposals() -> None:
    # neighbours are 40, 10, 50, 20 degrees apart: 0 -> 1 (40), 2 -> 1 (10), 4 -> 3 (20)
    tokens = angles(0, 40, 50, 100, 120)
    gaps: list[float] = []
    out, sizes, slots = merge_line(tokens, *line(5), 2, gaps)
    assert slots.tolist() == [0, 1, 3]
    assert sizes.tolist() == [1, 2, 2]
    np.testing.assert_allclose(out[1], (tokens[1] + tokens[2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(out[2], (tokens[3] + tokens[4]) / 2, rtol=1e-6)
    cos = {d: math.cos(math.radians(d)) for d in (10, 20, 40, 50)}
    assert min(gaps) == pytest.approx(min(cos[20] - cos[40], cos[10] - cos[50]), abs=1e-6)


def test_two_proposals_to_one_token_and_weights() -> None:
    tokens = angles(0, 10, 20, 90)
    out, sizes, slots = merge_line(tokens, np.array([3, 1, 2, 1], dtype=np.float32), np.arange(4) + 7, 2, [])
    assert slots.tolist() == [8, 10]
    assert sizes.tolist() == [6, 1]
    mean = (3 * tokens[0] + tokens[1] + 2 * tokens[2]) / 6
    np.testing.assert_allclose(out, np.stack([mean, tokens[3]]), rtol=1e-6)


def test_ties_go_right_and_to_the_lower_index() -> None:
    same = np.ones((6, 2), dtype=np.float32)
    _, sizes, slots = merge_line(same, *line(6), 2, [])
    assert slots.tolist() == [1, 3, 4, 5]  # 0 -> 1 and 2 -> 3
    assert sizes.tolist() == [2, 2, 1, 1]
    _, sizes, slots = merge_line(same[:3], *line(3), 1, [])
    assert slots.tolist() == [1, 2]


def test_rounds_axes_and_carried_sizes() -> None:
    x = torch.randn(2, 5, 7, 3, generator=torch.Generator().manual_seed(0))
    slots = torch.arange(35).reshape(1, 5, 7).repeat(2, 1, 1)
    sizes = torch.ones(2, 5, 7)
    once = merge_grid(x, sizes, slots, "width", 2, [])
    steps = merge_grid(*merge_grid(x, sizes, slots, "width", 4, []), "width", 2, [])
    assert all(torch.equal(a, b) for a, b in zip(once, steps, strict=True))
    assert once[0].shape == (2, 5, 2, 3)
    assert torch.allclose(once[1].sum(dim=2), torch.full((2, 5), 7.0))
    weighted = (once[0] * once[1][..., None]).sum(dim=2)
    assert torch.allclose(weighted, x.sum(dim=2), atol=1e-5)
    assert (once[2] // 7 == torch.arange(5)[None, :, None]).all()  # a slot stays in its row
    flipped = merge_grid(x.transpose(1, 2), sizes.transpose(1, 2), slots.transpose(1, 2), "height", 2, [])
    assert all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(once, flipped, strict=True))
    half = merge_grid(x.bfloat16(), sizes, slots, "width", 3, [])
    assert half[0].dtype == torch.bfloat16


@pytest.mark.parametrize("count", [1, 2, 7, 24])
@pytest.mark.parametrize("cutoff", [0.01, 0.25, 1.0])
def test_energies_are_those_of_a_float32_fft(count: int, cutoff: float) -> None:
    x = torch.randn(2, count, 5, generator=torch.Generator().manual_seed(1))
    spectrum = torch.fft.rfft(x, dim=1)
    bins = spectrum.shape[1]
    passing = max(1, math.floor(cutoff * bins + 0.5))
    f = torch.arange(bins)
    window = torch.where(f < passing, 0.54 + 0.46 * torch.cos(math.pi * f / passing), 0.0)
    low = torch.fft.irfft(spectrum * window[None, :, None], n=count, dim=1)
    expected = {
        "lowpass": low.square().sum(-1),
        "residual": (x - low).square().sum(-1),
        "ratio": low.square().sum(-1) / x.square().sum(-1),
    }
    for energy, value in expected.items():
        got = torch.from_numpy(energies(x, energy, cutoff)).float()
        assert torch.allclose(got, value, rtol=1e-4, atol=1e-5)


def test_murmur_finaliser_and_streams() -> None:
    from oracle import mix32

    assert [mix32(i) for i in (0, 1, 2)] == [0, 0x514E28B7, 0x30F4C306]
    scores = random_scores(64, 0, 2)
    assert len(set(scores)) == 64 and all(0 <= s < 1 << 32 for s in scores)
    assert scores[0] == mix32(3 * 0x9E3779B9 % (1 << 32))
    assert scores != random_scores(64, 1, 2) != random_scores(64, 0, 3)


def test_uniform_and_blocks() -> None:
    x = torch.zeros(1, 16, 4)
    x[0, [5, 2, 8, 15], [0, 1, 2, 3]] = 1.0
    uniform = Prune(tokens=3, layer=0, selector="uniform")
    assert select(x, uniform, 3, 0, None, []).tolist() == [[2, 8, 13]]
    # the widest low-pass spreads each of them to its neighbours but leaves it the largest
    wide = {"energy": "lowpass", "cutoff": 1.0, "layer": 0}
    squares = select(x, Prune(tokens=4, **wide), 4, 0, (4, 4), [])
    assert squares.tolist() == [[2, 5, 8, 15]]  # one in each 2 x 2 corner, ascending
    runs = select(x, Prune(tokens=4, **wide), 4, 0, None, [])
    assert runs.tolist() == [[2, 5, 8, 15]]  # and one in each run of four
    crowd = torch.zeros(1, 16, 4)
    crowd[0, [1, 5, 10, 13], [0, 1, 2, 3]] = torch.tensor([1.0, 1.1, 1.2, 1.3])
    best = Prune(tokens=2, coverage="global", **wide)
    assert select(crowd, best, 2, 0, (4, 4), []).tolist() == [[10, 13]]
    assert select(crowd, Prune(tokens=2, **wide), 2, 0, None, []).tolist() == [[5, 13]]
    assert select(x, Prune(tokens=0, **wide), 0, 0, None, []).shape == (1, 0)
    assert select(x, Prune(tokens=16, **wide), 16, 0, None, []).tolist() == [list(range(16))]


def test_block_grids_of_two_images_are_stacked() -> None:
    x = torch.randn(1, 32, 3, generator=torch.Generator().manual_seed(2))
    prune = Prune(tokens=8, layer=0)
    chosen = select(x, prune, 8, 0, (4, 4), [])
    corners = [(int(i) // 4 // 2, int(i) % 4 // 2) for i in chosen[0]]
    assert sorted(corners) == [(row, column) for row in range(4) for column in range(2)]
    odd = select(x[:, :20], Prune(tokens=5, layer=0), 5, 0, (5, 4), [])
    assert [int(i) // 4 for i in odd[0]] == list(range(5))


def test_text_only_prompts_ignore_the_schedule() -> None:
    model = llava()
    ids = torch.randint(2, 90, (2, 6), generator=torch.Generator().manual_seed(3))
    result = oracle_forward(model, MIXED, input_ids=ids)
    assert relative_gap(result.logits, model(input_ids=ids).logits) < 1e-5
    assert result.tokens_per_layer == [0] * 4 and result.kept == {}
