"""`examples/own_selector.py` runs, and its choice decides."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import Prune, Schedule, selectors
from luvc_fx.apps.demo import load_model
from luvc_fx.ops import reference
from luvc_fx.report import Reason
from tests.support.paths import EXAMPLES
from tests.support.replay import capture, quietly, toy, toy_inputs, toy_whole

EXAMPLE = EXAMPLES / "own_selector.py"


@pytest.fixture(autouse=True)
def names_of_this_test_only() -> Iterator[None]:
    before = selectors.registered()
    yield
    for name in set(selectors.registered()) - set(before):
        selectors.unregister(name)


def test_the_example_answers(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))["main"]("eager")
    out = capsys.readouterr().out
    assert "prune before decoder layer 2: contrast 256 -> 64" in out
    question, _, answer = out.splitlines()[-1].partition("?")
    assert question and answer.strip()


@torch.no_grad()
def test_its_choice_decides_what_stays() -> None:
    schedule = runpy.run_path(str(EXAMPLE))["schedule"]
    model, _ = load_model()
    generator = torch.Generator().manual_seed(0)
    size, image = model.config.vision_config.image_size, model.config.image_token_id
    ids = torch.tensor([[5, 6, *[image] * 256, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size, generator=generator)}
    entering: list[Any] = []
    handle = model.model.language_model.layers[2].register_forward_pre_hook(
        lambda _, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model(**inputs)
    handle.remove()
    x = entering[0][:, 2:258].float()
    scores = (x - x.mean(1, keepdim=True)).square().sum(-1).numpy()
    want = 2 + torch.from_numpy(reference.select_blocks(scores, 64, (16, 16)))

    luvc_fx.compile(model, schedule, inner="eager", strict=True)
    rows = model(**inputs).row_index[0]
    assert rows.tolist() == [0, 1, *want[0].tolist(), 258, 259]
    with luvc_fx.applied(model, Schedule(prune=Prune(keep=0.25, layer=2)), inner="eager", strict=True):
        assert model(**inputs).row_index[0].tolist() != rows.tolist()


def test_a_selector_that_breaks_its_promise_is_in_the_report_and_nothing_is_pruned() -> None:
    luvc_fx.register_selector("short", lambda x, prune, count, site: x[:, :-1, 0])
    schedule = Schedule(prune=Prune(tokens=4, layer=1, selector="short"))
    _, _, report = toy_whole().rewritten(quietly(schedule))
    (refusal,) = report.refusals
    assert refusal.reason is Reason.PASS_FAILED
    assert "ValueError: selector 'short' returned torch.float32 [2, 15]; allowed: a tensor" in refusal.text
    with pytest.raises(ValueError, match="selector 'short' returned"):
        toy_whole().rewritten(luvc_fx.backend(schedule, inner="eager", strict=True))


def test_a_selector_is_told_layers_grid_and_images() -> None:
    told = []

    def ask(x: torch.Tensor, prune: Prune, count: int, site: selectors.Site) -> torch.Tensor:
        told.append((tuple(x.shape), count, site))
        return x[..., 0]

    luvc_fx.register_selector("ask", ask)
    asks = tuple(Prune(tokens=n, layer=layer, selector="ask") for n, layer in ((8, 1), (4, 2)))
    toy_whole().rewritten(luvc_fx.backend(Schedule(prune=asks), inner="eager", strict=True))
    assert told == [
        ((2, 16, 8), 8, selectors.Site(1, 3, (4, 4), 1)),
        ((2, 8, 8), 4, selectors.Site(2, 3, None, 1)),
    ]


def test_per_image_without_a_grid_is_noted() -> None:
    captured = capture(toy(conv=False), **toy_inputs(conv=False))
    schedule = Schedule(
        prune=(Prune(tokens=8, layer=1, per_image=True), Prune(tokens=4, layer=2, per_image=True))
    )
    _, _, report = captured.rewritten(quietly(schedule))
    (note,) = [note for note in report.notes if "per_image" in note]
    assert note.startswith("before decoder layer 1 the images of a row cannot be told apart")
