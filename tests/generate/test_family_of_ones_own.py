"""What a family may override: how its features enter the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.generate import families
from tests.support.cases import slow_unless
from tests.support.models import inputs, tiny_llava
from tests.support.models_qwen import qwen_inputs, tiny_qwen3_vl
from tests.support.oracle import oracle_generate

SCHEDULE = Schedule(merge=Merge("width", keep=0.5, layer=0), prune=Prune(keep=0.5, layer=1))


@pytest.mark.parametrize("name", slow_unless(["llava", "qwen3"], ["qwen3"]))
@torch.no_grad()
def test_features_that_enter_as_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers 5.17, whose forwards take no features: the encoder is asked for those of its pixels.

    One class in front of the others does it, and late features come along.
    """
    model: Any
    if name == "llava":
        model = tiny_llava(grid=4, encoder_layers=1, decoder_layers=2, vision_feature_layer=-1)
        prompt = inputs(model)
    else:
        model = tiny_qwen3_vl(decoder_layers=2)
        prompt = qwen_inputs(model, [[3, ("image", 8, 8), 2]])
    wanted = oracle_generate(model, SCHEDULE, 3, **prompt)
    entered: list[str] = []

    def enter(kwargs: dict[str, Any], modality: families.Modality, *features: Any) -> dict[str, Any]:
        entered.append(modality.pixels)
        return families.in_place_of_pixels(kwargs, modality, *features)

    class ByPixels(type(families.family_of(model))):  # type: ignore[misc]
        def feature_entry(self) -> Callable[..., dict[str, Any]]:
            return enter

    monkeypatch.setattr(families, "FAMILIES", (ByPixels, *families.FAMILIES))
    with luvc_fx.applied(model, SCHEDULE, inner="eager", strict=True):
        got = model.generate(**prompt, max_new_tokens=3, do_sample=False)
        assert luvc_fx.report_of(model).of_kind("prefill")[0].inserted
    assert torch.equal(got, wanted)
    assert set(entered) == {"pixel_values"}
