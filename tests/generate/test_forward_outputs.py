"""What a forward of a shortened prompt returns: tuples, and the logits of the rows that were asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.report import Reason
from tests.support.family_matrix import FAMILIES
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_continue, oracle_forward, oracle_generate

SCHEDULE = Schedule(
    merge=(Merge("width", keep=0.5, layer=0),),
    prune=(Prune(keep=0.5, layer=1), Prune(keep=0.25, layer=2)),
)
TEXT = (3, 5)


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[Any, Any]]:
    """One that is compiled, and its stock twin."""
    made = tiny_llava(decoder_layers=3, encoder_layers=2, grid=4)
    stock = copy.deepcopy(made)
    luvc_fx.compile(made, SCHEDULE, inner="eager", on_no_match="ignore")
    with torch.no_grad():
        yield made, stock
    luvc_fx.restore(made)


def test_a_tuple_where_it_is_asked_for(models: Any) -> None:
    model, stock = models
    prompt = inputs(model)
    wanted, named = stock(**prompt, return_dict=False), model(**prompt)
    got = model(**prompt, return_dict=False)
    assert type(got) is tuple
    assert list(map(type, got))[::2] == list(map(type, wanted))[::2], "the logits and the images"
    assert torch.equal(got[0], named.logits)
    step = model(input_ids=torch.tensor([[5]]), past_key_values=got[1], return_dict=False)
    assert torch.equal(
        step[0], model(input_ids=torch.tensor([[5]]), past_key_values=named.past_key_values)[0]
    )


ASKED: dict[str, Any] = {
    "the last": 1,
    "all": 0,
    "the last few": 4,
    "more than are left": 23,
    "rows": torch.tensor([23, 0, 2, 20]),
    "from the end": torch.tensor([-1, -5, 1]),
    "a mask of rows": torch.arange(24) > 20,
    "rows of each prompt": torch.tensor([[0, 23], [22, 1]]),
    "a mask": torch.stack([torch.arange(24) > 20, torch.arange(24) < 2]),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_logits_that_are_asked_for_and_their_rows(models: Any, name: str) -> None:
    """By the rows of the whole prompt, as the stock model takes them; a number counts those that are left."""
    model, stock = models
    asked = ASKED[name]
    prompt = inputs(model, batch=2, text=TEXT)
    want = oracle_forward(stock, SCHEDULE, **prompt)
    luvc_fx.report_of(model).refusals.clear()
    out = model(**prompt, logits_to_keep=asked)
    assert luvc_fx.report_of(model).refusals == []
    if isinstance(asked, int):
        logits, rows = want.logits[:, -asked:], want.rows[:, -asked:]
    else:
        shape = stock(**prompt, logits_to_keep=asked).logits.shape
        assert out.logits.shape == shape
        rows = rows_of_the_prompt(asked)
        logits = torch.empty(shape)
        for place in torch.cartesian_prod(*map(torch.arange, rows.shape)).reshape(-1, rows.dim()).tolist():
            row = batch_row(asked, place)
            (found,) = (want.rows[row] == rows[tuple(place)]).nonzero().flatten()
            logits[tuple(place)] = want.logits[row, found]
    torch.testing.assert_close(out.logits, logits, atol=2e-5, rtol=1e-5)
    assert torch.equal(out.row_index, rows)


def test_numbers_of_earlier_calls_do_not_matter(models: Any) -> None:
    """Dynamo makes a symbol of an argument that was another number before."""
    model, stock = models
    prompt = inputs(model)
    luvc_fx.report_of(model).refusals.clear()
    step = torch.tensor([[5, 6, 7]])
    for asked in (2, 3):
        assert model(input_ids=step, logits_to_keep=asked).logits.shape[1] == asked
        over = model(**prompt).past_key_values
        want = oracle_continue(stock, oracle_forward(stock, SCHEDULE, **prompt).state, step)
        got = model(input_ids=step, past_key_values=over, logits_to_keep=asked).logits
        torch.testing.assert_close(got, want[:, -asked:], atol=2e-5, rtol=1e-5)
    said = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert torch.equal(said, oracle_generate(stock, SCHEDULE, 2, **prompt))
    assert luvc_fx.report_of(model).all_refusals() == []


def rows_of_the_prompt(asked: Tensor) -> Tensor:
    """What the stock model makes of it, applied to the numbers of the rows."""
    numbers = torch.arange(24).expand(2, 24)
    if asked.dim() == 1:
        return numbers[:, asked]
    return numbers[asked] if asked.dtype == torch.bool else numbers.gather(1, asked)


def batch_row(asked: Tensor, place: list[int]) -> int:
    return int(asked.nonzero()[place[0], 0]) if asked.dim() == 2 and asked.dtype == torch.bool else place[0]


@pytest.mark.parametrize("kind", ["rows of visual tokens", "beside labels"])
def test_what_only_the_whole_prompt_has_is_left_alone(models: Any, kind: str) -> None:
    model, stock = models
    prompt = inputs(model, batch=2, text=TEXT)
    asked: dict[str, Any] = {"logits_to_keep": torch.tensor([5, 23])}
    if kind == "beside labels":
        asked = {"logits_to_keep": torch.arange(24), "labels": prompt["input_ids"]}
    luvc_fx.report_of(model).refusals.clear()
    out, wanted = model(**prompt, **asked), stock(**prompt, **asked)
    torch.testing.assert_close(out.logits, wanted.logits, atol=2e-5, rtol=1e-5)
    (refusal,) = luvc_fx.report_of(model).refusals
    assert refusal.reason is Reason.INPUTS
    assert kind in refusal.text
    assert refusal.text.endswith(": all visual tokens stay")


@pytest.mark.slow
@torch.no_grad()
def test_a_tuple_where_the_config_says_so() -> None:
    """LLaVA-NeXT: others fail with it in transformers (5.23), where an inner model returns tuples, too."""
    family = FAMILIES["next"]
    model = family.make(**family.size)
    prompt = family.prompt(model, [[3, ("image", 16, 32), 4]], 0, 0)
    want = oracle_forward(model, SCHEDULE, **prompt)
    model.config.return_dict = False
    wanted = model(**prompt)
    luvc_fx.compile(model, SCHEDULE, inner="eager", strict=True)
    got = model(**prompt)
    assert type(got) is tuple
    assert len(got) == len(wanted)
    torch.testing.assert_close(got[0], want.logits, atol=2e-5, rtol=1e-5)
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
