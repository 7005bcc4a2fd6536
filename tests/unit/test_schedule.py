"""A schedule is data: checked when it is made, and equal by value."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import luvc_fx
from luvc_fx.mergers import MERGERS, Merger
from luvc_fx.mergers.oim import Oim
from luvc_fx.mergers.tome import Tome
from luvc_fx.schedule import KINDS, Merge, Prune, Schedule, round_half_up
from luvc_fx.selectors import SHIPPED
from luvc_fx.selectors.distinct import Distinct
from luvc_fx.selectors.random import Random
from luvc_fx.selectors.random_block import RandomBlock
from luvc_fx.selectors.spectrum import Spectrum
from luvc_fx.selectors.uniform import Uniform

MERGE = {"axis": "width", "keep": 0.5, "layer": 0}
PRUNE = {"keep": 0.5, "layer": 0}
ALL_SELECTORS = ", ".join(map(repr, SHIPPED))
ALL_MERGERS = ", ".join(map(repr, MERGERS.names()))


def made(kind: type, given: dict[str, Any], **changes: Any) -> Any:
    return kind(**{k: v for k, v in {**given, **changes}.items() if v is not None})


# ------------------------------------------------------------------------------------------ refusals

BAD_VALUES: dict[str, tuple[type, dict[str, Any], str, Any, str]] = {
    "axis": (Merge, MERGE, "axis", "depth", "'width', 'height'"),
    "axis of another kind": (Merge, MERGE, "axis", 1, "'width', 'height'"),
    "merge all away": (Merge, MERGE, "keep", 0.0, "(0, 1]"),
    "merge to more": (Merge, MERGE, "keep", 1.5, "(0, 1]"),
    "merge nan": (Merge, MERGE, "keep", math.nan, "(0, 1]"),
    "merge infinity": (Merge, MERGE, "keep", math.inf, "(0, 1]"),
    "merge text": (Merge, MERGE, "keep", "half", "(0, 1]"),
    "merge bool": (Merge, MERGE, "keep", True, "(0, 1]"),
    "merge layer fraction": (Merge, MERGE, "layer", 0.5, "a whole number"),
    "merge layer bool": (Merge, MERGE, "layer", True, "a whole number"),
    "prune below zero": (Prune, PRUNE, "keep", -0.1, "[0, 1]"),
    "prune to more": (Prune, PRUNE, "keep", 1.1, "[0, 1]"),
    "prune nan": (Prune, PRUNE, "keep", math.nan, "[0, 1]"),
    "prune layer text": (Prune, PRUNE, "layer", "1", "a whole number"),
    "selector": (Prune, PRUNE, "selector", "best", ALL_SELECTORS),
    "coverage": (Prune, PRUNE, "coverage", "local", "'block', 'global'"),
    "absorb as a number": (Prune, PRUNE, "absorb", 1, "True or False"),
    "method": (Merge, MERGE, "method", "1d", ALL_MERGERS),
}

BAD_PARAMETERS: dict[str, tuple[type, str, Any, str]] = {
    "pairing": (Oim, "pairing", "column", "'line', 'shared'"),
    "feature": (Oim, "feature", "values", "'hidden', 'keys'"),
    "feature of tome": (Tome, "feature", "values", "'hidden', 'keys'"),
    "energy": (Spectrum, "energy", "high", "'residual', 'lowpass', 'ratio'"),
    "energy of nothing": (Spectrum, "energy", None, "'residual', 'lowpass', 'ratio'"),
    "no cutoff": (Spectrum, "cutoff", 0.0, "(0, 1]"),
    "cutoff above one": (Distinct, "cutoff", 1.01, "(0, 1]"),
    "cutoff of nothing": (Spectrum, "cutoff", None, "(0, 1]"),
    "seed below zero": (Random, "seed", -1, "at least 0"),
    "seed fraction": (RandomBlock, "seed", 1.5, "at least 0"),
    "normalize": (Spectrum, "normalize", "l2", "'none', 'mean', 'rms'"),
    "normalize by nothing": (Spectrum, "normalize", False, "'none', 'mean', 'rms'"),
    "per image as a number": (Spectrum, "per_image", 1, "True or False"),
    "per image as text": (Distinct, "per_image", "yes", "True or False"),
    "realization": (Spectrum, "realization", "dct", "'auto', 'fft', 'fir', 'basis'"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_named_with_what_is_allowed(name: str) -> None:
    kind, given_, field, value, allowed = BAD_VALUES[name]
    with pytest.raises(ValueError) as caught:
        made(kind, given_, **{field: value})
    text = str(caught.value)
    assert text.startswith(f"{kind.__name__}.{field} is {value!r}; allowed: ")
    assert allowed in text


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_a_bad_parameter_is_named_by_its_method_wherever_it_is_given(name: str) -> None:
    method, field, value, allowed = BAD_PARAMETERS[name]
    flat: tuple[type, dict[str, Any]] = (
        (Merge, {**MERGE, "method": method.name})
        if issubclass(method, Merger)
        else (Prune, {**PRUNE, "selector": method.name})
    )
    for make in (lambda: method(**{field: value}), lambda: flat[0](**flat[1], **{field: value})):
        with pytest.raises(ValueError) as caught:
            make()
        text = str(caught.value)
        assert text.startswith(f"{method.__name__}.{field} is {value!r}; allowed: ")
        assert allowed in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prune(**PRUNE, selector="random", cutoff=0.3), "Prune.cutoff is 0.3; allowed: .*only seed$"),
        (lambda: Prune(**PRUNE, selector=Uniform(), seed=0), "Prune.seed is 0; .*'uniform', which has none$"),
        (lambda: Prune(**PRUNE, colour="red"), "Prune.colour is 'red'; .*only energy, cutoff, normalize, "),
        (lambda: Prune(**PRUNE, name="random"), "Prune.name is 'random'; .*'spectrum', which has only"),
        (lambda: Merge(**MERGE, method="tome", pairing="line"), "Merge.pairing is 'line'; .*only feature$"),
        (lambda: Prune(**PRUNE).with_selector("norm", cutoff=0.5), "Prune.cutoff is 0.5; .*which has none$"),
        (lambda: Prune(**PRUNE, selector=Oim()), f"Prune.selector is Oim.*; allowed: {ALL_SELECTORS}$"),
        (lambda: Merge(**MERGE, method=Spectrum), f"Merge.method is <class.*; allowed: {ALL_MERGERS}$"),
    ],
)
def test_a_parameter_that_the_method_does_not_have_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_parameters_go_to_the_method_and_are_read_from_either() -> None:
    prune = Prune(**PRUNE, selector="distinct", cutoff=1)
    assert prune.selector == Distinct(cutoff=1.0) and prune.selector != Spectrum(cutoff=1.0)
    assert prune.cutoff == 1.0 and isinstance(prune.cutoff, float)
    assert (str(prune.selector), prune.selector.name) == ("distinct", "distinct")
    assert (
        prune
        == Prune(**PRUNE, selector=Distinct(), cutoff=1.0)
        == Prune(**PRUNE, selector=Distinct(cutoff=1))
    )
    assert Prune(**PRUNE, selector=Spectrum(energy="ratio"), cutoff=0.5).energy == "ratio"
    merge = Merge(**MERGE, pairing="shared")
    assert merge.method == Oim(pairing="shared") and merge.pairing == "shared"
    with pytest.raises(AttributeError, match="'Prune' object has no attribute 'seed'"):
        _ = prune.seed


def test_with_another_selector_the_rest_stays() -> None:
    prune = Prune(tokens=7, depth=0.5, coverage="global", absorb=True, cutoff=0.5)
    random = Prune(tokens=7, depth=0.5, coverage="global", absorb=True, selector="random", seed=3)
    assert prune.with_selector("random", seed=3) == random
    assert dataclasses.replace(prune, selector="random", seed=3) == random  # type: ignore[arg-type, call-arg]
    assert prune.with_selector(prune.selector, energy="ratio").selector == Spectrum(
        energy="ratio", cutoff=0.5
    )
    assert dataclasses.replace(prune, tokens=8).selector == Spectrum(cutoff=0.5)


@pytest.mark.parametrize(
    "item",
    [Prune(**PRUNE, selector="pact"), Merge(**MERGE, method="tome"), Schedule.preset("video")],
    ids=["prune", "merge", "schedule"],
)
def test_copies_are_equal(item: Any) -> None:
    for again in (pickle.loads(pickle.dumps(item)), copy.copy(item), copy.deepcopy(item)):
        assert again == item and hash(again) == hash(item) and repr(again) == repr(item)


@pytest.mark.parametrize("field", ["selector", "coverage", "absorb"])
def test_only_what_has_an_alternative_may_be_none(field: str) -> None:
    with pytest.raises(ValueError, match=rf"Prune\.{field} is None; allowed: "):
        Prune(**{**PRUNE, field: None})


@pytest.mark.parametrize("value", [0, -1, 1.0, "3", False])
def test_a_bad_length_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Merge\.length is .*; allowed: a whole number of at least 1"):
        Merge("width", length=value, layer=0)


@pytest.mark.parametrize("value", [-1, 1.0, "3", True])
def test_a_bad_count_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Prune\.tokens is .*; allowed: a whole number of at least 0"):
        Prune(tokens=value, layer=0)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, math.nan, 2, "deep"])
@pytest.mark.parametrize(("kind", "rest"), [(Merge, {"axis": "width", "keep": 0.5}), (Prune, {"keep": 0.5})])
def test_a_bad_depth_is_named(kind: type, rest: dict[str, Any], value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.depth is .*; allowed: a number in \(0, 1\)"):
        kind(**rest, depth=value)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda: Merge("width", layer=0), ("keep", "length")),
        (lambda: Merge("width", keep=0.5, length=3, layer=0), ("keep", "length")),
        (lambda: Merge("width", keep=0.5), ("layer", "depth")),
        (lambda: Merge("width", keep=0.5, layer=0, depth=0.5), ("layer", "depth")),
        (lambda: Prune(layer=0), ("keep", "tokens")),
        (lambda: Prune(keep=0.5, tokens=3, layer=0), ("keep", "tokens")),
        (lambda: Prune(keep=0.5), ("layer", "depth")),
        (lambda: Prune(keep=0.5, layer=0, depth=0.5), ("layer", "depth")),
    ],
    ids=["no amount", "two amounts", "no place", "two places"] * 2,
)
def test_exactly_one_of_two_fields(make: Callable[[], object], fields: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"exactly one of {fields[0]} and {fields[1]}; got {fields[0]}="):
        make()


@pytest.mark.parametrize(
    ("field", "items"),
    [("merge", 3), ("merge", (Prune(**PRUNE),)), ("prune", Merge(**MERGE)), ("prune", "image")],
    ids=["number", "prune for merge", "merge for prune", "text"],
)
def test_items_of_the_wrong_kind(field: str, items: Any) -> None:
    wanted = field.capitalize()
    with pytest.raises(ValueError, match=rf"Schedule\.{field} is .*; allowed: a tuple of {wanted}"):
        Schedule(**{field: items})


# --------------------------------------------------------------------------------- places and counts


@pytest.mark.parametrize(
    ("layer", "depth", "blocks", "want"),
    [
        (0, None, 4, 0),
        (-1, None, 4, 3),
        (-4, None, 4, 0),
        (None, 0.5, 4, 1),
        (None, 0.01, 4, 0),
        (None, 0.99, 4, 3),
        (None, 0.625, 4, 2),  # 2.5 goes up
        (None, 0.375, 4, 1),  # 1.5 goes up
        (None, 0.5, 1, 0),
    ],
)
def test_a_merge_comes_after_a_block(layer: int | None, depth: float | None, blocks: int, want: int) -> None:
    assert Merge("width", keep=0.5, layer=layer, depth=depth).block(blocks) == want


@pytest.mark.parametrize(
    ("layer", "depth", "layers", "want"),
    [
        (0, None, 4, 0),
        (-1, None, 4, 3),
        (-4, None, 4, 0),
        (None, 0.5, 4, 2),
        (None, 0.01, 4, 0),
        (None, 0.99, 4, 3),
        (None, 0.625, 4, 3),
        (None, 0.375, 4, 2),
        (None, 0.5, 1, 0),
    ],
)
def test_a_prune_comes_before_a_layer(layer: int | None, depth: float | None, layers: int, want: int) -> None:
    assert Prune(keep=0.5, layer=layer, depth=depth).decoder_layer(layers) == want


@given(st.integers(1, 90), st.floats(0.001, 0.999))
def test_depth_is_the_part_that_runs_before(count: int, depth: float) -> None:
    block = Merge("width", keep=0.5, depth=depth).block(count)
    layer = Prune(keep=0.5, depth=depth).decoder_layer(count)
    assert 0 <= block < count
    assert 0 <= layer < count
    if 0 < block < count - 1:
        assert abs((block + 1) - depth * count) <= 0.5
    if layer < count - 1:
        assert abs(layer - depth * count) <= 0.5


@given(st.integers(-100, 100), st.integers(1, 60))
def test_layers_count_from_either_end(layer: int, count: int) -> None:
    if -count <= layer < count:
        assert Merge("width", keep=0.5, layer=layer).block(count) == layer % count
        assert Prune(keep=0.5, layer=layer).decoder_layer(count) == layer % count
        return
    allowed = f"allowed: {-count} to {count - 1}, as the model has {count}"
    with pytest.raises(ValueError, match=rf"Merge\.layer is {layer}; {allowed} encoder blocks"):
        Merge("width", keep=0.5, layer=layer).block(count)
    with pytest.raises(ValueError, match=rf"Prune\.layer is {layer}; {allowed} decoder layers"):
        Prune(keep=0.5, layer=layer).decoder_layer(count)


@pytest.mark.parametrize("value", [0.5, 1.5, 2.5, 3.5])
def test_a_half_is_rounded_up_whatever_the_parity(value: float) -> None:
    assert round_half_up(value) == int(value) + 1
    assert round_half_up(value - 1e-9) == int(value)


@given(st.floats(0.001, 1.0), st.integers(1, 100))
def test_a_merge_leaves_at_least_one_position(keep: float, length: int) -> None:
    target = Merge("width", keep=keep, layer=0).target(length)
    assert 1 <= target <= length
    assert target == 1 or abs(target - keep * length) <= 0.5


@given(st.floats(0.0, 1.0), st.integers(1, 3000))
def test_only_a_keep_of_zero_leaves_nothing(keep: float, fused: int) -> None:
    count = Prune(keep=keep, layer=0).count(fused)
    assert (count == 0) == (keep == 0.0)
    assert count <= max(1, fused)
    assert count <= 1 or abs(count - keep * fused) <= 0.5


def test_amounts_as_numbers_are_what_they_say() -> None:
    assert Merge("width", length=5, layer=0).target(5) == 5
    assert Prune(tokens=0, layer=0).count(9) == 0
    with pytest.raises(ValueError, match=r"Merge\.length is 6; allowed: at most 5, the height of the grid"):
        Merge("height", length=6, layer=0).target(5)
    with pytest.raises(ValueError, match=r"Prune\.tokens is 10; allowed: at most 9, the visual tokens"):
        Prune(tokens=10, layer=0).count(9)


# ------------------------------------------------------------------------------------------- schedule


def test_sites_are_in_the_order_in_which_they_happen() -> None:
    late, first, second = (
        Merge("width", keep=0.5, layer=-1),
        Merge("width", keep=0.5, layer=1),
        Merge("height", keep=0.5, layer=1),
    )
    schedule = Schedule(merge=(late, first, second), prune=(Prune(0.2, layer=3), Prune(0.5, layer=1)))
    assert schedule.merges_at(4) == ((1, first), (1, second), (3, late))
    assert [layer for layer, _ in schedule.prunes_at(4, 10)] == [1, 3]


@pytest.mark.parametrize(
    "pair",
    [
        ({"layer": 1}, {"layer": 1}),
        ({"layer": 3}, {"layer": -1}),
        ({"layer": 1}, {"depth": 0.5}),
    ],
    ids=["the same", "from either end", "by depth"],
)
def test_two_merges_of_one_axis_after_one_block(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    merges = tuple(Merge("width", keep=0.5, **place) for place in pair)
    with pytest.raises(
        ValueError, match=r"Schedule\.merge has width twice after encoder block \d; allowed: each"
    ):
        Schedule(merge=merges).merges_at(4)
    other = (merges[0], dataclasses.replace(merges[1], axis="height"))
    assert len(Schedule(merge=other).merges_at(4)) == 2


@pytest.mark.parametrize(
    "pair",
    [({"layer": 2}, {"layer": 2}), ({"layer": 3}, {"layer": -1}), ({"layer": 2}, {"depth": 0.5})],
    ids=["the same", "from either end", "by depth"],
)
def test_two_prunes_before_one_layer(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    schedule = Schedule(prune=tuple(Prune(keep=0.5, **place) for place in pair))
    with pytest.raises(ValueError, match=r"two items before decoder layer \d; allowed: one a layer"):
        schedule.prunes_at(4)


def test_counts_never_grow() -> None:
    with pytest.raises(
        ValueError, match=r"keeps more before decoder layer 2 \(keep=0.6\).*layer 1 \(keep=0.5\)"
    ):
        Schedule(prune=(Prune(0.5, layer=1), Prune(0.6, layer=2))).prunes_at(4)
    mixed = Schedule(prune=(Prune(0.5, layer=1), Prune(tokens=6, layer=2)))
    assert len(mixed.prunes_at(4)) == 2, "without the number of tokens nothing can be compared"
    assert len(mixed.prunes_at(4, 12)) == 2
    with pytest.raises(ValueError, match=r"\(tokens=6\) than is left from layer 1 \(keep=0.5\).*never grow"):
        mixed.prunes_at(4, 11 - 1)


def test_the_first_count_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"Prune\.tokens is 11; allowed: at most 10"):
        Schedule(prune=Prune(tokens=11, layer=0)).prunes_at(4, 10)


def test_merges_have_one_method() -> None:
    merges = (Merge("width", keep=0.5, layer=1), Merge("height", keep=0.5, layer=2, method="tome"))
    with pytest.raises(ValueError, match=r"Schedule\.merge is \['oim', 'tome'\]; allowed: one Merge\.method"):
        Schedule(merge=merges)


def test_one_item_needs_no_tuple_and_lists_become_tuples() -> None:
    merge, prune = Merge(**MERGE), Prune(**PRUNE)
    assert Schedule(merge, prune) == Schedule((merge,), (prune,)) == Schedule([merge], [prune])  # type: ignore[arg-type]
    assert Schedule([merge]).merge == (merge,)  # type: ignore[arg-type]
    hash(Schedule([merge], [prune]))  # type: ignore[arg-type]


def test_equal_by_value_and_hashable() -> None:
    one, other = Schedule(Merge(**MERGE), Prune(**PRUNE)), Schedule(Merge(**MERGE), Prune(**PRUNE))
    assert one == other
    assert one is not other
    assert hash(one) == hash(other)
    assert {one: 1}[other] == 1
    changed: dict[str, Any] = {"keep": 0.25, "tokens": 3, "layer": 2, "depth": 0.5, "selector": "random"}
    changed |= {"coverage": "global", "absorb": True, "axis": "height", "length": 3, "method": "tome"}
    changed |= {
        "energy": "ratio",
        "cutoff": 0.75,
        "normalize": "rms",
        "per_image": True,
        "realization": "fir",
    }
    changed |= {"pairing": "shared", "feature": "keys"}
    instead = {"keep": ("tokens", "length"), "tokens": ("keep",), "length": ("keep",)}
    instead |= {"layer": ("depth",), "depth": ("layer",)}
    for where, item in (("merge", Merge(**MERGE)), ("prune", Prune(**PRUNE))):
        method = item.method if isinstance(item, Merge) else item.selector
        for name in (*(field.name for field in dataclasses.fields(item)), *method.parameters()):
            none = {other: None for other in instead.get(name, ()) if hasattr(item, other)}
            with_it = dataclasses.replace(item, **{**none, name: changed[name]})
            assert dataclasses.replace(one, **{where: (with_it,)}) != one, name


def test_whole_numbers_are_numbers() -> None:
    assert Prune(keep=1, layer=0) == Prune(keep=1.0, layer=0)
    assert isinstance(Prune(keep=1, layer=0).keep, float)


@pytest.mark.parametrize(
    "item", [Merge(**MERGE), Prune(**PRUNE), Schedule()], ids=["merge", "prune", "schedule"]
)
def test_frozen(item: Any) -> None:
    field = dataclasses.fields(item)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(item, field, None)


# -------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Schedule.preset, Schedule.luvc], ids=["preset", "luvc"])
@pytest.mark.parametrize(("blocks", "layers"), [(5, 5), (23, 32), (26, 28), (11, 16)])
def test_presets_fit_models(make: Callable[[str], Schedule], kind: str, blocks: int, layers: int) -> None:
    schedule = make(kind)
    assert [b for b, _ in schedule.merges_at(blocks)] == sorted(b for b, _ in schedule.merges_at(blocks))
    sites = schedule.prunes_at(layers, 144)
    assert sites[-1][0] == layers - 1
    assert sites[-1][1].count(144) == 0
    assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize("kind", KINDS)
def test_luvc_is_the_literal_reading(kind: str) -> None:
    for prune in Schedule.luvc(kind).prune:
        assert (prune.selector, prune.coverage) == (Spectrum(energy="lowpass"), "global")


def test_of() -> None:
    schedule = Schedule(prune=Prune(**PRUNE))
    assert Schedule.of(schedule) is schedule
    assert Schedule.of("video") == Schedule.preset("video") != Schedule.preset("image")
    for bad in (None, 3, {"merge": []}):
        with pytest.raises(ValueError, match="allowed: a Schedule or the name of a preset"):
            Schedule.of(bad)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"Schedule\.preset is 'photo'; allowed: 'image', 'video', 'document'"
    ):
        luvc_fx.backend("photo")
    with pytest.raises(ValueError, match=r"Schedule\.luvc is 'photo'; allowed: "):
        Schedule.luvc("photo")


def test_a_schedule_of_a_budget() -> None:
    schedule = Schedule.at_budget(0.5, 28)
    assert {(prune.selector.name, prune.absorb) for prune in schedule.prune} == {("distinct", True)}
    entering, keep = [], 1.0
    places = {prune.layer: prune.keep for prune in schedule.prune}
    for layer in range(28):
        keep = places.get(layer, keep)
        entering.append(keep)
    assert entering[-1] == 0.0
    assert sum(entering) / 28 == pytest.approx(0.5)
    for budget, layers in ((0.97, 28), (0.0, 28), (-1.0, 28), (0.5, 1)):
        with pytest.raises(ValueError, match=f"Schedule.budget is {budget}; allowed: above 0 and at most"):
            Schedule.at_budget(budget, layers)
