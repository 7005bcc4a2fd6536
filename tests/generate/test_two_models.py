"""Compiled models of one process know nothing of each other: schedules, graphs, reports, restoring."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from tests.support.cases import slow_unless
from tests.support.models import inputs, tiny_internvl, tiny_llava
from tests.support.oracle import oracle_generate

SIZE: dict[str, Any] = {"grid": 4, "encoder_layers": 2, "decoder_layers": 2}
ONE = Schedule(merge=Merge("width", keep=0.5, layer=0), prune=Prune(keep=0.5, layer=1))
OTHER = Schedule(prune=Prune(keep=0.25, layer=0))
NEW_TOKENS = 3

TWINS = "same class, other weights and schedule"
STRANGERS = "other classes, one schedule"


def pair(kind: str) -> tuple[Any, Any]:
    return tiny_llava(**SIZE), tiny_llava(1, **SIZE) if kind == TWINS else tiny_internvl(**SIZE)


def said(model: Any, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    answer: torch.Tensor = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return answer


@pytest.mark.parametrize(
    ("kind", "inner"),
    slow_unless(
        [(TWINS, "eager"), (STRANGERS, "eager"), (TWINS, "inductor"), (STRANGERS, "inductor")],
        [(TWINS, "eager")],
    ),
)
@torch.no_grad()
def test_each_answers_as_if_it_were_alone(kind: str, inner: str) -> None:
    models = pair(kind)
    schedules = (ONE, OTHER) if kind == TWINS else (ONE, ONE)
    prompts = [inputs(model, seed=seed) for seed, model in enumerate(models)]
    stock = said(models[0], prompts[0])
    wanted = [
        oracle_generate(model, schedule, NEW_TOKENS, **prompt)
        for model, schedule, prompt in zip(models, schedules, prompts, strict=True)
    ]
    for model, schedule in zip(models, schedules, strict=True):
        luvc_fx.compile(model, schedule, inner=inner, strict=True)
    for model, prompt, answer in zip(models, prompts, wanted, strict=True):
        assert torch.equal(said(model, prompt), answer)
    reports = [luvc_fx.report_of(model) for model in models]
    counts = [len(report.graphs) for report in reports]
    for model, prompt, answer in zip(models, prompts, wanted, strict=True):
        assert torch.equal(said(model, prompt), answer)
    assert [len(report.graphs) for report in reports] == counts, (
        "one model's call compiled anew after the other's"
    )
    merged = [
        any(each.kind == "merge" for graph in report.graphs for each in graph.inserted) for report in reports
    ]
    assert merged == [bool(schedule.merge) for schedule in schedules]
    luvc_fx.restore(models[0])
    assert torch.equal(said(models[0], prompts[0]), stock)
    assert torch.equal(said(models[1], prompts[1]), wanted[1])
