"""What two threads that use one compiled model may not disturb: graphs made once, encoders without state."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import luvc_fx
from luvc_fx import Merge, Schedule
from luvc_fx.generate.frontdoor import door_of
from tests.support.models import inputs, tiny_llava

MERGE = Schedule(merge=Merge("width", keep=0.5, layer=0))


def small() -> Any:
    return tiny_llava(grid=4, encoder_layers=1, decoder_layers=1, vision_feature_layer=-1)


def test_threads_that_ask_for_a_decode_mode_at_once_have_it_made_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each second of the two would compile everything again, and push the first one's graphs out."""
    model = small()
    luvc_fx.compile(model, MERGE)
    both_are_here = threading.Barrier(2)
    made: list[Callable[..., Any]] = []

    def made_slowly(body: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        made.append(body)
        # A second thread that gets in meets the first one here; where none can, this one goes on.
        with contextlib.suppress(threading.BrokenBarrierError):
            both_are_here.wait(timeout=3)
        return body

    monkeypatch.setattr(torch, "compile", made_slowly)
    ids = torch.tensor([[4, 8, 15, 16]])
    config = CompileConfig(mode="max-autotune-no-cudagraphs")
    answers: list[list[int]] = []

    def ask() -> None:
        with torch.no_grad():
            said = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=2,
                do_sample=False,
                cache_implementation="static",
                compile_config=config,
            )
        answers.append(said[0].tolist())

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 2 and answers[0] == answers[1]
    assert len(made) == 1


@torch.no_grad()
def test_a_call_leaves_nothing_on_an_encoder() -> None:
    """Another thread's call, with images of which the model gives features in another form, may be next."""
    model = small()
    pixels = inputs(model, images=2)["pixel_values"]
    stock = model.base_model.get_image_features

    def stacked_or_apart(pixel_values: torch.Tensor, **options: Any) -> Any:
        output = stock(pixel_values=pixel_values, **options)
        parts = list(output.pooler_output)
        output.pooler_output = torch.stack(parts) if len(parts) == 1 else parts
        return output

    model.base_model.get_image_features = stacked_or_apart
    luvc_fx.compile(model, MERGE, inner="eager")
    encoder = door_of(model).graphs.encoders["image"]
    before = dict(vars(encoder))
    two, one = (encoder(pixels[:n], {}, merge=False, rows=1).pooler_output for n in (2, 1))
    assert isinstance(one, torch.Tensor) and one.shape[:2] == (1, 16)
    assert [part.shape[0] for part in two] == [16, 16] and not isinstance(two, torch.Tensor)
    assert vars(encoder) == before
