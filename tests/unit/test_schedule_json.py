"""A schedule is the same after JSON, and bad JSON says what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.schedule import (
    AXES,
    COVERAGES,
    ENERGIES,
    FEATURES,
    METHODS,
    NORMALIZATIONS,
    PAIRINGS,
    REALIZATIONS,
    SELECTORS,
    Merge,
    Prune,
    Schedule,
)
from tests.support.oracle import schedules


@given(schedules(blocks=5, grid=(7, 9), layers=6))
def test_json_round_trip(schedule: Schedule) -> None:
    text = schedule.to_json()
    again = Schedule.from_json(text)
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.to_json() == text
    assert json.loads(text)["version"] == 1


@given(
    st.sampled_from(SELECTORS),
    st.sampled_from(ENERGIES),
    st.sampled_from(COVERAGES),
    st.floats(0.0, 1.0),
    st.floats(0.001, 1.0),
    st.integers(0, 2**40),
    st.tuples(st.sampled_from(NORMALIZATIONS), st.booleans(), st.sampled_from(REALIZATIONS), st.booleans()),
)
def test_json_keeps_every_field_of_a_prune(
    selector: str,
    energy: str,
    coverage: str,
    keep: float,
    cutoff: float,
    seed: int,
    the_rest: tuple[str, bool, str, bool],
) -> None:
    how = (selector, energy, coverage, cutoff, seed, *the_rest)
    prune = Prune(keep, None, -3, None, *how)
    assert dataclasses.astuple(prune)[4:] == how, "a field without a test"
    assert Schedule.from_json(Schedule(prune=prune).to_json()).prune == (prune,)


@given(
    st.sampled_from(AXES),
    st.floats(0.01, 1.0),
    st.sampled_from(PAIRINGS),
    st.sampled_from(FEATURES),
    st.sampled_from(METHODS),
)
def test_json_keeps_every_field_of_a_merge(
    axis: str, keep: float, pairing: str, feature: str, method: str
) -> None:
    merge = Merge(axis, keep, None, -2, None, pairing, feature, method)
    assert dataclasses.astuple(merge) == (axis, keep, None, -2, None, pairing, feature, method)
    assert Schedule.from_json(Schedule(merge=merge).to_json()).merge == (merge,)


def test_json_from_before_the_newest_fields_means_what_it_meant() -> None:
    text = """{"version": 1,
        "merge": [{"axis": "width", "keep": 0.75, "depth": 0.5}],
        "prune": [{"keep": 0.5, "layer": 2, "selector": "spectrum", "energy": "residual",
                   "coverage": "block", "cutoff": 0.25, "seed": 0}]}"""
    merge, prune = Merge("width", keep=0.75, depth=0.5), Prune(keep=0.5, layer=2)
    assert Schedule.from_json(text) == Schedule(merge, prune)
    assert (merge.pairing, merge.feature, merge.method) == ("line", "hidden", "oim")
    newest = (prune.normalize, prune.per_image, prune.realization, prune.absorb)
    assert newest == ("none", False, "auto", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a schedule must be JSON"),
        ("[]", "Schedule.JSON is []; allowed: an object"),
        ("{}", "Schedule.version is None; allowed: 1"),
        ('{"version": 2}', "Schedule.version is 2; allowed: 1"),
        ('{"version": 1, "prunes": []}', "Schedule has unknown keys ['prunes']; allowed: ['merge', 'prune',"),
        ('{"version": 1, "merge": {}}', "Schedule.merge is {}; allowed: a list of objects"),
        ('{"version": 1, "prune": [3]}', "Schedule.prune is [3]; allowed: a list of objects"),
        (
            '{"version": 1, "prune": [{"keep": 0.5, "layer": 0, "ratio": 1}]}',
            "Prune has unknown keys ['ratio']",
        ),
        ('{"version": 1, "merge": [{"keep": 0.5, "layer": 0}]}', "Merge.axis is None; allowed: 'width'"),
        (
            '{"version": 1, "prune": [{"keep": 2, "layer": 0}]}',
            "Prune.keep is 2; allowed: a number in [0, 1]",
        ),
        ('{"version": 1, "prune": [{"keep": NaN, "layer": 0}]}', "Prune.keep is nan; allowed"),
    ],
)
def test_bad_json_is_a_value_error_that_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Schedule.from_json(text)
    assert message in str(caught.value)


def test_version_true_is_not_version_one() -> None:
    with pytest.raises(ValueError, match=r"Schedule\.version is True"):
        Schedule.from_json('{"version": true}')


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    schedule = Schedule.preset("video")
    path.write_text(schedule.to_json(), encoding="utf-8")
    assert Schedule.load(path) == Schedule.load(str(path)) == schedule
    with pytest.raises(OSError):
        Schedule.load(tmp_path / "none.json")
