"""A schedule is the same after JSON, and bad JSON says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx import selectors
from luvc_fx.mergers import MERGERS
from luvc_fx.schedule import (
    AXES,
    COVERAGES,
    ENERGIES,
    FEATURES,
    METHODS,
    NORMALIZATIONS,
    PAIRINGS,
    REALIZATIONS,
    Merge,
    Prune,
    Schedule,
)
from tests.support.oracle import schedules

PRUNE_PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "energy": st.sampled_from(ENERGIES),
    "cutoff": st.floats(0.001, 1.0),
    "seed": st.integers(0, 2**40),
    "normalize": st.sampled_from(NORMALIZATIONS),
    "per_image": st.booleans(),
    "realization": st.sampled_from(REALIZATIONS),
}
MERGE_PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "pairing": st.sampled_from(PAIRINGS),
    "feature": st.sampled_from(FEATURES),
}


@given(schedules(blocks=5, grid=(7, 9), layers=6))
def test_json_round_trip(schedule: Schedule) -> None:
    text = schedule.to_json()
    again = Schedule.from_json(text)
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.to_json() == text
    assert json.loads(text)["version"] == 1


@given(
    st.sampled_from(selectors.SHIPPED),
    st.sampled_from(COVERAGES),
    st.floats(0.0, 1.0),
    st.booleans(),
    st.data(),
)
def test_json_keeps_every_field_of_a_prune(
    selector: str, coverage: str, keep: float, absorb: bool, data: st.DataObject
) -> None:
    own = selectors.SELECTORS.get(selector).parameters()
    how = {name: data.draw(PRUNE_PARAMETERS.get(name, st.just(value))) for name, value in own.items()}
    prune = Prune(keep, layer=-3, selector=selector, coverage=coverage, absorb=absorb, **how)
    (item,) = json.loads(Schedule(prune=prune).to_json())["prune"]
    given = {"keep": keep, "layer": -3, "selector": selector, "coverage": coverage, "absorb": absorb, **how}
    # Every key of version 1, in its order, with the default of what this selector has not.
    assert item == {key: OTHER_PRUNE[key] for key in OLD_PRUNE} | given
    assert list(item)[: len(OLD_PRUNE)] == list(OLD_PRUNE)
    assert Schedule.from_json(Schedule(prune=prune).to_json()).prune == (prune,)


@given(
    st.sampled_from(AXES),
    st.floats(0.01, 1.0),
    st.sampled_from(METHODS),
    st.data(),
)
def test_json_keeps_every_field_of_a_merge(axis: str, keep: float, method: str, data: st.DataObject) -> None:
    own = MERGERS.get(method).parameters()
    how = {name: data.draw(MERGE_PARAMETERS.get(name, st.just(value))) for name, value in own.items()}
    merge = Merge(axis, keep, layer=-2, method=method, **how)
    (item,) = json.loads(Schedule(merge=merge).to_json())["merge"]
    default = {"pairing": "line", "feature": "hidden"}
    assert item == {**default, "axis": axis, "keep": keep, "layer": -2, "method": method, **how}
    assert list(item) == list(OLD_MERGE)
    assert Schedule.from_json(Schedule(merge=merge).to_json()).merge == (merge,)


# What luvc_fx 0.1.0 wrote: the parameters of all methods, whether the one in use has them or not.
OLD_PRUNE = {
    "keep": 0.5,
    "layer": 2,
    "selector": "random",
    "energy": "lowpass",
    "coverage": "block",
    "cutoff": 0.3,
    "seed": 4,
    "normalize": "rms",
    "per_image": True,
    "realization": "fft",
    "absorb": False,
}
OTHER_PRUNE = OLD_PRUNE | {
    "energy": "residual",
    "cutoff": 0.25,
    "seed": 0,
    "normalize": "none",
    "per_image": False,
    "realization": "auto",
}
OLD_MERGE = {
    "axis": "width",
    "keep": 0.5,
    "layer": 1,
    "pairing": "shared",
    "feature": "keys",
    "method": "tome",
}


def read(**items: Any) -> Schedule:
    return Schedule.from_json(json.dumps({"version": 1, **{kind: [item] for kind, item in items.items()}}))


@pytest.mark.parametrize("selector", selectors.SHIPPED)
def test_files_that_list_the_parameters_of_all_methods_mean_what_they_meant(selector: str) -> None:
    (prune,) = read(prune=OLD_PRUNE | {"selector": selector}).prune
    used = prune.selector.parameters()
    assert used == {name: OLD_PRUNE.get(name, value) for name, value in used.items()}
    assert read(merge=OLD_MERGE).merge == (Merge("width", keep=0.5, layer=1, method="tome", feature="keys"),)


@pytest.mark.parametrize(
    ("kind", "item", "message"),
    [
        ("prune", OLD_PRUNE | {"cutoff": 0}, r"Spectrum\.cutoff is 0; allowed"),
        ("prune", OLD_PRUNE | {"energy": "high"}, r"Spectrum\.energy is 'high'; allowed"),
        ("prune", OLD_PRUNE | {"selector": "norm", "seed": -1}, r"Random\.seed is -1; allowed"),
        ("prune", OLD_PRUNE | {"selector": 3}, rf"Prune\.selector is 3; allowed: {selectors.SHIPPED[0]!r}, "),
        ("merge", OLD_MERGE | {"pairing": "column"}, r"Oim\.pairing is 'column'; allowed"),
        ("merge", OLD_MERGE | {"method": "mean"}, rf"Merge\.method is 'mean'; allowed: {METHODS[0]!r}, "),
        ("merge", OLD_MERGE | {"cutoff": 0.5}, r"Merge has unknown keys \['cutoff'\]"),
    ],
)
def test_what_a_method_does_not_use_is_checked_all_the_same(
    kind: str, item: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(**{kind: item})


def test_json_from_before_the_newest_fields_means_what_it_meant() -> None:
    text = """{"version": 1,
        "merge": [{"axis": "width", "keep": 0.75, "depth": 0.5}],
        "prune": [{"keep": 0.5, "layer": 2, "selector": "spectrum", "energy": "residual",
                   "coverage": "block", "cutoff": 0.25, "seed": 0}]}"""
    merge, prune = Merge("width", keep=0.75, depth=0.5), Prune(keep=0.5, layer=2)
    assert Schedule.from_json(text) == Schedule(merge, prune)
    assert (merge.pairing, merge.feature, merge.method.name) == ("line", "hidden", "oim")
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
        ('{"version": 1, "prune": [{"keep": 1e999, "layer": 0}]}', "Prune.keep is inf; allowed"),
        (
            f'{{"version": 1, "prune": [{{"keep": 1{"0" * 400}, "layer": 0}}]}}',
            "0; allowed: a number in [0, 1]",
        ),
        ('{"version": 1, "prune": [{"keep": "half", "layer": 0}]}', "Prune.keep is 'half'; allowed"),
        ('{"version": 1, "prune": [], "prune": []}', "must be JSON: the key 'prune' is in one object twice"),
        ('{"version": 1, "prune": [{"keep": 0, "keep": 1, "layer": 0}]}', "the key 'keep' is in one"),
        ("[" * 100_000, "must be JSON: lists or objects in it are nested too deeply"),
        ('{"version": 1, "prune": ' + "[" * 500 + "]" * 500 + "}", "allowed: a list of objects"),
        (f'{{"version": {"1" * 5000}}}', "must be JSON: a number in it has 5000 digits"),
    ],
)
def test_bad_json_is_a_value_error_that_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Schedule.from_json(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    schedule = Schedule.preset("image")
    assert Schedule.from_json("\ufeff" + schedule.to_json()) == schedule
    path = tmp_path / "schedule.json"
    path.write_text(schedule.to_json(), encoding="utf-8-sig")
    assert Schedule.load(path) == schedule


@pytest.mark.parametrize("value", [None, 5, [], {}], ids=repr)
def test_what_is_no_text_or_path(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^Schedule\.JSON is .*; allowed: a text$"):
        Schedule.from_json(value)
    with pytest.raises(ValueError, match=r"^Schedule\.path is .*; allowed: a path$"):
        Schedule.load(value)


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
