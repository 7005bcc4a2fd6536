"""Models that nothing here was written for: each kind of contract that a stock model may have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule
from luvc_fx.anatomy import recognise
from tests.support.models_foreign import FOREIGN, Foreign, images_by_another_argument, output_with_more_fields

SCHEDULES = {
    "prune": Schedule(prune=Prune(keep=0.5, layer=1, selector="uniform")),
    "merge": Schedule(merge=Merge("width", keep=0.5, layer=0)),
}
REWRITTEN = {
    ("images_by_another_argument", "prune"),
    ("tower_by_another_name", "prune"),
    ("tower_that_computes_with_its_grid", "prune"),
    ("tower_that_computes_with_its_grid", "merge"),
    ("output_with_more_fields", "prune"),
    ("pixels_that_a_forward_insists_on", "prune"),
}
"""What is done; all else is refused."""

BY_DEFAULT = (
    "tower_that_computes_with_its_grid",
    "output_with_more_fields",
    "pixels_that_a_forward_insists_on",
)
"""One tower, one output and one argument; the others are slow."""

foreign = pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
some_by_default = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, marks=() if make.__name__ in BY_DEFAULT else pytest.mark.slow, id=make.__name__)
        for make in FOREIGN
    ],
)


def generate(model: Any, batch: dict[str, Any]) -> Any:
    return model.generate(**batch, max_new_tokens=3, do_sample=False)


@some_by_default
@torch.no_grad()
def test_a_schedule_that_does_nothing_changes_nothing(make: Callable[[], Foreign]) -> None:
    model, batch = make()
    want = model(**batch)
    luvc_fx.compile(model, Schedule(), inner="eager", strict=True)
    got = model(**batch)
    if not torch.equal(got.logits, want.logits):  # Inkling: Dynamo itself rounds a number another way
        want = torch.compile(luvc_fx.prepare(make()[0]), backend="eager")(**batch)
    assert torch.equal(got.logits, want.logits)
    assert type(got) is type(want) and got.keys() == want.keys()
    report = luvc_fx.report_of(model)
    assert report.graphs and not report.refusals


@pytest.mark.slow
@foreign
@torch.no_grad()
def test_a_schedule_that_does_nothing_generates_the_same(make: Callable[[], Foreign]) -> None:
    model, batch = make()
    want = generate(model, batch)
    luvc_fx.compile(model, Schedule(), inner="eager", strict=True)
    assert torch.equal(generate(model, batch), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
@foreign
@torch.no_grad()
def test_tokens_go_or_it_is_said_why_not(make: Callable[[], Foreign], name: str) -> None:
    model, batch = make()
    want, answer = model(**batch).logits, generate(model, batch)
    for call, wanted in ((lambda: model(**batch).logits, want), (lambda: generate(model, batch), answer)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            luvc_fx.compile(model, SCHEDULES[name], inner="eager")
            got = call()
        report = luvc_fx.report_of(model)
        luvc_fx.restore(model)
        if (make.__name__, name) in REWRITTEN and any(graph.inserted for graph in report.graphs):
            continue
        # Inkling: Dynamo itself rounds a number another way.
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
        assert any(isinstance(warning.message, LuvcWarning) for warning in said)


@torch.no_grad()
def test_images_by_another_argument_are_not_merged_in_silence() -> None:
    model, batch = images_by_another_argument()
    want = model(**batch).logits
    luvc_fx.compile(model, SCHEDULES["merge"], inner="eager")
    with pytest.warns(LuvcWarning, match="by an argument that none of its encoders takes"):
        got = model(**batch).logits
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_decoder_without_a_known_fusion_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = output_with_more_fields()
    want = model(**batch).logits
    # As of a model whose features enter the text in a way that nothing here knows.
    known = recognise.op_name
    monkeypatch.setattr(
        recognise, "op_name", lambda node: "unknown" if known(node) == "masked_scatter" else known(node)
    )
    luvc_fx.compile(model, SCHEDULES["prune"], inner="eager")
    with pytest.warns(LuvcWarning, match="no-fusion"):
        got = model(**batch).logits
    assert torch.equal(got, want)
