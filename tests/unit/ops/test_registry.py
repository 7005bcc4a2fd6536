"""Selectors of a third party: registered by name, asked at a site, held to shape, dtype and count."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import luvc_fx
from luvc_fx.ops import select_blocks, select_global
from luvc_fx.schedule import Prune, Schedule
from luvc_fx.selectors import SELECTORS as REGISTRY
from luvc_fx.selectors import SHIPPED, Site, choose, register, registered, unregister

X = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
SITE = Site(2, 4, (4, 4), 1)


@pytest.fixture(autouse=True)
def names_of_this_test_only():
    yield
    for name in set(registered()) - set(SHIPPED):
        unregister(name)


def asked(answer, count=5, x=X, site=SITE, **options):
    """What `choose` makes of a selector that gives `answer`, a value or a function."""
    register("mine", answer if callable(answer) else lambda x, prune, count, site: answer)
    return choose(x, Prune(keep=0.5, layer=0, selector="mine", **options), count, site)


def test_ours_are_registered_under_the_names_that_schedules_allow():
    assert registered()[: len(SHIPPED)] == SHIPPED
    assert luvc_fx.register_selector is register


def test_a_schedule_takes_a_name_once_it_is_registered():
    text = Schedule(prune=Prune(keep=0.5, layer=0)).to_json().replace("spectrum", "mine")
    for make in (lambda: Prune(keep=0.5, layer=0, selector="mine"), lambda: Schedule.from_json(text)):
        with pytest.raises(ValueError, match=r"Prune\.selector is 'mine'; allowed: .*'uniform'"):
            make()
    register("mine", lambda x, prune, count, site: x[..., 0])
    assert Schedule.from_json(text).prune == (Prune(keep=0.5, layer=0, selector="mine"),)
    with pytest.raises(ValueError, match=r"Prune\.selector is 'yours'; allowed: .*'uniform'.*, 'mine'$"):
        Prune(keep=0.5, layer=0, selector="yours")


def test_a_name_keeps_its_function():
    def first(x, prune, count, site):
        return x[..., 0]

    register("mine", first)
    register("mine", first)
    assert registered().count("mine") == 1
    for name, known in (("mine", "<function"), ("spectrum", "<class")):
        with pytest.raises(ValueError, match=f"selector '{name}' is registered already, as {known}"):
            register(name, lambda x, prune, count, site: x[..., 1])
    got = choose(X, Prune(keep=0.5, layer=0, selector="mine", coverage="global"), 5, SITE)
    assert torch.equal(got, select_global(X[..., 0], 5))


@pytest.mark.parametrize(
    "name, function, message",
    [
        ("", print, "the name of a selector is ''; allowed: a text that is not empty"),
        (None, print, "the name of a selector is None"),
        (3, print, "the name of a selector is 3"),
        ("mine", 3, "selector 'mine' is 3; allowed: a function"),
        ("mine", None, "selector 'mine' is None; allowed: a function"),
    ],
)
def test_refuses_to_register(name, function, message):
    with pytest.raises(ValueError) as caught:
        register(name, function)
    assert str(caught.value).startswith(message)
    assert "mine" not in registered()


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(ValueError, match=f"'mine' is not registered; there are {SHIPPED[0]!r}, "):
        REGISTRY.get("mine")
    with pytest.raises(ValueError, match=r"'norm' is no registered function"):
        unregister("norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_selected_by_coverage(dtype):
    scores = X.sum(-1).to(dtype)
    assert torch.equal(asked(scores, 4), select_blocks(scores, 4, (4, 4)))
    assert not torch.equal(select_blocks(scores, 4, (4, 4)), select_blocks(scores, 4, None))


def test_scores_are_selected_globally_too():
    scores = X.sum(-1)
    assert torch.equal(asked(scores, 5, coverage="global"), select_global(scores, 5))


def test_positions_are_taken_as_they_are():
    positions = torch.tensor([[5, 1, 15], [0, 2, 1]])
    assert torch.equal(asked(positions, 3), positions)


def test_the_selector_is_told_where_it_is():
    told = []

    def mine(x, prune, count, site):
        told.append((x, prune, count, site))
        return x[..., 0]

    asked(mine, 7, seed=3)
    ((x, prune, count, site),) = told
    assert x is X and prune.seed == 3 and count == 7 and site == Site(2, 4, (4, 4), 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        site.layer = 1


@pytest.mark.parametrize("count", [0, 16])
def test_the_selector_is_not_asked_where_there_is_no_choice(count):
    def never(x, prune, count, site):
        raise AssertionError

    assert torch.equal(asked(never, count), torch.arange(count).expand(2, count))


@pytest.mark.parametrize(
    "answer, got",
    [
        (None, "NoneType"),
        ([1, 2, 3, 4, 5], "list"),
        (torch.zeros(2, 15), r"torch.float32 \[2, 15\]"),
        (torch.zeros(16), r"torch.float32 \[16\]"),
        (torch.zeros(2, 16, 1), r"torch.float32 \[2, 16, 1\]"),
        (torch.zeros(1, 16), r"torch.float32 \[1, 16\]"),
        (torch.zeros(2, 5), r"torch.float32 \[2, 5\]"),
        (torch.zeros(2, 16, dtype=torch.int64), r"torch.int64 \[2, 16\]"),
        (torch.zeros(2, 4, dtype=torch.int64), r"torch.int64 \[2, 4\]"),
        (torch.zeros(5, dtype=torch.int64), r"torch.int64 \[5\]"),
        (torch.zeros(2, 5, dtype=torch.int32), r"torch.int32 \[2, 5\]"),
        (torch.zeros(2, 16, dtype=torch.bool), r"torch.bool \[2, 16\]"),
        (torch.zeros(2, 16, dtype=torch.complex64), r"torch.complex64 \[2, 16\]"),
    ],
)
def test_refuses_what_is_neither_scores_nor_positions(answer, got):
    allowed = r"floating scores \[2, 16\] or torch.int64 positions \[2, 5\]"
    with pytest.raises(
        ValueError, match=rf"selector 'mine' returned {got}; allowed: a tensor, either {allowed}"
    ):
        asked(answer)


@pytest.mark.parametrize("wrong", [[0, 1, 1], [0, 1, 16], [0, 1, -1]], ids=["twice", "too high", "negative"])
@pytest.mark.parametrize("inductor", [False, True], ids=["eager", "inductor"])
def test_positions_that_repeat_or_lie_outside_fail_at_run_time(wrong, inductor, compiled):
    register("mine", lambda x, prune, count, site: x[:, :count, 0].to(torch.int64))
    item = Prune(keep=0.5, layer=0, selector="mine")

    def run(x):
        return choose(x, item, 3, SITE)

    run = compiled(run) if inductor else run
    good = torch.zeros(2, 16, 1)
    good[:, :3, 0] = torch.tensor([[3.0, 0.0, 9.0], [1.0, 2.0, 15.0]])
    assert run(good).tolist() == [[3, 0, 9], [1, 2, 15]]
    bad = good.clone()
    bad[1, :3, 0] = torch.tensor(wrong).float()
    with pytest.raises(
        RuntimeError, match=r"selector 'mine' returned positions that repeat or are not in 0 .. 15"
    ):
        run(bad)
