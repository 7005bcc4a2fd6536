"""Processes that fork from one with a compiled model, or start afresh beside it, answer as it does."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from tests.support.cases import slow_unless
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_generate

SCHEDULE = Schedule(merge=Merge("width", keep=0.5, layer=0), prune=Prune(keep=0.5, layer=1))
NEW_TOKENS = 3
SECONDS = 300


def make() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A model, and prompts of which the second has another number of images."""
    model = tiny_llava(grid=4, encoder_layers=2, decoder_layers=2)
    return model, [inputs(model), inputs(model, images=2, seed=1)]


@torch.no_grad()
def answers(model: Any, prompts: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [
        model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist() for prompt in prompts
    ]


def child_of_a_fork(model: Any, prompts: list[dict[str, torch.Tensor]], out: Path) -> None:
    """What was compiled before the fork, and a size that is new to this process."""
    torch.set_num_threads(1)  # OpenMP's threads do not come along
    graphs = len(luvc_fx.report_of(model).graphs)
    said = answers(model, prompts[:1])
    again = len(luvc_fx.report_of(model).graphs) - graphs
    out.write_bytes(pickle.dumps((said + answers(model, prompts[1:]), again)))


def child_that_starts_afresh(inner: str, out: Path) -> None:
    model, prompts = make()
    luvc_fx.compile(model, SCHEDULE, inner=inner, strict=True)
    out.write_bytes(pickle.dumps((answers(model, prompts), 0)))


@pytest.mark.parametrize(
    ("start", "inner"),
    slow_unless(
        [("fork", "eager"), ("fork", "inductor"), ("spawn", "eager"), ("spawn", "inductor")],
        [("fork", "eager")],
    ),
)
@torch.no_grad()
def test_a_child_answers_as_its_parent(start: str, inner: str, tmp_path: Path) -> None:
    model, prompts = make()
    wanted = [oracle_generate(model, SCHEDULE, NEW_TOKENS, **prompt)[0].tolist() for prompt in prompts]
    luvc_fx.compile(model, SCHEDULE, inner=inner, strict=True)
    assert answers(model, prompts[:1]) == wanted[:1]
    out = tmp_path / "answers"
    context: Any = multiprocessing.get_context(start)
    given = (
        (child_of_a_fork, (model, prompts, out))
        if start == "fork"
        else (child_that_starts_afresh, (inner, out))
    )
    child = context.Process(target=given[0], args=given[1])
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        pytest.fail("the child hangs")
    assert child.exitcode == 0
    said, compiled_again = pickle.loads(out.read_bytes())
    assert (said, compiled_again) == (wanted, 0)
    # and the parent is none the worse for it
    assert answers(model, prompts) == wanted


@pytest.mark.parametrize(
    "part", [lambda model: model, lambda model: model.base_model, lambda model: torch.nn.Sequential(model)]
)
def test_a_compiled_model_is_not_sent_to_another_process(part: Any) -> None:
    """Whatever does it; by name, not by transformers' hooks that cannot be pickled."""
    model, _ = make()
    luvc_fx.compile(model, SCHEDULE, inner="eager")
    sent = part(model)
    spawn: Any = multiprocessing.get_context("spawn")
    ways = (
        lambda: spawn.Process(target=answers, args=(sent, [])).start(),
        lambda: pickle.dumps(sent),
        lambda: torch.save(sent, io.BytesIO()),
        lambda: copy.deepcopy(sent),
        lambda: copy.copy(sent),
    )
    for way in ways:
        if isinstance(sent, torch.nn.Sequential) and way is ways[-1]:
            continue  # holds the same instance
        with pytest.raises(
            ValueError, match=r"cannot be copied or pickled: .*luvc_fx\.restore\(model\) first"
        ):
            way()
    luvc_fx.restore(model)
    assert not {"__reduce_ex__"} & {*vars(model), *vars(model.base_model)}
