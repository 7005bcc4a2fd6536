"""InternVL: a prefix token, tiles and a pixel shuffle, by the same recognition and the same passes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from transformers import DynamicCache

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule
from luvc_fx.dynamo.backend import NotRewritten
from luvc_fx.generate.cache import PrunedCache
from luvc_fx.report import Reason
from tests.support.cases import GAP, slow_unless
from tests.support.models import inputs, patch_grid, rename_everything, tiny_internvl
from tests.support.oracle import oracle_continue, oracle_forward, oracle_generate, oracle_greedy, schedules
from tests.support.replay import Captured, capture, compare, examples

BOTH = Schedule(
    merge=(Merge("width", keep=0.5, layer=0), Merge("height", keep=0.75, layer=1)),
    prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1)),
)
NEW_TOKENS = 6

# name: schedules drawn, model, prompt
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one tile": (16, {}, {}),
    "three tiles, two rows": (16, {}, {"batch": 2, "tiles": 3}),
    "left padding": (12, {"text": "llama"}, {"batch": 2, "padding": (0, 3), "tiles": 2}),
    "two images of other tiles": (8, {}, {"batch": 2, "images": 2, "tiles": (1, 2)}),
    "norms on queries and keys": (8, {"qk_norm": True, "vision_feature_layer": -2}, {"batch": 2}),
    "norm after the tower": (8, {"mean_pooling": False}, {}),
    "colliding sizes": (8, {"collide": True}, {}),
}


@cache
def internvl(**options: Any) -> Any:
    return luvc_fx.prepare(tiny_internvl(**options))


@cache
def captured(name: str) -> tuple[Any, dict[str, torch.Tensor], Captured]:
    _, model_options, prompt_options = CASES[name]
    model = internvl(**model_options)
    prompt = inputs(model, **prompt_options)
    return model, prompt, capture(model, False, **prompt)


def drawn_for(model: Any, prompt: dict[str, torch.Tensor], **limits: Any) -> Any:
    """Schedules for a model and a prompt; `images` counts a row's tiles, each a grid of its own."""
    config = model.config
    blocks = config.vision_config.num_hidden_layers + 1 + config.vision_feature_layer
    rows = prompt["input_ids"].shape[0]
    return schedules(
        blocks=blocks,
        grid=patch_grid(model),
        layers=config.text_config.num_hidden_layers,
        images=prompt["pixel_values"].shape[0] // rows,
        unit=2,
        **limits,
    )


@pytest.mark.parametrize("name", slow_unless(CASES, ["three tiles, two rows", "norms on queries and keys"]))
def test_any_schedule_is_the_oracle(name: str) -> None:
    model, prompt, graph = captured(name)
    drawn = {"all": 0, "close": 0}

    @settings(
        max_examples=examples(CASES[name][0]),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(drawn_for(model, prompt))
    def check(schedule: Schedule) -> None:
        want = oracle_forward(model, schedule, **prompt)
        drawn["all"] += 1
        drawn["close"] += want.gap < GAP
        assume(want.gap >= GAP)
        compare(graph, schedule, want)

    check()
    assert drawn["close"] <= 0.3 * drawn["all"], f"too many ties: {drawn}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"batch": 2, "tiles": 2, "padding": (0, 3)}],
    ids=["one tile", "two tiles, left padding"],
)
@torch.no_grad()
def test_any_schedule_generates_what_the_oracle_does(options: dict[str, Any]) -> None:
    model = internvl(decoder_layers=2, encoder_layers=2)
    prompt = inputs(model, **options)

    @settings(
        max_examples=examples(10),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(drawn_for(model, prompt))
    def check(schedule: Schedule) -> None:
        assume(oracle_forward(model, schedule, **prompt).gap >= GAP)
        torch._dynamo.reset()
        wanted = oracle_generate(model, schedule, NEW_TOKENS, **prompt)
        with luvc_fx.applied(model, schedule, inner="eager", strict=True):
            got = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(got, wanted)

    check()


@pytest.mark.parametrize("selector", ["spectrum", "random"])
@torch.no_grad()
def test_images_one_row_high_are_images_still(selector: str) -> None:
    """Energies are measured image by image, also when a merge left a single row of each."""
    model = internvl(decoder_layers=2, encoder_layers=2)
    prompt = inputs(model, batch=2, tiles=2, padding=(0, 3))
    own = {"energy": "ratio", "cutoff": 0.5, "normalize": "mean", "per_image": True}
    schedule = Schedule(
        merge=Merge("height", keep=0.1, layer=0, pairing="shared", feature="keys"),
        prune=Prune(tokens=7, layer=1, selector=selector, **(own if selector == "spectrum" else {})),
    )
    want = oracle_forward(model, schedule, **prompt)
    assert want.gap >= GAP
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        got = model(**prompt)
        (graph,) = luvc_fx.report_of(model).of_kind("prefill")
    assert graph.grid == (1, 4)
    assert torch.equal(got.row_index, want.rows)
    assert float(((got.logits - want.logits) * want.mask[..., None]).abs().max()) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_inductor_is_the_oracle() -> None:
    model = internvl()
    prompt = inputs(model, batch=2, tiles=2)
    want = oracle_forward(model, BOTH, **prompt)
    assert want.gap >= GAP
    backend = luvc_fx.backend(BOTH, strict=True)
    got = torch.compile(model, backend=backend)(**prompt)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    (report,) = backend.report.graphs
    assert report.tokens_per_layer == want.tokens_per_layer
    wanted = oracle_generate(model, BOTH, NEW_TOKENS, **prompt)
    with luvc_fx.applied(model, BOTH, strict=True):
        assert torch.equal(model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False), wanted)


