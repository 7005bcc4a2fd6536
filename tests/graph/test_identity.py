"""Promise 1: a schedule that does nothing changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import luvc_fx
from luvc_fx.dynamo.backend import set_up_dynamo
from luvc_fx.graph.emit import inserted
from luvc_fx.schedule import AXES, Merge, Prune, Schedule
from tests.support.cases import slow_unless
from tests.support.oracle import oracle_forward
from tests.support.replay import (
    Outputs,
    assert_close,
    assert_is_oracle,
    code,
    examples,
    llava,
    prompt,
    toy,
    toy_inputs,
    whole,
)

SMALL = (("decoder_layers", 2), ("encoder_layers", 3), ("grid", 4))
KEEP_ALL = Schedule(
    merge=(
        Merge("width", keep=1.0, layer=0),
        Merge("height", keep=1.0, layer=0),
        Merge("width", keep=1.0, layer=2),
    ),
    prune=(Prune(keep=1.0, layer=0), Prune(keep=1.0, layer=2, selector="random"), Prune(1.0, layer=-1)),
)


def picture(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """All there is to say about each node, by identity."""
    return [(id(n), n.op, n.name, n.target, n.args, n.kwargs, dict(n.meta)) for n in graph.nodes]


DOES_NOTHING = {
    "empty": Schedule(),
    "keep all": KEEP_ALL,
    "all by number": Schedule(merge=Merge("height", length=8, layer=1), prune=Prune(tokens=64, layer=1)),
}


@pytest.mark.parametrize("name", DOES_NOTHING)
def test_each_node_stays_the_same_object(name: str) -> None:
    captured = whole()
    gm = captured.copy()
    before, graph = picture(gm.graph), gm.graph
    backend = luvc_fx.backend(DOES_NOTHING[name], inner="eager", strict=True)
    compiled = backend(gm, list(captured.example_inputs))
    (report,) = backend.report.graphs
    assert gm.graph is graph
    assert picture(gm.graph) == before
    assert code(gm.graph) == code(captured.gm.graph)
    assert report.inserted == []
    assert not report.rewritten
    assert report.nodes_before == report.nodes_after == len(before)
    assert report.tokens_per_layer == [64] * 4
    assert compiled == gm.forward


def test_the_picture_shows_a_change() -> None:
    captured = whole()
    gm = captured.copy()
    before = picture(gm.graph)
    backend = luvc_fx.backend(Schedule(prune=Prune(tokens=63, layer=3)), inner="eager", strict=True)
    backend(gm, list(captured.example_inputs))
    assert picture(gm.graph) != before
    assert code(gm.graph) != code(captured.gm.graph)


def flat(result: Any) -> list[Tensor]:
    outputs = Outputs.of_model(result)
    return [outputs.logits, *outputs.keys, *outputs.values]


@pytest.mark.parametrize(
    ("inner", "name"),
    slow_unless(
        itertools.product(["eager", "inductor"], ["empty", "keep all"]),
        [("eager", "empty"), ("eager", "keep all")],
    ),
)
@torch.no_grad()
def test_bit_equal_to_the_inner_compiler_alone(inner: str, name: str) -> None:
    schedule = DOES_NOTHING[name]
    if inner == "inductor" and schedule is KEEP_ALL:
        # The small model has no block 2 and no layer 2.
        schedule = Schedule(merge=KEEP_ALL.merge[:2], prune=KEEP_ALL.prune[::2])
    if inner == "eager":
        model, batch = llava(), prompt(batch=2, padding=(3, 0))
    else:
        model, batch = llava(**dict(SMALL)), prompt(batch=2, padding=(3, 0), model=SMALL)
    torch._dynamo.config.capture_scalar_outputs = True
    alone = flat(torch.compile(model, backend=inner)(**batch))
    torch._dynamo.reset()
    backend = luvc_fx.backend(schedule, inner=inner, strict=True)
    ours = flat(torch.compile(model, backend=backend)(**batch))
    assert len(backend.report.graphs) == 1
    for mine, theirs in zip(ours, alone, strict=True):
        assert torch.equal(mine, theirs)


def forced(schedule: Schedule, inner: str = "eager") -> luvc_fx.LuvcBackend:
    set_up_dynamo()
    return luvc_fx.LuvcBackend(schedule, inner, strict=True, identity_sites=True)


FORCED: dict[str, tuple[Schedule, dict[str, Any], int]] = {
    "merges": (Schedule(merge=KEEP_ALL.merge), {"batch": 2, "padding": (3, 0)}, 2),
    "prunes": (Schedule(prune=KEEP_ALL.prune), {"batch": 2, "padding": (3, 0)}, 3),
    "both": (KEEP_ALL, {"batch": 2, "padding": (3, 0)}, 5),
    "both, symbolic": (KEEP_ALL, {"batch": 2, "padding": (0, 4), "dynamic": True}, 5),
    "both, colliding sizes": (KEEP_ALL, {"model": (("collide", True),)}, 5),
}


@pytest.mark.parametrize("name", FORCED)
def test_forced_sites_give_the_identity(name: str) -> None:
    schedule, options, sites = FORCED[name]
    captured = whole(**options)
    got, gm, report = captured.rewritten(forced(schedule))
    assert len(report.inserted) == sites
    assert report.rewritten
    assert any(inserted(node) for node in gm.graph.nodes)
    assert len(set(report.tokens_per_layer)) == 1
    # Merging nothing is a weighted mean of one: bit-equal, as gathering all rows is. A mask that a
    # site has cut reaches attention in another layout, so attention may round otherwise.
    for mine, theirs in zip(got, captured.plain(), strict=True):
        assert_close(mine, theirs, 1e-6, "an output")


@given(
    merges=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(AXES)), unique=True, max_size=3),
    prunes=st.lists(st.integers(0, 3), unique=True, max_size=3),
    selector=st.sampled_from(["spectrum", "random", "uniform"]),
    coverage=st.sampled_from(["block", "global"]),
)
@settings(max_examples=examples(6))
def test_any_forced_sites_give_the_identity(
    merges: list[tuple[int, str]], prunes: list[int], selector: str, coverage: str
) -> None:
    schedule = Schedule(
        merge=tuple(Merge(axis, keep=1.0, layer=layer) for layer, axis in merges),
        prune=tuple(Prune(1.0, layer=layer, selector=selector, coverage=coverage) for layer in prunes),
    )
    captured = whole(batch=2, padding=(3, 0))
    got, _, report = captured.rewritten(forced(schedule))
    assert len(report.inserted) == len({layer for layer, _ in merges}) + len(prunes)
    for mine, theirs in zip(got, captured.plain(), strict=True):
        assert_close(mine, theirs, 1e-6, "an output")


def rows_at_sites(gm: fx.GraphModule, values: tuple[Any, ...]) -> dict[str, list[Tensor]]:
    """Every int64 [batch, rows] value that a pass of ours inserted and that indexes rows, by site."""
    found: dict[str, list[Tensor]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if (
                inserted(n)
                and isinstance(result, Tensor)
                and result.dtype == torch.int64
                and result.dim() == 2
            ):
                found.setdefault(n.meta["luvc_fx"], []).append(result)
            return result

    with torch.no_grad():
        Watch(gm).run(*values)
    return found


def test_the_rows_of_a_forced_prune_are_all_rows_in_order() -> None:
    captured = whole(batch=2)
    schedule = Schedule(prune=(Prune(1.0, layer=1), Prune(1.0, layer=3, selector="random")))
    _, gm, _ = captured.rewritten(forced(schedule))
    rows = torch.arange(prompt(batch=2)["input_ids"].shape[1]).expand(2, -1)
    for layer in (1, 3):
        candidates = rows_at_sites(gm, captured.values)[f"prune before decoder layer {layer}"]
        assert any(torch.equal(candidate, rows) for candidate in candidates)
    # and a prune that drops something has no such rows
    schedule = Schedule(prune=Prune(tokens=60, layer=1))
    _, gm, _ = captured.rewritten(luvc_fx.backend(schedule, inner="eager", strict=True))
    candidates = rows_at_sites(gm, captured.values)["prune before decoder layer 1"]
    assert not any(torch.equal(candidate, rows) for candidate in candidates)


@pytest.mark.slow
@torch.no_grad()
def test_forced_sites_through_inductor() -> None:
    model, batch = llava(**dict(SMALL)), prompt(batch=2, padding=(2, 0), model=SMALL)
    schedule = Schedule(merge=KEEP_ALL.merge[:1], prune=KEEP_ALL.prune[-1:])
    backend = forced(schedule, "inductor")
    got = torch.compile(model, backend=backend)(**batch)
    assert len(backend.report.graphs[0].inserted) == 2
    assert_is_oracle(Outputs.of_model(got), oracle_forward(model, Schedule(), **batch))


@pytest.mark.parametrize("change", [lambda m: m, lambda m: m.double()], ids=["float32", "float64"])
@torch.no_grad()
def test_identity_on_another_model(change: Callable[[Any], Any]) -> None:
    model = change(toy())
    batch = toy_inputs()
    batch["pixels"] = batch["pixels"].to(model.head.weight.dtype)
    backend = luvc_fx.backend(Schedule(), inner="eager", strict=True)
    got = torch.compile(model, backend=backend)(**batch)
    assert torch.equal(got, model(**batch))
    assert [graph.kind for graph in backend.report.graphs] == ["whole"]


@torch.no_grad()
def test_a_model_without_images_is_left_alone() -> None:
    layer = torch.nn.Linear(4, 4)
    backend = luvc_fx.backend("video", inner="eager", strict=True)
    x = torch.randn(3, 4)
    assert torch.equal(torch.compile(layer, backend=backend)(x), layer(x))
    (report,) = backend.report.graphs
    assert (report.kind, report.rewritten, report.refusals) == ("other", False, [])
    assert str(report).startswith("other graph, ")
