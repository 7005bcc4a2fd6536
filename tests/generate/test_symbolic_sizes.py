"""`sizes="symbolic"`: one graph for every image size, budget and length of text, and the same answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from tests.support.cases import GAP
from tests.support.models import inputs, tiny_internvl, tiny_llava
from tests.support.models_qwen import qwen_inputs, tiny_qwen2_vl, tiny_qwen3_vl
from tests.support.oracle import oracle_forward, oracle_generate, schedules
from tests.support.replay import assert_close, examples

TOLERANCE = 2e-5
PRUNES = (
    Prune(keep=0.5, layer=1, selector="distinct", absorb=True),
    Prune(keep=0.25, layer=2, coverage="global"),
)
TO_ZERO = (Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1))
MERGES = (Merge("width", keep=0.75, layer=0, pairing="shared"),)

SIZES = st.tuples(st.integers(2, 8), st.integers(3, 8))
"""Height and width of an image in features. A width of 3 and more merges at MERGES."""


def compiled(model: Any, schedule: Schedule, **settings: Any) -> Any:
    given = {"inner": "eager", "strict": True, "sizes": "symbolic", **settings}
    return luvc_fx.compile(model, schedule, **given)


def qwen(model: Any, size: tuple[int, int], text: int, seed: int = 0) -> dict[str, Tensor]:
    return qwen_inputs(model, [[3, ("image", 2 * size[0], 2 * size[1]), text]], seed)


def graphs(model: Any) -> dict[str, int]:
    report = luvc_fx.report_of(model)
    return {kind: len(report.of_kind(kind)) for kind in ("vision", "prefill", "decode")}


@pytest.mark.parametrize(
    ("make", "merges"),
    [
        (tiny_qwen2_vl, MERGES),
        pytest.param(tiny_qwen2_vl, (), marks=pytest.mark.slow),
        pytest.param(tiny_qwen3_vl, MERGES, marks=pytest.mark.slow),
        pytest.param(tiny_qwen3_vl, (), marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_one_graph_serves_every_size_budget_and_length_of_text(make: Any, merges: tuple[Merge, ...]) -> None:
    plain, model = make(decoder_layers=3, encoder_layers=3), make(decoder_layers=3, encoder_layers=3)
    schedule = Schedule(merge=merges, prune=PRUNES)
    compiled(model, schedule)
    share = 0.75 if merges else 1.0

    @settings(max_examples=examples(100), suppress_health_check=[HealthCheck.too_slow])
    @given(SIZES, st.integers(1, 20), st.floats(0.45, 0.66), st.integers(0, 9))
    def check(size: tuple[int, int], text: int, budget: float, seed: int) -> None:
        batch, asked = qwen(plain, size, text, seed), schedule.with_budget(budget * share, 3)
        wanted = oracle_forward(plain, asked, **batch)
        assume(wanted.gap >= GAP)
        luvc_fx.set_budget(model, budget * share)
        output = model(**batch)
        assert torch.equal(output.row_index, wanted.rows)
        assert_close(output.logits, wanted.logits, TOLERANCE, "logits")

    check()
    # Not one for each size, but one for each form: a few small images are not merged, or keep one token.
    assert graphs(model)["prefill"] <= 3 and graphs(model)["vision"] <= 3, luvc_fx.report_of(model)
    assert len(luvc_fx.report_of(model).prompts) > 5


@torch.no_grad()
def test_sizes_budgets_and_questions_that_come_later_compile_nothing() -> None:
    model = compiled(tiny_qwen2_vl(decoder_layers=3, encoder_layers=2), Schedule(merge=MERGES, prune=PRUNES))
    model.generate(**qwen(model, (4, 4), 5), max_new_tokens=2, do_sample=False)
    before = graphs(model)
    assert before == {"vision": 1, "prefill": 1, "decode": 1}
    for size, text, budget in (((4, 6), 9, None), ((8, 5), 4, 0.4), ((7, 8), 12, 0.35)):
        model.generate(**qwen(model, size, text), max_new_tokens=3, do_sample=False, budget=budget)
    assert graphs(model) == before
    assert len(luvc_fx.report_of(model).prompts) == 4


@torch.no_grad()
def test_generate_with_a_budget_is_that_of_the_schedule_with_the_budget() -> None:
    plain, model = tiny_qwen2_vl(decoder_layers=3), tiny_qwen2_vl(decoder_layers=3)
    schedule, batch = Schedule(prune=PRUNES), qwen(plain, (6, 5), 7)
    compiled(model, schedule)
    for budget in (None, 0.6, 0.45):
        asked = schedule if budget is None else schedule.with_budget(budget, 3)
        wanted = oracle_generate(plain, asked, 5, **batch)
        once = model.generate(**batch, max_new_tokens=5, do_sample=False, budget=budget)
        luvc_fx.set_budget(model, budget)
        always = model.generate(**batch, max_new_tokens=5, do_sample=False)
        assert torch.equal(once, wanted) and torch.equal(always, wanted), budget
        luvc_fx.set_budget(model, None)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (0.2, "above 0.333 and at most 1 for this schedule"),
        (1.5, "at most 1"),
        ("half", "Schedule.budget is 'half'"),
        (float("nan"), "Schedule.budget is nan"),
    ],
)
def test_a_budget_that_the_schedule_cannot_have_is_refused(budget: Any, says: str) -> None:
    model = compiled(tiny_qwen2_vl(decoder_layers=3, encoder_layers=1), Schedule(prune=PRUNES))
    with pytest.raises(ValueError, match=says):
        luvc_fx.set_budget(model, budget)
    with pytest.raises(ValueError, match=says):
        model.generate(**qwen(model, (4, 4), 2), max_new_tokens=1, budget=budget)


def test_a_budget_needs_graphs_for_all_sizes() -> None:
    model = compiled(tiny_llava(decoder_layers=3, encoder_layers=2), Schedule(prune=PRUNES), sizes="static")
    with pytest.raises(ValueError, match="sizes='static'"):
        luvc_fx.set_budget(model, 0.5)
    with pytest.raises(ValueError, match="sizes is 'dynamic'; allowed: 'static', 'symbolic'"):
        compiled(model, Schedule(prune=PRUNES), sizes="dynamic")
    with pytest.raises(ValueError, match="not compiled"):
        luvc_fx.set_budget(tiny_llava(decoder_layers=1, encoder_layers=1), 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 2, "padding": (0, 3)},
        pytest.param({"images": 2}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=["left padding", "two images", "one image"],
)
@torch.no_grad()
def test_batches_and_images_of_one_size(options: dict[str, Any]) -> None:
    plain, model = (tiny_llava(decoder_layers=3, encoder_layers=3) for _ in range(2))
    schedule = Schedule(merge=(Merge("width", keep=0.75, layer=0),), prune=PRUNES)
    compiled(model, schedule)
    for text in ((3, 5), (2, 9), (4, 4)):
        batch = inputs(plain, text=text, **options)
        wanted = oracle_forward(plain, schedule, **batch)
        output = model(**batch)
        assert torch.equal(output.row_index[wanted.mask], wanted.rows[wanted.mask])
        assert_close(output.logits[wanted.mask], wanted.logits[wanted.mask], TOLERANCE, "logits")
    assert graphs(model)["prefill"] == 1


@torch.no_grad()
def test_any_number_of_tiles() -> None:
    plain, model = (tiny_internvl(decoder_layers=3, encoder_layers=2) for _ in range(2))
    schedule = Schedule(merge=(Merge("width", keep=0.5, layer=0),), prune=TO_ZERO)
    compiled(model, schedule)
    for spec in ({"tiles": 3}, {"tiles": 2}, {"tiles": 5}, {"images": 2, "tiles": (1, 3)}, {"tiles": 1}):
        batch = inputs(plain, **spec)
        wanted = oracle_forward(plain, schedule, **batch)
        output = model(**batch)
        assert torch.equal(output.row_index, wanted.rows)
        assert_close(output.logits, wanted.logits, TOLERANCE, "logits")
    # One tile is a size of 1, which Dynamo takes for a constant.
    assert graphs(model)["vision"] == 2 and graphs(model)["prefill"] == 1


@torch.no_grad()
def test_a_second_turn_and_a_static_cache() -> None:
    plain, model = (tiny_llava(decoder_layers=3, encoder_layers=2) for _ in range(2))
    schedule = Schedule(prune=PRUNES)
    compiled(model, schedule)
    for text in ((3, 5), (2, 9)):
        batch = inputs(plain, text=text)
        wanted = oracle_generate(plain, schedule, 4, **batch)
        dynamic = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        static = model.generate(**batch, max_new_tokens=4, do_sample=False, cache_implementation="static")
        assert torch.equal(dynamic.sequences, wanted) and torch.equal(static, wanted)
        more = torch.cat([dynamic.sequences, dynamic.sequences[:, -3:]], 1)
        answer = model.generate(
            input_ids=more,
            attention_mask=torch.ones_like(more),
            max_new_tokens=2,
            do_sample=False,
            past_key_values=dynamic.past_key_values,
        )
        assert answer.shape[1] == more.shape[1] + 2


def test_gradients_have_their_prunes_written_out() -> None:
    """An operator of ours has no derivative; a graph for one size needs none."""
    plain, model = (tiny_llava(decoder_layers=2, encoder_layers=2) for _ in range(2))
    schedule = Schedule(prune=(Prune(keep=0.5, layer=1, absorb=True),))
    for each in (plain, model):
        each.requires_grad_(True)
    compiled(model, schedule, sizes="symbolic")
    static = compiled(copy.deepcopy(plain), schedule, sizes="static")
    batch = inputs(plain)
    results = []
    for each in (model, static):
        output = each(**batch)
        output.logits.square().sum().backward()
        results.append(each.model.language_model.embed_tokens.weight.grad)
    assert torch.equal(*results)


@torch.no_grad()
def test_a_count_that_the_image_does_not_have_is_refused_as_before() -> None:
    model = compiled(
        tiny_llava(decoder_layers=2, encoder_layers=2, grid=4),
        Schedule(prune=Prune(tokens=40, layer=1)),
        strict=False,
        on_no_match="ignore",
    )
    output = model(**inputs(model))
    assert output.logits.shape[1] == inputs(model)["input_ids"].shape[1]
    assert any("at most 16" in str(refusal) for refusal in luvc_fx.report_of(model).all_refusals())


@pytest.mark.slow
@torch.no_grad()
def test_any_schedule_is_bit_equal_to_graphs_of_one_size() -> None:
    models = {sizes: tiny_qwen2_vl(decoder_layers=3, encoder_layers=3) for sizes in ("static", "symbolic")}

    @settings(max_examples=examples(60), suppress_health_check=[HealthCheck.too_slow])
    @given(st.data(), SIZES, SIZES, st.integers(1, 12))
    def check(data: st.DataObject, first: tuple[int, int], second: tuple[int, int], text: int) -> None:
        grid = (2 * min(first[0], second[0]), 2 * min(first[1], second[1]))
        schedule = data.draw(schedules(blocks=3, grid=grid, layers=3, unit=2))
        torch._dynamo.reset()
        outputs: dict[str, list[Any]] = {}
        for sizes, model in models.items():
            with luvc_fx.applied(model, schedule, inner="eager", sizes=sizes, on_no_match="ignore"):
                outputs[sizes] = [model(**qwen(model, size, text)) for size in (first, second)]
        for one, other in zip(*outputs.values(), strict=True):
            assert torch.equal(one.logits, other.logits) and torch.equal(one.row_index, other.row_index)

    check()


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_a_site_once_for_all_sizes() -> None:
    plain, model = (tiny_qwen2_vl(decoder_layers=3, encoder_layers=2) for _ in range(2))
    schedule = Schedule(merge=MERGES, prune=PRUNES)
    compiled(model, schedule, inner="inductor")
    frames = []
    for size, text in (((6, 5), 5), ((4, 8), 9), ((8, 8), 3), ((5, 7), 6)):
        batch = qwen(plain, size, text)
        wanted = oracle_forward(plain, schedule, **batch)
        assert wanted.gap >= GAP
        output = model(**batch)
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert torch.equal(output.row_index, wanted.rows)
        assert_close(output.logits, wanted.logits, TOLERANCE, "logits")
    assert len(set(frames)) == 1, frames
