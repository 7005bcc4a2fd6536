"""Merges inside a packed encoder: merged tokens turn by their mean coordinates, and only behind the site."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import luvc_fx
from luvc_fx.anatomy.recognise import recognise
from luvc_fx.graph.emit import inserted
from luvc_fx.graph.nodes import ancestors, op_name, shape
from luvc_fx.report import Reason
from luvc_fx.schedule import AXES, PAIRINGS, Merge, Schedule
from tests.support.replay import Captured, assert_close, capture, code, examples, quietly, reasons
from tests.support.toy_packed import Frame, Packed, eager, packed, packed_inputs, packed_whole, tables


def check(model: Packed, captured: Captured, schedule: Schedule) -> fx.GraphModule:
    (features, slots), gm, report = captured.rewritten(luvc_fx.backend(schedule, inner="eager", strict=True))
    want, places = eager(model, schedule, packed_inputs(*model.frames))
    assert report.kind == "vision" and report.refusals == []
    assert_close(features, want, 2e-5, "features")
    assert slots.flatten().tolist() == places.tolist()
    return gm


SCHEDULES = {
    "width": Schedule(merge=Merge("width", keep=0.5, layer=0)),
    "height": Schedule(merge=Merge("height", length=2, layer=1)),
    "both after one block": Schedule(merge=(Merge("width", 0.5, layer=0), Merge("height", 0.5, layer=0))),
    "both after two": Schedule(merge=(Merge("width", 0.5, layer=0), Merge("height", 0.5, layer=1))),
    "after the last": Schedule(merge=(Merge("width", 0.5, layer=-1),)),
    "shared, by keys": Schedule(merge=Merge("width", 0.5, layer=1, pairing="shared", feature="keys")),
    "keys, then hidden": Schedule(
        merge=(Merge("width", 0.5, layer=0, feature="keys"), Merge("height", 0.5, layer=0))
    ),
}
FRAMES: dict[str, tuple[Frame, ...]] = {
    "one image": ((4, 8),),
    "two alike": ((4, 8), (4, 8)),
    "one block wide": ((8, 2),),
    "of three sizes": ((4, 8), (8, 4), (4, 8), (6, 4)),
}


@cache
def whole(frames: str) -> tuple[Packed, Captured]:
    model = packed(*FRAMES[frames])
    return model, packed_whole(model)


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        *((name, "of three sizes") for name in SCHEDULES),
        ("width", "one image"),
        ("keys, then hidden", "two alike"),
        ("both after two", "one block wide"),
    ],
)
def test_it_is_the_eager_merge_on_coordinates(name: str, frames: str) -> None:
    check(*whole(frames), SCHEDULES[name])


SIDES = st.sampled_from([4, 6, 8])
MERGES = st.builds(
    Merge,
    axis=st.sampled_from(AXES),
    keep=st.sampled_from([0.25, 0.5, 0.75]),
    layer=st.integers(0, 2),
    pairing=st.sampled_from(PAIRINGS),
    feature=st.sampled_from(["hidden", "keys"]),
)


@settings(max_examples=examples(3))
@given(
    st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3),
    st.lists(MERGES, min_size=1, max_size=3),
    st.integers(0, 100),
)
def test_any_frames_and_merges(frames: list[Frame], merges: list[Merge], seed: int) -> None:
    model = packed(*frames, seed=seed)
    check(model, packed_whole(model), Schedule(merge=tuple(sorted(merges, key=lambda m: m.layer or 0))))


def test_blocks_up_to_the_site_read_the_tables_as_captured() -> None:
    model = packed((4, 8), (8, 4))
    captured = packed_whole(model)
    gm = check(model, captured, SCHEDULES["height"])
    attentions = [n for n in gm.graph.nodes if op_name(n) == "scaled_dot_product_attention"]
    assert len(attentions) == 6
    waves = [n for n in gm.graph.nodes if op_name(n) in ("cos", "sin")]
    plain, made = ([n for n in waves if inserted(n) is which] for which in (False, True))
    assert [shape(n)[0] for n in plain] == [64, 64]
    assert {shape(n)[0] for n in made} == {2 * 8 + 2 * 4}
    for number, call in enumerate(attentions):
        query = call.args[0]
        assert isinstance(query, fx.Node)
        direct = {n for n in ancestors(query) if n in waves and _turns(n, query, attentions[:number])}
        assert direct and direct <= set(plain if number < 4 else made)


def _turns(wave: fx.Node, query: fx.Node, earlier: list[fx.Node]) -> bool:
    """Whether `wave` reaches `query` without going through an attention call."""
    seen, stack = {query}, [query]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node is wave:
                return True
            if node not in seen and node not in earlier:
                seen.add(node)
                stack.append(node)
    return False


def test_merged_tokens_turn_by_the_mean_of_their_coordinates() -> None:
    """All tokens alike, so blocks 0 and 1 merge, and 2 and 3."""
    model = packed((2, 8))
    model.blocks[0].out.weight.zero_()
    inputs = packed_inputs((2, 8))
    captured = capture(model, **{k: v if k == "where" else torch.zeros_like(v) for k, v in inputs.items()})
    gm = captured.copy()
    luvc_fx.backend(SCHEDULES["width"], inner="eager", strict=True)(gm, list(captured.example_inputs))
    seen: list[Tensor] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if inserted(n) and op_name(n) == "cos":
                seen.append(result)
            return result

    with torch.no_grad():
        Watch(gm).run(*captured.values)
    left, right = inputs["where"].float().reshape(2, 2, 4, 2).unbind(1)
    want = tables(((left + right) / 2).reshape(-1, 2))[0]
    assert seen
    for table in seen:
        torch.testing.assert_close(table.reshape(want.shape), want)


# ------------------------------------------------------------------------------- other tables


def one_table(where: Tensor) -> tuple[Tensor, Tensor]:
    """Both waves cut out of one tensor, in another precision in between."""
    cos, sin = tables(where)
    both = torch.cat([cos, sin], dim=-1).to(torch.float64)
    return both[:, :4].float(), both[:, 4:].float()


def from_whole_angles(where: Tensor) -> tuple[Tensor, Tensor]:
    """The sine as a cosine: two waves of angles that are not the same values."""
    angles = torch.cat([where.float() * torch.tensor((1.0, 0.3))] * 2, dim=-1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("made", [one_table, from_whole_angles], ids=lambda f: f.__name__)
def test_tables_may_be_made_in_other_ways(made: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    model = packed((4, 8), (6, 4), tables=made)
    check(model, packed_whole(model), SCHEDULES["both after two"])


def test_what_meets_the_tokens_before_the_site_stays() -> None:
    """A learned position added in front of the first block has done its work by then."""
    model = packed((4, 8))
    anatomy = recognise(packed_whole(model).gm.graph)
    assert anatomy.encoder is not None
    assert any(join.axes == (0,) for join in anatomy.encoder.axes.joins)
    check(model, packed_whole(model), SCHEDULES["width"])


def test_without_any_table_only_tokens_merge() -> None:
    def none(where: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(4), torch.zeros(4)

    model = packed((4, 8), tables=none)
    captured = packed_whole(model)
    (features, slots), gm, report = captured.rewritten(
        luvc_fx.backend(SCHEDULES["width"], inner="eager", strict=True)
    )
    assert report.refusals == [] and features.shape == (4, 10) and slots.numel() == 4
    assert not any(op_name(n) in ("cos", "sin") for n in gm.graph.nodes)


# ---------------------------------------------------------------------------------------- refused


def two_angles(where: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.cat([where.float(), where.float()], dim=-1)
    return angles.cos(), (angles * 2.0).sin()


def by_mask(x: Tensor, where: Tensor, extra: Tensor) -> Tensor:
    mask = extra.sum(1) > 0
    heads = x.view(1, -1, 2, 4).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(
        heads, heads, heads, attn_mask=mask[None, None, None]
    )
    return x + out.transpose(1, 2).reshape(-1, 8)


NO_TABLE = "a value that is no rotary table meets the tokens behind a merge"
MEETS: dict[str, tuple[dict[str, Any], str]] = {
    "a value of each patch": ({"meet": lambda x, where, extra: x + extra}, NO_TABLE),
    "a gate": ({"meet": lambda x, where, extra: x * extra.sigmoid()}, NO_TABLE),
    "coordinates themselves": ({"meet": lambda x, where, extra: x + where[:, :1]}, NO_TABLE),
    "a mask": ({"meet": by_mask}, NO_TABLE),
    "tables of two angles": ({"tables": two_angles}, "do not lie patch by patch"),
    "waves of what the patches show": (
        {"meet": lambda x, where, extra: x + extra.cos()},
        "do not lie patch by patch",
    ),
}


@pytest.mark.parametrize("name", MEETS)
def test_what_is_no_rotary_table_is_refused_and_rolled_back(name: str) -> None:
    options, words = MEETS[name]
    captured = packed_whole(packed((4, 8), **options))
    got, gm, report = captured.rewritten(quietly(SCHEDULES["width"]))
    assert reasons(report.refusals) == [Reason.TOKEN_AXIS]
    assert words in report.refusals[0].text
    assert report.refusals[0].node
    assert (report.inserted, report.rewritten) == ([], False)
    assert code(gm.graph) == code(captured.gm.graph)
    assert all(torch.equal(a, b) for a, b in zip(got, captured.plain(), strict=True))


@pytest.mark.parametrize("name", ["a value of each patch", "tables of two angles"])
def test_after_the_last_block_nothing_meets_the_tokens(name: str) -> None:
    captured = packed_whole(packed((4, 8), **MEETS[name][0]))
    backend = luvc_fx.backend(SCHEDULES["after the last"], inner="eager", strict=True)
    (features, _), _, _ = captured.rewritten(backend)
    assert features.shape == (4, 10)
