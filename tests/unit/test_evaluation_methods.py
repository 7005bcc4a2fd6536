"""Methods meet their budgets, or say that they cannot."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.apps.evaluation.methods import FASTV_LAYER, MERGED_WIDTH, methods
from luvc_fx.schedule import Schedule
from luvc_fx.schedule.budget import cascade

BUDGETS = st.floats(0.01, 1.0)
LAYERS = st.integers(2, 48)
SAME_COUNTS = ("luvc", "random", "random-block", "uniform", "norm", "diversity")


def tokens(schedule: Schedule, layers: int, fused: int) -> list[int]:
    """Visual tokens entering each layer, by what the schedule itself says."""
    found, sites, count = [], dict(schedule.prunes_at(layers, fused)), fused
    for layer in range(layers):
        count = sites[layer].count(fused) if layer in sites else count
        found.append(count)
    return found


@given(BUDGETS, LAYERS, st.integers(16, 2048), st.sampled_from(list(methods())))
def test_the_mean_is_the_budget(budget: float, layers: int, visual: int, name: str) -> None:
    method = methods()[name]
    schedule = method.make(budget, layers)
    if schedule is None or method.own_budget or method.smaller:
        return
    fused = round(MERGED_WIDTH * visual) if schedule.merge else visual
    found = tokens(schedule, layers, fused)
    tolerance = visual / (2 * layers) if name == "vtw" else 1.0
    assert abs(sum(found) / layers - budget * visual) <= tolerance + 1e-6


@given(BUDGETS, LAYERS)
def test_the_cascade_falls_and_ends_at_nothing(budget: float, layers: int) -> None:
    places = cascade(budget, layers)
    if places is None:
        assert budget * layers > layers - 1
        return
    keeps = [1.0, *(keep for _, keep in places)]
    assert places[-1] == (layers - 1, 0.0)
    assert all(after < before for before, after in itertools.pairwise(keeps))
    assert [layer for layer, _ in places] == sorted({layer for layer, _ in places})


def test_cascades_by_hand() -> None:
    assert cascade(0.25, 16) == ((1, 0.5), (3, 0.25), (7, 0.125), (15, 0.0))  # 1 + 1 + 1 + 1 of 16 layers
    assert cascade(0.75, 16) == ((9, 0.5), (15, 0.0))  # 9 + 6 / 2
    assert cascade(0.125, 16) == ((0, 0.5), (1, 0.25), (3, 0.125), (7, 0.0625), (15, 0.0))
    assert cascade(15 / 16, 16) == ((15, 0.0),)
    assert cascade(0.95, 16) is None and cascade(0.5, 1) is None


@pytest.mark.parametrize("name", SAME_COUNTS)
def test_controls_prune_where_the_spectrum_does(name: str) -> None:
    spectrum, control = (methods()[n].make(0.33, 16) for n in ("spectrum", name))
    assert spectrum is not None and control is not None
    assert tokens(spectrum, 16, 256) == tokens(control, 16, 256)
    assert {prune.selector.name for prune in control.prune} == {"spectrum" if name == "luvc" else name}
    assert spectrum != control


def test_what_methods_cannot_reach() -> None:
    """FastV has all tokens in its first layers, and the cascade none in the last."""
    found = methods()
    fastv = found["fastv"].make(0.25, 16)
    assert fastv is not None and fastv.prune[0].layer == FASTV_LAYER
    assert found["fastv"].make(0.125, 16) is None
    assert found["spectrum"].make(1.0, 16) is None
    assert found["vtw"].make(0.01, 16) is None
    assert found["default+merge"].make(0.75, 16) is None
    assert found["last"].own_budget and found["last"].make(0.1, 16) == found["last"].make(1.0, 16)


@pytest.mark.parametrize("name", ["spectrum", "random-block", "norm", "diversity"])
def test_coverage_is_told_apart_from_the_ranking(name: str) -> None:
    """The spectrum and `random-block` differ in the scores alone; the texts say who picks from blocks."""
    method = methods()[name]
    made = method.make(0.33, 16)
    assert made is not None
    assert {prune.coverage for prune in made.prune} == {"global" if name == "norm" else "block"}
    assert ("each block" in method.about) == (name != "norm")


def test_vtw_says_which_rule() -> None:
    made = methods()["vtw"].make(0.22, 16)
    assert made is not None and made.prune[0].layer == 4, "round(3.52)"
    assert "K = round(p L)" in methods()["vtw"].about
