"""The matrix of model families against the oracle, and the table of families against the matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

import luvc_fx
from luvc_fx import LuvcWarning, Schedule
from luvc_fx.dynamo.backend import NotRewritten
from luvc_fx.generate.families import MODALITIES
from luvc_fx.report import Reason
from tests.support.cases import GAP, slow_unless
from tests.support.family_matrix import (
    BACKEND,
    CELLS,
    FAMILIES,
    MERGES,
    PRUNES,
    SCHEDULE,
    Batch,
    cell,
    done_to,
    first_input,
    model_of,
    prompt_of,
    run,
)
from tests.support.family_table import COLUMNS, measured_rows, reasons_of, row_of, tokens_of
from tests.support.oracle import encoder_blocks, oracle_forward, schedules, tile_counts
from tests.support.replay import assert_close, examples

INDUCTOR = [("qwen2", "an image and a video"), ("onevision", "padding cropped")]


def planned(family: str, name: str, batch: Batch) -> list[int]:
    """Visual tokens entering each layer, as the oracle counts them."""
    given = cell(family, name)
    return oracle_forward(
        model_of(family, *given.model), done_to(given) or Schedule(), **batch
    ).tokens_per_layer


def encoders_of(batch: Batch) -> int:
    """How many kinds of visual input a prompt has."""
    return sum(name in batch for name in ("pixel_values", "pixel_values_videos"))


FAST = (
    ("llava", "two rows, left padding"),
    ("llava", BACKEND),
    ("internvl", "an image in tiles"),
    ("qwen2", "an image and a video"),
    ("qwen2", BACKEND),
    ("qwen3", "an image"),
    ("onevision", "padding cropped"),
)
"""A family of each kind (features in a row, pixel shuffle, packed patches, deepstack, tiles), each door."""


@pytest.mark.parametrize(("family", "name"), slow_unless(CELLS, FAST))
def test_a_cell_is_the_oracle_and_the_table(family: str, name: str) -> None:
    given, batch = cell(family, name), prompt_of(family, name)
    told = run(family, name)
    assert told.differences == []
    assert told.gap >= GAP, "a tie, which shows nothing"
    assert told.reasons == given.reasons
    assert all(len(refusal.text.split()) > 4 for refusal in told.refusals), "a sentence for people"
    assert told.repeated == 0
    if given.pruned:
        assert told.tokens_per_layer == planned(family, name, batch)
        if name != BACKEND:
            assert dict(told.forward) == {"vision": encoders_of(batch), "prefill": 1}
            assert dict(told.generate) == {"prefill": 1, "decode": 2}
    # Whoever does not read the report is warned, with its words.
    assert all(any(refusal.text in text for text in told.warned) for refusal in told.refusals)
    assert bool(told.warned) == bool(given.reasons)
    written = measured_rows()[family, name]
    made = row_of(family, name, told)
    tried = {column: made[column] for column in COLUMNS if made[column] is not None}
    assert {column: written[column] for column in tried} == tried, (
        "run python -m tests.support.family_table --measure --write"
    )


def test_the_table_has_the_rows_of_the_matrix() -> None:
    """And says of each what the matrix says; the other columns are measured, above."""
    rows = measured_rows()
    assert list(rows) == CELLS, "run python -m tests.support.family_table --measure --write"
    for (family, name), row in rows.items():
        assert row["family"] == FAMILIES[family].title
        assert row["visual tokens"] == tokens_of(family, name)
        assert row["refused"] == reasons_of(cell(family, name).reasons)


@pytest.mark.parametrize(
    ("family", "name"),
    slow_unless([cell for cell in CELLS if cell[1] != BACKEND], (("llava", "an image"),)),
)
def test_new_shapes(family: str, name: str) -> None:
    """More text and another image: the oracle's answers, and as many recompiles as the table says."""
    told = run(family, name, longer=True, other=True)
    assert told.differences == []
    assert told.gap >= GAP
    assert row_of(family, name, told) == measured_rows()[family, name], (
        "run python -m tests.support.family_table --measure --write"
    )


REFUSED = {
    (cell(family, name).reasons, tokens_of(family, name), name == BACKEND): (family, name)
    for family, name in reversed(CELLS)
    if cell(family, name).reasons
}
"""One cell of each kind; the others differ in the model only."""
RAISED = (
    ("qwen2", "a batch of unequal token counts"),
    ("qwen2", BACKEND),
    ("qwen3", "merges behind the first deepstack tap"),
    ("next", "two images"),
)


@pytest.mark.parametrize(("family", "name"), slow_unless(REFUSED.values(), RAISED))
@torch.no_grad()
def test_strict_raises_what_is_refused(family: str, name: str) -> None:
    """With the reason; whether Dynamo wraps the error or not."""
    given = cell(family, name)
    model, batch = model_of(family, *given.model), prompt_of(family, name)
    with pytest.raises(Exception, match=rf"{given.reasons[0].value}: \w") as caught:
        if name == BACKEND:
            backend = luvc_fx.backend(SCHEDULE, inner="eager", strict=True)
            torch.compile(model, backend=backend)(**batch)
        else:
            with luvc_fx.applied(model, SCHEDULE, inner="eager", strict=True):
                model(**batch)
    assert isinstance(caught.value, NotRewritten) or "NotRewritten" in str(caught.value)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["a video", "an image and a video"])
