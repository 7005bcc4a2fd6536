"""What `restore` leaves behind: nothing, so a model that could be pickled before can be pickled again."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import Schedule
from tests.support.models import inputs, tiny_llava


def state(model: Any) -> dict[str, Any]:
    """All attributes of all modules but tensors, hooks by their number."""
    return {
        f"{name}.{key}": len(value) if "hooks" in key and hasattr(value, "__len__") else id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def reloaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("times", [1, 2])
def test_a_model_is_what_it_was_and_can_be_saved(times: int) -> None:
    model = tiny_llava()
    before = state(model)
    for schedule in (Schedule(), "image")[:times]:
        luvc_fx.compile(model, schedule, inner="eager", on_no_match="ignore")
    assert luvc_fx.restore(model) is model
    assert state(model) == before
    copy = reloaded(model)
    given = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(copy(**given).logits, model(**given).logits, rtol=0, atol=0)


def test_hooks_that_others_put_on_stay() -> None:
    model = tiny_llava()
    ours = model.lm_head.register_forward_hook(lambda *_: None)
    luvc_fx.prepare(model)
    prepared = state(model)
    luvc_fx.restore(luvc_fx.compile(model, Schedule(), inner="eager"))
    assert state(model) == prepared
    assert ours.id in model.lm_head._forward_hooks
