"""Promise 2 through `luvc_fx.compile` and `generate`: any schedule, token for token the oracle's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

import luvc_fx
from luvc_fx.schedule import Schedule
from tests.support.cases import GAP, INDUCTOR, SMALL, size_for, slow_unless
from tests.support.oracle import oracle_forward, oracle_generate, schedules
from tests.support.replay import examples, llava, prompt

NEW_TOKENS = 4


def generated(model: Any, schedule: Schedule, inner: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with luvc_fx.applied(model, schedule, inner=inner, strict=True):
        output = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        planned = luvc_fx.report_of(model).tokens_per_layer()
    wanted = oracle_forward(model, schedule, **batch).tokens_per_layer
    assert planned == wanted
    return output


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"batch": 2, "padding": (0, 3)}, marks=pytest.mark.slow),
        pytest.param({"batch": 2, "images": 2}, marks=pytest.mark.slow),
    ],
    ids=["one row", "left padding", "two images a row"],
)
@torch.no_grad()
def test_any_schedule_generates_what_the_oracle_does(options: dict[str, Any]) -> None:
    model, batch = llava(**dict(SMALL)), prompt(**options, model=SMALL)
    drawn = {"all": 0, "close": 0}

    @settings(
        max_examples=examples(16),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(schedules(blocks=2, grid=(4, 4), layers=2, images=options.get("images", 1)))
    def check(schedule: Schedule) -> None:
        gap = oracle_forward(model, schedule, **batch).gap
        drawn["all"] += 1
        drawn["close"] += gap < GAP
        assume(gap >= GAP)
        torch._dynamo.reset()
        wanted = oracle_generate(model, schedule, NEW_TOKENS, **batch)
        assert torch.equal(generated(model, schedule, "eager", batch), wanted)

    check()
    assert drawn["close"] <= 0.3 * drawn["all"], f"too many ties: {drawn}"


@pytest.mark.parametrize("name", slow_unless(INDUCTOR, ["random and uniform"]))
@torch.no_grad()
def test_inductor_generates_what_the_oracle_does(name: str) -> None:
    size = size_for(name)
    model, batch = llava(**dict(size)), prompt(batch=2, padding=(2, 0), model=size)
    schedule = INDUCTOR[name]
    assert oracle_forward(model, schedule, **batch).gap >= GAP
    wanted = oracle_generate(model, schedule, NEW_TOKENS, **batch)
    assert torch.equal(generated(model, schedule, "inductor", batch), wanted)
