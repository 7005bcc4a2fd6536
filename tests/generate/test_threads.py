"""What threads that use one compiled model may not disturb: graphs made once, answers, encoders."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.generate.frontdoor import door_of
from tests.support.cases import slow_unless
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_generate

MERGE = Schedule(merge=Merge("width", keep=0.5, layer=0))
BOTH = Schedule(merge=Merge("width", keep=0.5, layer=0), prune=Prune(keep=0.5, layer=1))
NEW_TOKENS = 4
SECONDS = 300
"""How long a thread waits for the others before it is a failure."""


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


class WaitsInside:
    """A compiler behind luvc_fx that, in one thread, waits until the others have answered once more."""

    def __init__(self, inner: str, others: int) -> None:
        self.compile: Callable[..., Any] = torch._dynamo.lookup_backend(inner)
        self.thread = 0
        self.begun, self.answered = threading.Event(), threading.Semaphore(0)
        self.others = others

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        if threading.get_ident() == self.thread and not self.begun.is_set():
            self.begun.set()
            for _ in range(self.others):
                assert self.answered.acquire(timeout=SECONDS), "the others wait for the compiler"
        return self.compile(gm, example_inputs)


@pytest.mark.parametrize("inner", slow_unless(["eager", "inductor"], ["eager"]))
@torch.no_grad()
def test_threads_generate_while_another_compiles_a_new_size(inner: str) -> None:
    """Their answers are the oracle's before, while and after it compiles, and so is its own."""
    model = tiny_llava(grid=4, encoder_layers=2, decoder_layers=2)
    generating = [inputs(model), inputs(model, batch=2, padding=(0, 2), seed=1)]
    compiling = inputs(model, images=2, seed=2)
    wanted = [oracle_generate(model, BOTH, NEW_TOKENS, **prompt) for prompt in (*generating, compiling)]
    compiler = WaitsInside(inner, len(generating))
    luvc_fx.compile(model, BOTH, inner=compiler, strict=True)
    answers: list[tuple[int, torch.Tensor]] = []
    errors: list[BaseException] = []

    def generate(number: int) -> None:
        prompt = (*generating, compiling)[number]
        with torch.no_grad():
            answers.append((number, model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)))

    def goes_on(number: int) -> None:
        assert compiler.begun.wait(SECONDS)
        generate(number)
        compiler.answered.release()
        generate(number)

    def compiles(number: int) -> None:
        compiler.thread = threading.get_ident()
        generate(number)

    def noted(work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    for number in range(len(generating)):
        generate(number)
    graphs = len(luvc_fx.report_of(model).graphs)
    works = [goes_on] * len(generating) + [compiles]
    threads = [threading.Thread(target=noted, args=(work, number)) for number, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(number for number, _ in answers) == [0, 0, 0, 1, 1, 1, 2]
    for number, answer in answers:
        assert torch.equal(answer, wanted[number])
    assert {graph.kind for graph in luvc_fx.report_of(model).graphs[graphs:]} >= {"vision"}


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
