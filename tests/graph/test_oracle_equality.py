"""Promise 2: what a rewritten graph gives is what the independent eager oracle gives."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor

import luvc_fx
from luvc_fx.dynamo import rewrite
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.cases import GAP, INDUCTOR, PRESET, SMALL, size_for, slow_unless
from tests.support.models import inputs
from tests.support.oracle import oracle_forward, schedules
from tests.support.replay import (
    Outputs,
    assert_close,
    assert_is_oracle,
    capture,
    code,
    compare,
    examples,
    llava,
    prompt,
    rms,
    whole,
)

RICH = Schedule(
    merge=(
        Merge("width", keep=0.75, layer=0),
        Merge("height", length=5, layer=0),
        Merge("width", keep=0.4, layer=2),
    ),
    prune=(
        Prune(keep=0.75, layer=0),
        Prune(tokens=4, layer=1, energy="ratio", coverage="global", cutoff=0.5),
        Prune(keep=0.0, layer=-1),
    ),
)
FEW = Schedule(
    merge=Merge("width", length=3, layer=0),
    prune=(Prune(tokens=5, layer=0, coverage="global"), Prune(tokens=0, layer=1)),
)
# 208 schedules in all, of which the default run draws a quarter.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one row": (56, {}),
    "two rows": (56, {"batch": 2}),
    "left padding": (48, {"batch": 2, "padding": (3, 0)}),
    "two images a row": (16, {"batch": 2, "images": 2, "padding": (0, 2), "model": (("grid", 4),)}),
    "colliding sizes": (16, {"model": (("collide", True),)}),
    "symbolic length": (16, {"dynamic": True, "batch": 2, "padding": (0, 4)}),
}


@pytest.mark.parametrize("case", slow_unless(CASES, ["left padding", "two images a row", "symbolic length"]))
def test_any_schedule_is_the_oracle(case: str) -> None:
    count, options = CASES[case]
    captured = whole(**options)
    model = llava(**dict(options.get("model", ())))
    batch = prompt(**{k: v for k, v in options.items() if k != "dynamic"})
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    drawn = {"all": 0, "close": 0}

    @settings(
        max_examples=examples(count),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(schedules(blocks=3, grid=(grid, grid), layers=4, images=options.get("images", 1)))
    def check(schedule: Schedule) -> None:
        want = oracle_forward(model, schedule, **batch)
        drawn["all"] += 1
        drawn["close"] += want.gap < GAP
        assume(want.gap >= GAP)
        compare(captured, schedule, want)

    check()
    assert drawn["all"] - drawn["close"] >= 0.8 * examples(count), f"too few schedules were compared: {drawn}"
    assert drawn["close"] <= 0.3 * drawn["all"], f"too many ties: {drawn}"


@pytest.mark.parametrize(
    ("make", "kind"),
    slow_unless(
        itertools.product(["preset", "luvc"], ["image", "video", "document"]),
        [("preset", "image"), ("luvc", "video"), ("preset", "document")],
    ),
)
def test_presets_are_the_oracle(make: str, kind: str) -> None:
    schedule = getattr(Schedule, make)(kind)
    # "luvc video" on a smaller grid: the low-pass of the last 8 tokens is their mean, so all tie
    model = (*PRESET[:2], ("grid", 12 if kind == "video" else 8))
    batch = prompt(batch=2, padding=(3, 0), model=model)
    want = oracle_forward(llava(**dict(model)), schedule, **batch)
    assert want.gap >= GAP
    assert want.tokens_per_layer[-1] == 0
    compare(whole(batch=2, padding=(3, 0), model=model), schedule, want)


@pytest.mark.parametrize("keep_all", ["merge", "prune"])
def test_the_comparison_notices_a_part_that_is_left_out(keep_all: str) -> None:
    other = Schedule(prune=RICH.prune) if keep_all == "merge" else Schedule(merge=RICH.merge)
    want = oracle_forward(llava(), RICH, **prompt())
    got, _, _ = whole().rewritten(luvc_fx.backend(other, inner="eager", strict=True))
    with pytest.raises(AssertionError, match="KV lengths"):
        assert_is_oracle(Outputs.of(got), want)


@pytest.mark.parametrize(
    "other",
    [Prune(tokens=32, layer=1, selector="uniform"), Prune(tokens=32, layer=1, energy="lowpass")],
    ids=["uniform", "lowpass"],
)
def test_the_comparison_notices_other_tokens_in_the_same_number(other: Prune) -> None:
    want = oracle_forward(llava(), Schedule(prune=Prune(tokens=32, layer=1)), **prompt())
    got, _, _ = whole().rewritten(luvc_fx.backend(Schedule(prune=other), inner="eager", strict=True))
    with pytest.raises(AssertionError, match="RMS error"):
        assert_is_oracle(Outputs.of(got), want)


def test_without_passes_it_is_not_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "PASSES", ())
    captured = whole()
    want = oracle_forward(llava(), RICH, **prompt())
    got, gm, _ = captured.rewritten(luvc_fx.backend(RICH, inner="eager", strict=True))
    # the backend may still remove dead code, as any compiler does
    assert len(gm.graph.nodes) <= len(captured.gm.graph.nodes)
    with pytest.raises(AssertionError, match="KV lengths"):
        assert_is_oracle(Outputs.of(got), want)
    assert torch.equal(Outputs.of(got).logits, Outputs.of(captured.plain()).logits)


def test_the_rewritten_graph_follows_other_inputs() -> None:
    """Which tokens stay is decided at run time, not when the graph was rewritten."""
    captured = whole(batch=2, padding=(3, 0))
    batch = prompt(batch=2, padding=(3, 0))
    gm = captured.copy()
    luvc_fx.backend(RICH, inner="eager", strict=True)(gm, list(captured.example_inputs))
    kept = []
    for seed in range(4):
        other = inputs(llava(), 2, padding=(3, 0), seed=seed)
        want = oracle_forward(llava(), RICH, **other)
        if want.gap < GAP:
            continue
        swap = {batch[name].data_ptr(): other[name] for name in batch}
        with torch.no_grad():
            flat = gm.forward(*(swap.get(x.data_ptr(), x) for x in captured.values))
        assert_is_oracle(Outputs.of(flat), want)
        kept.append(tuple(want.kept[1].flatten().tolist()))
    assert len(set(kept)) >= 2, "the seeds keep the same tokens, so this shows nothing"


def test_explicit_positions() -> None:
    model, batch = llava(**dict(SMALL)), prompt(batch=2, model=SMALL)
    positions = torch.arange(batch["input_ids"].shape[1])[None] * 3 + 5
    captured = capture(model, **batch, position_ids=positions)
    want = oracle_forward(model, FEW, **batch, position_ids=positions)
    compare(captured, FEW, want)
    plain = oracle_forward(model, FEW, **batch)
    assert rms(plain.logits - want.logits) > 1e-2


def test_without_an_attention_mask() -> None:
    model, batch = llava(**dict(SMALL)), dict(prompt(batch=2, model=SMALL))
    del batch["attention_mask"]
    compare(capture(model, **batch), FEW, oracle_forward(model, FEW, **batch))


# ------------------------------------------------------------------------------ through torch.compile


@pytest.mark.parametrize(
    ("sites", "dynamic"),
    slow_unless(
        itertools.product(["merge and prune", "prune"], [False, True, None]),
        [("merge and prune", True), ("merge and prune", None), ("prune", False)],
    ),
)
@torch.no_grad()
def test_prompt_lengths_may_change(sites: str, dynamic: bool | None) -> None:
    schedule = FEW if sites == "merge and prune" else Schedule(prune=FEW.prune)
    model = llava(**dict(SMALL))
    backend = luvc_fx.backend(schedule, inner="eager", strict=True)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    lengths = [(3, 5), (6, 9), (2, 17), (3, 5)]
    for text in lengths:
        batch = inputs(model, 1, text=text)
        want = oracle_forward(model, schedule, **batch)
        assert want.gap >= GAP
        assert_is_oracle(Outputs.of_model(compiled(**batch)), want)
    # Dynamo's own: one graph a length, one for all, or one and then one for all.
    assert len(backend.report.graphs) == {False: 3, True: 1, None: 2}[dynamic]
    assert all(graph.rewritten for graph in backend.report.graphs)


@pytest.mark.parametrize("name", slow_unless(INDUCTOR, []))
@torch.no_grad()
def test_inductor_is_the_oracle(name: str) -> None:
    schedule = INDUCTOR[name]
    size = size_for(name)
    model, batch = llava(**dict(size)), prompt(batch=2, padding=(2, 0), model=size)
    want = oracle_forward(model, schedule, **batch)
    assert want.gap >= GAP
    backend = luvc_fx.backend(schedule, strict=True)
    got = torch.compile(model, backend=backend)(**batch)
    (report,) = backend.report.graphs
    assert report.rewritten
    assert report.tokens_per_layer == want.tokens_per_layer
    assert_is_oracle(Outputs.of_model(got), want)


# ------------------------------------------------------------------------------------------- bfloat16


@torch.no_grad()
def test_bfloat16() -> None:
    model = copy.deepcopy(llava()).bfloat16()
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in prompt(batch=2).items()}
    # a gap over bfloat16's own rounding: coarse choices between few tokens
    comfortable = 5e-4
    schedule = Schedule(
        merge=Merge("width", length=4, layer=1),
        prune=(Prune(tokens=16, layer=1, energy="lowpass"), Prune(tokens=0, layer=3)),
    )
    want = oracle_forward(model, schedule, **batch)
    exact = want.gap >= comfortable
    captured = capture(model, **batch)
    flat, _, report = captured.rewritten(luvc_fx.backend(schedule, inner="eager", strict=True))
    got = Outputs.of(flat)
    assert got.logits.dtype == torch.bfloat16
    assert report.tokens_per_layer == want.tokens_per_layer
    assert exact, f"the score gap {want.gap:.3g} is too small to compare rows in bfloat16"
    assert_is_oracle(got, want, tolerance=2e-2)


def test_text_rows_are_neither_dropped_nor_moved() -> None:
    """Promise 3: with all visual tokens gone before layer 0, this is the model on text alone."""
    model, batch = llava(), prompt(batch=2)
    schedule = Schedule(prune=Prune(tokens=0, layer=0))
    flat, _, _ = whole(batch=2).rewritten(luvc_fx.backend(schedule, inner="eager", strict=True))
    text = batch["input_ids"] != model.config.image_token_id
    ids: Tensor = batch["input_ids"][text].reshape(2, -1)
    positions = torch.arange(text.shape[1])[text[0]][None]
    with torch.no_grad():
        alone = model(input_ids=ids, position_ids=positions)
    assert_close(Outputs.of(flat).logits, alone.logits, 1e-5, "logits of the text alone")


def test_a_text_prompt_is_an_untouched_graph() -> None:
    batch = {"input_ids": prompt()["input_ids"][:, :3], "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    captured = capture(llava(), **batch)
    flat, gm, report = captured.rewritten(luvc_fx.backend(RICH, inner="eager", strict=True))
    assert code(gm.graph) == code(captured.gm.graph)
    assert report.kind == "text"
    assert not report.rewritten
    assert_close(Outputs.of(flat).logits, llava()(**batch).logits, 0.0, "logits")
