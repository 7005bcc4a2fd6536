"""Rows without images in a batch: their left padding goes where the others' visual tokens go.

Each row equals the oracle of that row alone, without padding or neighbours.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule
from luvc_fx.report import Reason
from tests.support.cases import slow_unless
from tests.support.family_matrix import FAMILIES, Batch
from tests.support.oracle import OracleResult, oracle_continue, oracle_forward, oracle_greedy
from tests.support.oracle.positions import generate_positions

NEW_TOKENS = 6
BOTH = Schedule(
    merge=(Merge("width", keep=0.5, layer=0), Merge("height", keep=0.75, layer=1)),
    prune=(Prune(keep=0.5, layer=1), Prune(keep=0.25, layer=2)),
)
PRUNES = Schedule(prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1)))
FASTV = Schedule(prune=Prune(keep=0.5, layer=2, selector="fastv", coverage="global"))

IMAGES = [[3, ("image", 8, 8), 9], [5], [1, ("image", 8, 8), 4]]
VIDEO = [[4], [2, ("image", 4, 8), 3, ("video", 2, 8, 4), 2]]
TILES = [[3, ("image", 16, 32), 4], [6]]
CASES = {
    "qwen2": (IMAGES, BOTH),
    "qwen2, image and video": (VIDEO, BOTH),
    "qwen2, none at the last": (IMAGES, PRUNES),
    "qwen2.5": (IMAGES, PRUNES),
    "qwen3": (IMAGES, Schedule(merge=BOTH.merge[:1], prune=BOTH.prune)),
    "onevision": (TILES, BOTH),
    "next": (TILES, BOTH),
}


def alone(batch: Batch, spec: list[list[Any]]) -> list[Batch]:
    """Each row as a prompt of its own."""
    found = []
    for number, row in enumerate(spec):
        real = batch["attention_mask"][number].bool()
        ids = batch["input_ids"][number][real][None]
        one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in batch:
            one["mm_token_type_ids"] = batch["mm_token_type_ids"][number][real][None]
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            first = sum(isinstance(item, tuple) and item[0] == kind for r in spec[:number] for item in r)
            mine = sum(isinstance(item, tuple) and item[0] == kind for item in row)
            grid = f"{kind}_grid_thw"
            if mine and grid in batch:
                sizes = batch[grid].prod(-1).tolist()
                start = sum(sizes[:first])
                one[pixels] = batch[pixels][start : start + sum(sizes[first : first + mine])]
                one[grid] = batch[grid][first : first + mine]
            elif mine:
                one[pixels] = batch[pixels][first : first + mine]
                one["image_sizes"] = batch["image_sizes"][first : first + mine]
                if "batch_num_images" in batch:
                    one["batch_num_images"] = torch.tensor([mine])
        found.append(one)
    return found


def wanted(model: Any, schedule: Schedule, batch: Batch, spec: list[list[Any]]) -> list[OracleResult]:
    return [
        oracle_forward(model, schedule if any(map(is_pixels, one)) else Schedule(), **one)
        for one in alone(batch, spec)
    ]


def is_pixels(name: str) -> bool:
    return name.startswith("pixel")


@pytest.mark.parametrize("case", slow_unless(CASES, ["qwen2"]))
@torch.no_grad()
def test_each_row_is_what_it_is_alone(case: str) -> None:
    family, (spec, schedule) = case.split(",")[0], CASES[case]
    model = luvc_fx.prepare(FAMILIES[family].make(**FAMILIES[family].size))
    batch = FAMILIES[family].prompt(model, spec, 0, 0)
    own = (
        {} if "mm_token_type_ids" in batch else {"position_ids": generate_positions(batch["attention_mask"])}
    )
    alike = wanted(model, schedule, batch, spec)
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        out = model(**batch, **own)
        said = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        report = luvc_fx.report_of(model)
    assert [graph.kind for graph in report.graphs] == [
        *(len(report.of_kind("vision")) * ["vision"]),
        *("prefill", "prefill", "decode", "decode"),
    ]
    assert out.logits.shape[1] < batch["input_ids"].shape[1]
    for number, want in enumerate(alike):
        rows = want.logits.shape[1]
        torch.testing.assert_close(out.logits[number, -rows:], want.logits[0], atol=2e-5, rtol=1e-5)
        padding = int((batch["attention_mask"][number] == 0).sum())
        assert torch.equal(out.row_index[number, -rows:], want.rows[0] + padding)
        assert torch.equal(said[number, -NEW_TOKENS:], oracle_greedy(model, want, NEW_TOKENS)[0])


@pytest.mark.parametrize(
    ("kind", "attn"),
    slow_unless(
        itertools.product([DynamicCache, StaticCache], ["sdpa", "eager"]),
        [(StaticCache, "eager")],
    ),
)
@torch.no_grad()
def test_two_turns(kind: type[Any], attn: str) -> None:
    model = FAMILIES["qwen2"].make(**FAMILIES["qwen2"].size, attn=attn)
    batch = FAMILIES["qwen2"].prompt(model, IMAGES, 0, 0)
    alike = wanted(model, BOTH, batch, IMAGES)
    first = torch.cat([oracle_greedy(model, want, NEW_TOKENS) for want in alike])
    room = {"max_cache_len": 96} if kind is StaticCache else {}
    cache = kind(config=model.config.get_text_config(), **room)
    turn = torch.tensor([[7, 9, 11], [8, 10, 12], [13, 14, 15]])
    with luvc_fx.applied(model, BOTH, inner="eager", strict=True):
        said = model.generate(**batch, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(said[:, -NEW_TOKENS:], first)
        whole = torch.cat([said, turn], dim=1)
        more = whole.shape[1] - batch["input_ids"].shape[1]
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, more), value=1)
        out = model.generate(
            input_ids=whole,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    for number, want in enumerate(alike):
        asked = torch.cat([said[number : number + 1, -1:], turn[number : number + 1]], dim=1)
        logits = oracle_continue(model, want.state, asked)[0, -1]
        torch.testing.assert_close(out.logits[0][number], logits, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_fastv_does_not_look_at_stand_ins() -> None:
    """In a row without images it ranks padding, to which nobody pays: the other rows do not notice."""
    model = FAMILIES["qwen2"].make(**FAMILIES["qwen2"].size)
    batch = FAMILIES["qwen2"].prompt(model, IMAGES, 0, 0)
    with luvc_fx.applied(model, FASTV, inner="eager", strict=True):
        out = model(**batch)
        for number, one in enumerate(alone(batch, IMAGES)):
            by_itself = model(**one).logits[0]
            torch.testing.assert_close(out.logits[number, -len(by_itself) :], by_itself, atol=2e-5, rtol=1e-5)


REFUSED = {
    "too little padding": ([[3, ("image", 8, 8), 2], [12]], "left padding of 11 where .* have 16 tokens"),
    "one image and two": (
        [[2, ("image", 8, 8), 1], [("image", 8, 8), ("image", 8, 8), 1]],
        "different numbers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@torch.no_grad()
def test_other_batches_are_left_alone_with_a_reason(case: str) -> None:
    spec, text = REFUSED[case]
    model = luvc_fx.prepare(FAMILIES["qwen2"].make(**FAMILIES["qwen2"].size))
    batch = FAMILIES["qwen2"].prompt(model, spec, 0, 0)
    stock: Tensor = model(**batch).logits
    with (
        luvc_fx.applied(model, PRUNES, inner="eager"),
        pytest.warns(LuvcWarning, match=text),
    ):
        out = model(**batch)
        (refusal,) = luvc_fx.report_of(model).refusals
    assert refusal.reason is Reason.UNEVEN_BATCH
    torch.testing.assert_close(out.logits, stock, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_beams_beside_rows_without_images_are_left_alone() -> None:
    model = luvc_fx.prepare(FAMILIES["qwen2"].make(**FAMILIES["qwen2"].size))
    batch = FAMILIES["qwen2"].prompt(model, IMAGES, 0, 0)
    beams = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    stock = model.generate(**batch, **beams)
    with (
        luvc_fx.applied(model, BOTH, inner="eager"),
        pytest.warns(LuvcWarning, match="uneven-batch: num_beams .* beside rows without images"),
    ):
        assert torch.equal(model.generate(**batch, **beams), stock)
