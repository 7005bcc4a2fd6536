"""The methods that we compare with against the oracle, compiled: ToMe, PACT, FastV, absorbing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.anatomy.recognise import recognise
from luvc_fx.passes.support.site_keys import site_keys
from luvc_fx.plan import make_plan
from luvc_fx.report import Reason, Refused
from tests.support.cases import GAP, slow_unless
from tests.support.family_matrix import FAMILIES, Outcome, cell, note_rows, prompt_of
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_forward
from tests.support.replay import capture

TOME = (
    Merge("width", keep=0.5, layer=0, method="tome"),
    Merge("height", keep=0.75, layer=1, method="tome", feature="keys"),
)
UNIFORM = Prune(keep=0.75, layer=1, selector="uniform", absorb=True)
METHODS = {
    "tome, absorb and pact": Schedule(
        TOME, (UNIFORM, Prune(keep=0.5, layer=2, selector="pact", absorb=True))
    ),
    "fastv behind pact": Schedule(
        prune=(
            Prune(keep=0.7, layer=1, selector="pact"),
            Prune(keep=0.4, layer=3, selector="fastv", coverage="global"),
        )
    ),
}
"""Each holds for 16 visual tokens; what absorbs changes what the selectors behind it see."""


def compare(family: str, name: str, schedule: Schedule, layers: int = 4) -> Any:
    """Run a forward of so many decoder layers, and compare it with the oracle; the report."""
    model = FAMILIES[family].make(
        **{**FAMILIES[family].size, "decoder_layers": layers, **dict(cell(family, name).model)}
    )
    batch = prompt_of(family, name)
    want = oracle_forward(model, schedule, **batch)
    assert want.gap >= GAP
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        out = model(**batch)
        report = luvc_fx.report_of(model)
    told = Outcome()
    note_rows(out, want, told)
    assert not told.differences
    assert report.tokens_per_layer() == want.tokens_per_layer
    return report


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "name"),
    slow_unless(
        [("llava", "two rows, left padding"), ("internvl", "an image in tiles"), ("qwen2", "an image")],
        [("llava", "two rows, left padding"), ("qwen2", "an image")],
    ),
)
@torch.no_grad()
def test_a_method_is_the_oracle(family: str, name: str, method: str) -> None:
    report = compare(family, name, METHODS[method])
    inserted = [insertion for graph in report.graphs for insertion in graph.inserted]
    if METHODS[method].merge:
        assert (inserted[0].name, inserted[0].method) == ("merge after encoder block 0", "tome")
        assert inserted[0].steps[0].axis == "width"
    absorbing = [insertion for insertion in inserted if insertion.absorbs]
    assert len(absorbing) == sum(prune.absorb for prune in METHODS[method].prune)


@torch.no_grad()
def test_keys_behind_their_norms() -> None:
    """Qwen3-VL normalises queries and keys before it turns them."""
    compare("qwen3", "an image", Schedule(prune=Prune(keep=0.4, layer=4, selector="pact")), 5)


@torch.no_grad()
def test_a_mask_that_is_added() -> None:
    """Written-out attention adds its mask; of left padding PACT's means take nothing."""
    model = tiny_llava(decoder_layers=3, encoder_layers=1, grid=4, attn="eager")
    batch = inputs(model, 2, padding=(3, 0))
    schedule = Schedule(prune=Prune(keep=0.4, layer=2, selector="pact"))
    want = oracle_forward(model, schedule, **batch)
    assert want.gap >= GAP
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        assert torch.equal(model(**batch).row_index, want.rows)


