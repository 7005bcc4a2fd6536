"""Many schedules and shapes on one model: all compiled, or said aloud that they were not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import luvc_fx
from luvc_fx import LuvcWarning, NotRewritten, Reason, _compat
from luvc_fx.schedule import Prune, Schedule
from tests.support.models import inputs, tiny_llava
from tests.support.replay import Recorder, toy, toy_inputs

SCHEDULES = [Schedule(prune=Prune(tokens=count, layer=1)) for count in range(12)]
LIMIT = "recompile_limit allows, and runs it eagerly, with all visual tokens"


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Dynamo's own, and again after the test."""
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield


def told(call: Callable[[], Any]) -> list[str]:
    """The warnings of ours that `call` gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if warning.category is LuvcWarning]


def shapes() -> list[dict[str, Tensor]]:
    return [toy_inputs(rows=rows) for rows in range(1, 13)]


# ------------------------------------------------------------------------------------------- backend


@torch.no_grad()
def test_twelve_schedules_on_one_model() -> None:
    model, batch, inner = toy(), toy_inputs(), Recorder()
    for number, schedule in enumerate(SCHEDULES, start=1):
        backend = luvc_fx.backend(schedule, inner=inner, strict=True)
        for _ in range(2):
            torch.compile(model, backend=backend)(**batch)
        assert len(inner.graphs) == number
        assert backend.report.graphs[0].rewritten


@pytest.mark.slow
@torch.no_grad()
def test_twelve_shapes_of_one_model() -> None:
    backend = luvc_fx.backend(SCHEDULES[3], inner="eager", strict=True)
    compiled = torch.compile(toy(), backend=backend, dynamic=False)
    for number, batch in enumerate(shapes(), start=1):
        assert compiled(**batch).shape[:2] == (number, 8)
        assert len(backend.report.graphs) == number
    ids = [graph.compile_id for graph in backend.report.graphs]
    assert [text.partition("/")[2] for text in ids] == [str(number) for number in range(12)]


def test_the_limit_is_raised_unless_told_not_to_and_never_lowered() -> None:
    luvc_fx.backend(inner="eager", recompile_limit=None)
    assert torch._dynamo.config.recompile_limit == 8
    luvc_fx.backend(inner="eager", recompile_limit=3)
    assert torch._dynamo.config.recompile_limit == 8
    luvc_fx.backend(inner="eager")
    assert torch._dynamo.config.recompile_limit == _compat.RECOMPILE_LIMIT


def unraised(schedule: Schedule, **options: Any) -> luvc_fx.LuvcBackend:
    return luvc_fx.backend(schedule, inner="eager", recompile_limit=None, **options)


@torch.no_grad()
def test_every_schedule_beyond_the_limit_warns() -> None:
    model, batch = toy(), toy_inputs()
    rows = []
    for number, schedule in enumerate(SCHEDULES):
        backend = unraised(schedule)
        texts = told(lambda b=backend: rows.append(torch.compile(model, backend=b)(**batch).shape[1]))
        if number < 8:
            assert texts == []
            continue
        assert len(texts) == 1
        assert LIMIT in texts[0]
        assert [refusal.reason for refusal in backend.report.refusals] == [Reason.RECOMPILE_LIMIT]
        assert backend.report.graphs == []
    assert rows == [*range(5, 13), 21, 21, 21, 21]
    assert torch._dynamo.utils.counters["luvc_fx"]["refused: recompile-limit"] == 4


@torch.no_grad()
def test_a_reset_of_dynamo_is_a_fresh_start() -> None:
    model, batch = toy(), toy_inputs()
    for schedule in SCHEDULES[:9]:
        told(lambda s=schedule: torch.compile(model, backend=unraised(s))(**batch))
    torch._dynamo.reset()
    backend = unraised(SCHEDULES[9])
    assert told(lambda: torch.compile(model, backend=backend)(**batch)) == []
    assert backend.report.graphs[0].rewritten


@pytest.mark.parametrize("how", [{"on_no_match": "raise"}, {"strict": True}], ids=["raise", "strict"])
@torch.no_grad()
def test_every_schedule_beyond_the_limit_raises(how: dict[str, Any]) -> None:
    model, batch = toy(), toy_inputs()
    for number, schedule in enumerate(SCHEDULES):
        compiled = torch.compile(model, backend=unraised(schedule, **how))
        if number < 8:
            compiled(**batch)
        else:
            for _ in range(2):
                with pytest.raises(NotRewritten, match=LIMIT):
                    compiled(**batch)


@torch.no_grad()
def test_on_no_match_ignore_keeps_it_to_the_report() -> None:
    model = toy()
    backend = unraised(SCHEDULES[0], on_no_match="ignore")
    compiled = torch.compile(model, backend=backend, dynamic=False)
    assert told(lambda: [compiled(**batch) for batch in shapes()]) == []
    assert [refusal.reason for refusal in backend.report.refusals] == [Reason.RECOMPILE_LIMIT]
    assert torch.equal(compiled(**shapes()[11]), model(**shapes()[11]))


@torch.no_grad()
def test_shapes_beyond_the_limit_warn() -> None:
    backend = unraised(SCHEDULES[0])
    compiled = torch.compile(toy(), backend=backend, dynamic=False)
    texts = told(lambda: [compiled(**batch) for batch in shapes()])
    assert len(texts) == 1
    assert LIMIT in texts[0]
    assert "forward" in texts[0]
    assert len(backend.report.graphs) == 8


@torch.no_grad()
def test_a_function_and_the_backend_by_name_warn_too() -> None:
    model, report = toy(), luvc_fx.Report()
    options = {"luvc.schedule": SCHEDULES[0], "luvc.inner": "eager", "luvc.report": report}

    def call(**batch: Tensor) -> Tensor:
        return model(**batch)

    compiled = torch.compile(call, backend="luvc_fx", options=options, dynamic=False)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled(**toy_inputs())
        torch._dynamo.config.recompile_limit = 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_compat, "allow_recompiles", lambda limit: None)
            texts = told(lambda: [compiled(**batch) for batch in shapes()])
    assert [LIMIT in text for text in texts] == [True]
    assert [refusal.reason for refusal in report.refusals] == [Reason.RECOMPILE_LIMIT]


@torch.no_grad()
def test_what_others_compile_is_none_of_our_business() -> None:
    luvc_fx.backend(SCHEDULES[0], inner="eager", recompile_limit=None)
    compiled = torch.compile(toy(), backend="eager", dynamic=False)
    assert told(lambda: [compiled(**batch) for batch in shapes()]) == []


# ----------------------------------------------------------------------------------- the front door


@pytest.fixture
def model() -> Iterator[Any]:
    made = tiny_llava(decoder_layers=2, encoder_layers=2, grid=4)
    with torch.no_grad():
        yield made
    luvc_fx.restore(made)


def left(model: Any) -> list[int]:
    """Visual tokens in the last layer of each compiled graph that has a fusion."""
    return [graph.tokens_per_layer[-1] for graph in luvc_fx.report_of(model).graphs if graph.original]


@pytest.mark.slow
def test_twelve_schedules_through_the_front_door(model: Any) -> None:
    batch = inputs(model)
    for count, schedule in enumerate(SCHEDULES):
        luvc_fx.compile(model, schedule, inner="eager", strict=True)
        model(**batch)
        assert left(model) == [count]
    assert torch._dynamo.config.recompile_limit == 8


@pytest.mark.slow
def test_twelve_shapes_through_the_front_door(model: Any) -> None:
    luvc_fx.compile(model, SCHEDULES[3], inner="eager", strict=True, dynamic=False)
    for tail in range(1, 13):
        model(**inputs(model, text=(2, tail)))
        assert left(model) == [3] * tail


def test_shapes_beyond_the_limit_of_the_front_door_warn(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luvc_fx._compat.torch.RECOMPILE_LIMIT", 3)
    luvc_fx.compile(model, SCHEDULES[3], inner="eager", dynamic=False)
    prompts = [inputs(model, text=(2, tail)) for tail in range(1, 8)]
    texts = told(lambda: [model.generate(**prompt, max_new_tokens=1) for prompt in prompts])
    assert [LIMIT in text for text in texts] == [True]
    assert left(model) == [3] * 3
    assert [refusal.reason for refusal in luvc_fx.report_of(model).refusals] == [Reason.RECOMPILE_LIMIT]