@torch.no_grad()
def test_the_report_names_both_grids() -> None:
    model = internvl()
    prompt = inputs(model, tiles=2)
    with luvc_fx.applied(model, BOTH, inner="eager", strict=True):
        out = model(**prompt)
        vision, prefill = luvc_fx.report_of(model).graphs
    assert (vision.kind, vision.grid, vision.merged_grid) == ("vision", (8, 8), (6, 4))
    assert (prefill.kind, prefill.grid) == ("prefill", (3, 2))
    want = oracle_forward(model, BOTH, **prompt)
    assert torch.equal(out.row_index, want.rows)


@torch.no_grad()
def test_a_second_turn() -> None:
    model = internvl()
    prompt = inputs(model, tiles=2)
    first = oracle_forward(model, BOTH, **prompt)
    answer = oracle_greedy(model, first, NEW_TOKENS)
    turn = torch.tensor([[7, 9, 11, 13]])
    wanted = oracle_continue(model, first.state, torch.cat([answer[:, -1:], turn], dim=1))[:, -1]
    with luvc_fx.applied(model, BOTH, inner="eager", strict=True):
        cache = DynamicCache(config=model.config.get_text_config())
        limits = {"past_key_values": cache, "do_sample": False}
        said = model.generate(**prompt, **limits, max_new_tokens=NEW_TOKENS)
        assert isinstance(cache, PrunedCache)
        longer = torch.cat([said, turn], dim=1)
        out = model.generate(
            input_ids=longer,
            attention_mask=torch.ones_like(longer),
            **limits,
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
    torch.testing.assert_close(out.logits[0], wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_lengths_are_whole_blocks() -> None:
    """A pixel shuffle takes pairs of rows and columns: an odd length is rounded up, and said."""
    model = internvl()
    prompt = inputs(model)
    asked, given = (Schedule(merge=Merge("width", length=length, layer=1)) for length in (5, 6))
    want = oracle_forward(model, given, **prompt)
    with (
        luvc_fx.applied(model, asked, inner="eager"),
        pytest.warns(LuvcWarning, match=r"Merge\.length 5 became 6"),
    ):
        torch.testing.assert_close(model(**prompt).logits, want.logits, atol=1e-4, rtol=1e-4)
        vision = luvc_fx.report_of(model).graphs[0]
        assert vision.merged_grid == (8, 6)
    torch._dynamo.reset()
    with (
        luvc_fx.applied(model, asked, inner="eager", strict=True),
        pytest.raises(Exception, match=r"Merge\.length 5 became 6") as caught,
    ):
        model(**prompt)
    assert isinstance(caught.value.__cause__ or caught.value, (NotRewritten, RuntimeError))


@torch.no_grad()
def test_lengths_fit_what_is_left_in_whole_blocks() -> None:
    """A tenth of 8 patches is one block of 2 here, not one patch, so a later length of 2 is right."""
    model = internvl()
    prompt = inputs(model)
    asked = (Merge("width", length=2, layer=1), Merge("width", keep=0.1, layer=0))
    want = oracle_forward(model, Schedule(merge=asked), **prompt)
    with luvc_fx.applied(model, Schedule(merge=asked), inner="eager", strict=True):
        torch.testing.assert_close(model(**prompt).logits, want.logits, atol=1e-4, rtol=1e-4)
        vision = luvc_fx.report_of(model).graphs[0]
    assert (vision.merged_grid, want.rows.shape[1]) == ((8, 2), prompt["input_ids"].shape[1] - 12)


@torch.no_grad()
def test_rows_with_other_numbers_of_tiles_stay_whole() -> None:
    model = internvl()
    two, one = inputs(model, tiles=2), inputs(model, text=(3, 5 + 16), tiles=1, seed=1)
    prompt = {key: torch.cat([two[key], one[key]]) for key in two}
    stock = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    with luvc_fx.applied(model, BOTH, inner="eager"), pytest.warns(LuvcWarning, match="different numbers"):
        got = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert [r.reason for r in luvc_fx.report_of(model).refusals] == [Reason.UNEVEN_BATCH]
    assert torch.equal(got, stock)


@torch.no_grad()
def test_no_name_is_read() -> None:
    prompt = inputs(internvl(), batch=2)
    want = oracle_forward(internvl(), BOTH, **prompt)
    renamed = luvc_fx.prepare(rename_everything(tiny_internvl()))
    backend = luvc_fx.backend(BOTH, inner="eager", strict=True)
    got = torch.compile(renamed, backend=backend)(**prompt)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