# ------------------------------------------------------------------------------------- a later turn


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["pact", "fastv"])
@torch.no_grad()
def test_a_later_turn_over_the_shortened_cache(selector: str) -> None:
    model = tiny_llava(decoder_layers=4, encoder_layers=1, grid=4)
    first = Prune(keep=0.75, layer=1, selector="uniform")
    schedule = Schedule(prune=(first, Prune(keep=0.5, layer=3, selector=selector, coverage="global")))
    batch, other = inputs(model, 2, padding=(3, 0)), inputs(model, 2, seed=1)
    once = oracle_forward(model, schedule, **batch)
    twice = oracle_forward(model, schedule, past=once.state, **other)
    assert min(once.gap, twice.gap) >= GAP
    seen = torch.cat([batch["attention_mask"], other["attention_mask"]], dim=1)
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        out = model(**batch)
        again = model(**{**other, "attention_mask": seen}, past_key_values=out.past_key_values)
    for got, want in ((out, once), (again, twice)):
        torch.testing.assert_close(got.logits[want.mask], want.logits[want.mask], rtol=1e-4, atol=1e-4)
    assert [layer.keys.shape[-2] for layer in again.past_key_values.layers] == twice.kv_lengths


# ---------------------------------------------------------------------------------------- inner


@pytest.mark.slow
@torch.no_grad()
def test_inductor_keeps_the_same_tokens() -> None:
    model = tiny_llava(decoder_layers=4, encoder_layers=2, grid=4)
    batch = inputs(model, 2, padding=(3, 0))
    fastv = Prune(keep=0.2, layer=3, selector="fastv", coverage="global")
    schedule = dataclasses.replace(METHODS["tome, absorb and pact"], merge=TOME[:1])
    schedule = dataclasses.replace(schedule, prune=(*schedule.prune, fastv))
    assert oracle_forward(model, schedule, **batch).gap >= GAP
    kept: list[Tensor] = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        with luvc_fx.applied(model, schedule, inner=inner, strict=True):
            kept.append(model(**batch).row_index)
    assert torch.equal(*kept)
    assert kept[0].shape[1] < batch["input_ids"].shape[1]


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("family", "name", "schedule", "text"),
    [
        ("onevision", "an image in tiles", Schedule(TOME), "put together by place"),
        (
            "llava",
            "an image",
            Schedule(prune=Prune(keep=0.5, layer=0, selector="pact")),
            "'pact' before decoder layer 0",
        ),
    ],
)
@torch.no_grad()
def test_what_cannot_be_done_has_a_reason(family: str, name: str, schedule: Schedule, text: str) -> None:
    model = FAMILIES[family].make(**FAMILIES[family].size)
    batch = prompt_of(family, name)
    with luvc_fx.applied(model, schedule, inner="eager", on_no_match="ignore"):
        out = model(**batch)
        graphs = luvc_fx.report_of(model).graphs
    (refusal,) = [refusal for graph in graphs for refusal in graph.refusals]
    assert refusal.reason == Reason.SCHEDULE
    assert text in refusal.text
    assert out.logits.shape[1] == batch["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scale": None}, "scaled by something that is no constant"),
        ({"keys": "earlier"}, "not made of its input"),
        ({"queries": "input"}, "not found ahead of rotary positions"),
    ],
)
def test_keys_that_are_not_found_are_refused(changes: dict[str, Any], text: str) -> None:
    model = luvc_fx.prepare(tiny_llava(decoder_layers=3, encoder_layers=1, grid=4))
    graph = capture(model, **inputs(model)).gm.graph
    anatomy = recognise(graph)
    decoder = anatomy.decoder
    assert decoder is not None
    (site,) = make_plan(Schedule(prune=Prune(keep=0.5, layer=2, selector="pact")), anatomy).prunes
    stand_ins = {"earlier": decoder.calls[1].keys, "input": site.node, None: None}
    call = dataclasses.replace(
        decoder.calls[2], **{field: stand_ins[what] for field, what in changes.items()}
    )
    nodes, _ = site_keys(graph, decoder, site)
    assert nodes
    with pytest.raises(Refused) as caught:
        site_keys(graph, dataclasses.replace(decoder, calls=(*decoder.calls[:2], call)), site)
    assert text in caught.value.refusal.text
