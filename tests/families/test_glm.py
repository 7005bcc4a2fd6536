"""GLM-4.1V: a tower that nothing here was written for, whose merges are the oracle's."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from tests.support.cases import GAP, slow_unless
from tests.support.models_foreign import tower_that_computes_with_its_grid
from tests.support.models_qwen import Item, qwen_inputs
from tests.support.oracle import encoder_blocks, oracle_forward, oracle_generate, schedules
from tests.support.replay import assert_close, examples

NEW_TOKENS = 6
TOLERANCE = 2e-5

PROMPTS: dict[str, tuple[list[list[Item]], list[tuple[int, int]]]] = {
    "images of two sizes": ([[3, ("image", 8, 4), 2, ("image", 4, 12), 4]], [(8, 4), (4, 12)]),
    "two rows, left padding": ([[3, ("image", 8, 8), 4], [1, ("image", 8, 8), 3]], [(8, 8)]),
}
"""Rows of a prompt, and the patch grids of their images."""

SCHEDULES = {
    "merge": Schedule(merge=Merge("width", keep=0.5, layer=0)),
    "merge by keys": Schedule(
        merge=(Merge("width", keep=0.5, layer=0), Merge("height", keep=0.5, layer=1, feature="keys"))
    ),
    "merge and prune": Schedule(
        merge=Merge("width", keep=0.5, layer=-1),
        prune=(Prune(keep=0.5, layer=1), Prune(keep=0.25, layer=-1, energy="ratio")),
    ),
}
CASES = [(prompt, name) for prompt in PROMPTS for name in SCHEDULES]


@cache
def glm() -> Any:
    return luvc_fx.prepare(tower_that_computes_with_its_grid()[0])


def prompt_of(name: str) -> dict[str, Tensor]:
    return qwen_inputs(glm(), PROMPTS[name][0])


def same_as_the_oracle(schedule: Schedule, batch: dict[str, Tensor]) -> None:
    """Logits, rows and counts of a forward."""
    want = oracle_forward(glm(), schedule, **batch)
    torch._dynamo.reset()
    with luvc_fx.applied(glm(), schedule, inner="eager", strict=True):
        out = glm()(**batch)
        report = luvc_fx.report_of(glm())
    assert report.tokens_per_layer() == want.tokens_per_layer
    assert torch.equal(out.row_index, want.rows)
    assert_close(out.logits[want.mask], want.logits[want.mask], TOLERANCE, "logits")


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_the_oracle_of_no_schedule_is_the_stock_model(prompt: str) -> None:
    batch = prompt_of(prompt)
    want = oracle_forward(glm(), Schedule(), **batch)
    assert_close(want.logits[want.mask], glm()(**batch).logits[want.mask], TOLERANCE, "logits")


@pytest.mark.parametrize(
    ("prompt", "name"),
    slow_unless(CASES, [("images of two sizes", "merge by keys")]),
)
@torch.no_grad()
def test_a_merge_is_the_oracle(prompt: str, name: str) -> None:
    batch = prompt_of(prompt)
    assert oracle_forward(glm(), SCHEDULES[name], **batch).gap >= GAP, "a tie, which shows nothing"
    same_as_the_oracle(SCHEDULES[name], batch)


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "name"), CASES)
@torch.no_grad()
def test_a_merge_generates_what_the_oracle_does(prompt: str, name: str) -> None:
    batch = prompt_of(prompt)
    want = oracle_generate(glm(), SCHEDULES[name], NEW_TOKENS, **batch)
    torch._dynamo.reset()
    with luvc_fx.applied(glm(), SCHEDULES[name], inner="eager", strict=True):
        got = glm().generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_any_schedule_is_the_oracle(prompt: str) -> None:
    batch, grids = prompt_of(prompt), PROMPTS[prompt][1]

    @settings(
        max_examples=examples(9), suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
    )
    @given(schedules(encoder_blocks(glm()), layers=3, grids=grids, unit=2))
    def check(schedule: Schedule) -> None:
        assume(oracle_forward(glm(), schedule, **batch).gap >= GAP)
        same_as_the_oracle(schedule, batch)

    check()
