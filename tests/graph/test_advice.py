"""What is asked for and not done has a reason, and where somebody can help it, the reason says how."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule
from luvc_fx.dynamo.advice import with_advice
from luvc_fx.report import Insertion, Reason, Refusal, Report
from tests.support.cases import slow_unless
from tests.support.family_matrix import (
    BACKEND,
    FAMILIES,
    SCHEDULE,
    Outcome,
    compare_forward,
    model_of,
    prompt_of,
    refused,
)
from tests.support.models_qwen import qwen_inputs

PARTS = {"merge": Schedule(merge=SCHEDULE.merge), "prune": Schedule(prune=SCHEDULE.prune), "both": SCHEDULE}


@torch.no_grad()
def under_backend(family: str, schedule: Schedule, model: Any = None, **settings: Any) -> Report:
    """The report of a forward through `torch.compile`."""
    backend = luvc_fx.backend(schedule, inner="eager", on_no_match="ignore", **settings)
    torch.compile(model or model_of(family), backend=backend)(**prompt_of(family, BACKEND))
    return backend.report


def inserted(report: Report) -> list[Insertion]:
    return [site for graph in report.graphs for site in graph.inserted]


def cases(*families: str) -> list[tuple[str, str]]:
    """Each part of a schedule with the first family, all of it with the others."""
    return [*((families[0], part) for part in PARTS), *((family, "both") for family in families[1:])]


@pytest.mark.parametrize(
    ("family", "part"), slow_unless(cases("qwen2", "qwen2.5", "qwen3"), [("qwen2", "both")])
)
def test_qwen_under_backend_names_the_front_door(family: str, part: str) -> None:
    """Its grids are tensors, so vision, fusion and decoder are in graphs of their own."""
    report = under_backend(family, PARTS[part])
    assert inserted(report) == []
    expected = {
        "merge": {Reason.NO_ATTENTION, Reason.CAPTURE_ENDED_BEFORE_FUSION},
        "prune": {Reason.NO_ATTENTION},
        "both": {Reason.NO_ATTENTION, Reason.CAPTURE_ENDED_BEFORE_FUSION},
    }
    assert {refusal.reason for refusal in refused(report)} == expected[part]
    for refusal in refused(report):
        assert "use luvc_fx.compile(model), which hands the sizes of images over" in refusal.text
        assert "modeling_qwen" in refusal.text, "where the capture ended"
        assert "luvc_fx.prepare" not in refusal.text
        assert refusal.node
    merges = [refusal for refusal in refused(report) if "nothing is merged" in refusal.text]
    assert len(merges) == (0 if part == "prune" else 1)


@pytest.mark.parametrize(("family", "part"), slow_unless(cases("onevision", "next"), [("onevision", "both")]))
def test_tiles_under_backend_name_nothing_that_does_not_help(family: str, part: str) -> None:
    """`image_sizes` is a tensor: neither output hooks nor scalars have to do with it."""
    report = under_backend(family, PARTS[part])
    assert len(inserted(report)) == (0 if part == "merge" else 2)
    found = refused(report)
    assert {r.reason for r in found} == (set() if part == "prune" else {Reason.CAPTURE_ENDED_BEFORE_FUSION})
    for refusal in found:
        assert "use luvc_fx.compile(model), which hands the sizes of images over" in refusal.text
        assert "prepare" not in refusal.text and "capture_scalar_outputs" not in refusal.text


def test_what_the_mend_names_helps() -> None:
    """The mend of each cause, taken."""
    broken: dict[str, Any] = {"model": FAMILIES["llava"].make(**FAMILIES["llava"].size)}
    first = refused(under_backend("llava", SCHEDULE, **broken))[0]
    assert first.reason is Reason.CAPTURE_ENDED_BEFORE_FUSION
    assert "output hooks are installed; run luvc_fx.prepare(model)" in first.text
    torch._dynamo.reset()
    mended = under_backend("llava", SCHEDULE, luvc_fx.prepare(broken["model"]))
    assert refused(mended) == [] and len(inserted(mended)) == 4


def test_without_scalars_the_setting_is_named() -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=False):
        first = refused(under_backend("llava", SCHEDULE, capture_scalars=False))[0]
    assert first.reason is Reason.CAPTURE_ENDED_BEFORE_FUSION
    assert "leave torch._dynamo.config.capture_scalar_outputs on" in first.text


@pytest.mark.slow
@torch.no_grad()
def test_the_front_door_is_no_advice_behind_the_front_door() -> None:
    model, batch = model_of("qwen3"), prompt_of("qwen3", "an image and a video")
    with luvc_fx.applied(model, SCHEDULE, inner="eager"):
        with pytest.warns(LuvcWarning, match=r"modeling_qwen3_vl\.py:\d+ .*prompts of their own"):
            model(**batch)
        (refusal,) = refused(luvc_fx.report_of(model))
    assert refusal.reason is Reason.NO_ATTENTION
    assert "luvc_fx.compile" not in refusal.text
    for name in ("an image", "a video"):  # as it says
        with luvc_fx.applied(model, SCHEDULE, inner="eager", strict=True):
            model(**prompt_of("qwen3", name))
            assert len(inserted(luvc_fx.report_of(model))) > 2


@pytest.mark.slow
def test_a_whole_encoder_whose_decoder_is_elsewhere() -> None:
    """Both the prune and the merge have a reason."""
    model = luvc_fx.prepare(FAMILIES["llava"].make(**FAMILIES["llava"].size))
    layer = model.model.language_model.layers[1]
    forward = layer.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    layer.forward = broken
    found = refused(under_backend("llava", SCHEDULE, model))
    assert [refusal.reason for refusal in found] == [Reason.NO_ATTENTION]
    assert "so nothing is merged either; Dynamo ended this graph at" in found[0].text and found[0].node
    only = refused(under_backend("llava", PARTS["prune"], model))
    assert len(only) == 1 and "merged" not in only[0].text


def test_other_reasons_keep_their_words() -> None:
    gm = fx.symbolic_trace(nn.Identity())
    gm.compile_subgraph_reason = SimpleNamespace(reason="broken", user_stack=[], graph_break=True)
    for reason in set(Reason) - {Reason.NO_ATTENTION, Reason.CAPTURE_ENDED_BEFORE_FUSION}:
        refusal = Refusal(reason, "text", "node")
        assert with_advice(refusal, gm, front_door=False) == refusal


def test_a_graph_that_nobody_says_the_end_of() -> None:
    """As one that Dynamo did not capture."""
    gm = fx.symbolic_trace(nn.Identity())
    refusal = with_advice(Refusal(Reason.CAPTURE_ENDED_BEFORE_FUSION, "text"), gm, front_door=False)
    assert (
        refusal.text == "text; use luvc_fx.compile(model), which hands the sizes of images over as constants"
    )
    refusal = with_advice(Refusal(Reason.NO_ATTENTION, "text"), gm, front_door=False)
    assert refusal.text == "text; load the model with attn_implementation='sdpa'"


# --------------------------------------------------------------------------------- small images


@pytest.mark.parametrize("row", [[3, ("image", 2, 2), 4], [1, ("video", 3, 2, 2), 2]], ids=["image", "video"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.no_grad()
def test_a_grid_of_one_feature_is_too_small_to_merge(
    family: str, row: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    model, told = model_of(family), Outcome()
    batch = qwen_inputs(model, [row])
    schedule = Schedule(merge=SCHEDULE.merge, prune=Prune(tokens=1, layer=1, selector="uniform"))
    with (
        luvc_fx.applied(model, schedule, inner="eager"),
        pytest.warns(LuvcWarning, match="grid too small to merge along width or height: 2 x 2 patches"),
    ):
        out = model(**batch)
        report = luvc_fx.report_of(model)
    assert [refusal.reason for refusal in report.of_kind("vision")[0].refusals] == [Reason.SCHEDULE]
    compare_forward(model, Schedule(prune=schedule.prune), batch, out, told)
    assert told.differences == []
    assert "failed while attempting" not in capfd.readouterr().err, "torch complained on the way"


@torch.no_grad()
def test_one_block_along_one_axis_is_noted() -> None:
    model = model_of("qwen2")
    batch = qwen_inputs(model, [[3, ("image", 2, 8), 4]])
    merges = (Merge("height", keep=0.5, layer=0), Merge("width", keep=0.5, layer=1))
    with luvc_fx.applied(model, Schedule(merge=merges), inner="eager", strict=True):
        model(**batch)
        (vision,) = luvc_fx.report_of(model).of_kind("vision")
    (merge,) = vision.inserted
    assert str(merge) == "merge after encoder block 1: width 8 -> 4"
    assert vision.notes == [
        "grid too small to merge along height after encoder block 0: one feature is left there"
    ]