def test_pixels_without_a_known_encoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As videos of LLaVA-OneVision in transformers 5.17: nothing is cut that the cache would not show."""
    monkeypatch.setattr("luvc_fx.generate.families.MODALITIES", MODALITIES[:1])
    given, batch = cell("qwen2", name), prompt_of("qwen2", name)
    model = model_of("qwen2", *given.model)
    plain = model(**batch).logits
    stock = model.generate(**batch, max_new_tokens=4, do_sample=False)
    with luvc_fx.applied(model, SCHEDULE, inner="eager"):
        with pytest.warns(LuvcWarning, match="pixel_values_videos has no known encoder"):
            got = model(**batch).logits
        assert_close(got, plain, 2e-5, "logits")
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), stock)
        assert [r.reason for r in luvc_fx.report_of(model).refusals] == [Reason.INPUTS]


@torch.no_grad()
def test_beams_of_rows_with_other_numbers_of_tokens() -> None:
    """Left alone as without beams, whatever the beams ask for."""
    model, batch = model_of("qwen2"), prompt_of("qwen2", "a batch of unequal token counts")
    beams = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    stock = model.generate(**batch, **beams)
    with luvc_fx.applied(model, SCHEDULE, inner="eager"):
        with pytest.warns(LuvcWarning, match="uneven-batch: a row without images"):
            assert torch.equal(model.generate(**batch, **beams), stock)
        report = luvc_fx.report_of(model)
    assert [refusal.reason for refusal in report.refusals] == [Reason.UNEVEN_BATCH]
    assert not any(graph.inserted for graph in report.graphs)


# -------------------------------------------------------------------------------------- any schedule

DRAWN = {
    "qwen2": ("an image and a video", [(4, 8), (8, 4), (8, 4)]),
    "onevision": ("padding cropped", [(4, 4)]),
    "next": ("padding cropped", [(4, 4)]),
}
"""The input, and the patch grids of its images (frames, tiles)."""


def drawn_for(family: str) -> Any:
    """Schedules for a model and its prompt."""
    name, grids = DRAWN[family]
    model, batch = model_of(family), prompt_of(family, name)
    limits: dict[str, Any] = {"unit": 2} if family == "qwen2" else {}
    if family != "qwen2":
        limits["fused"] = lambda merges: sum(tile_counts(model, merges, batch))
    return schedules(encoder_blocks(model), layers=3, grids=grids, **limits)


@pytest.mark.parametrize("family", slow_unless(DRAWN, ["qwen2"]))
@torch.no_grad()
def test_any_schedule_is_the_oracle(family: str) -> None:
    model, batch = model_of(family), prompt_of(family, DRAWN[family][0])
    drawn = {"all": 0, "close": 0}

    @settings(
        max_examples=examples(9),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(drawn_for(family))
    def check(schedule: Schedule) -> None:
        want = oracle_forward(model, schedule, **batch)
        drawn["all"] += 1
        drawn["close"] += want.gap < GAP
        assume(want.gap >= GAP)
        torch._dynamo.reset()
        # A merge that padding stops early is a reason in the report, and the oracle's stops there too.
        with luvc_fx.applied(model, schedule, inner="eager", on_no_match="ignore"):
            out = model(**batch)
            report = luvc_fx.report_of(model)
        stopped = [r for graph in report.graphs for r in graph.refusals]
        assert all("became" in refusal.text for refusal in stopped)
        assert report.tokens_per_layer() == want.tokens_per_layer
        assert torch.equal(out.row_index, want.rows)
        assert_close(out.logits, want.logits, 2e-5, "logits")

    check()
    assert drawn["close"] <= 0.3 * drawn["all"], f"too many ties: {drawn}"


# ---------------------------------------------------------------------------------------- Inductor


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), INDUCTOR)
def test_inductor_is_the_oracle(family: str, name: str) -> None:
    told = run(family, name, inner="inductor", strict=True)
    assert told.differences == []
    assert told.repeated == 0
    assert told.tokens_per_layer == planned(family, name, prompt_of(family, name))


# -------------------------------------------------------------------------------------- the matrix


def test_the_matrix_reaches_every_kind_of_input() -> None:
    """Or a family that is added would be green by having no inputs."""
    for family, found in FAMILIES.items():
        names = " ".join(found.inputs)
        assert "left padding" in names, family
        assert "images" in names, family
        for declared in (*found.inputs.values(), found.whole):
            whole = declared.merged and declared.pruned
            assert bool(declared.reasons) or whole, "what is left alone has a reason"
        assert found.inputs[first_input(family)].pruned
    assert {len(MERGES), len(PRUNES)} == {2}


@torch.no_grad()
def test_a_warning_says_which_family_member_is_left_alone() -> None:
    """The front door's words for a merge that it refuses name the graph node."""
    model, batch = model_of("qwen2.5"), prompt_of("qwen2.5", "an image")
    with (
        luvc_fx.applied(model, SCHEDULE, inner="eager"),
        pytest.warns(LuvcWarning, match=r"token-axis: .* \[\w+\]"),
    ):
        model(**batch)
