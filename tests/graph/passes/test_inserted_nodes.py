"""Promise 4: what is inserted is static, hashable, and done on the device."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import fx

import luvc_fx
from luvc_fx._compat import FakeTensor, hint
from luvc_fx.graph.emit import emit, inserted
from luvc_fx.graph.nodes import op_name, value
from luvc_fx.passes import PASSES, PREPARE
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.oracle import schedules
from tests.support.paths import ROOT
from tests.support.replay import Captured, capture, examples, prompt, toy_whole, whole

HOST = {"nonzero", "masked_select", "_local_scalar_dense", "item", "tolist", "argwhere", "unique", "_unique2"}
ARITHMETIC = {"add", "sub", "mul", "floordiv", "mod"}
"""Of `operator`, on sizes."""


def check_static(captured: Captured, schedule: Schedule, forced: bool = False) -> fx.GraphModule:
    backend = luvc_fx.LuvcBackend(schedule, "eager", strict=True, identity_sites=forced)
    gm = captured.copy()
    before = {(n.op, n.name, str(n.target)) for n in gm.graph.nodes}
    backend(gm, list(captured.example_inputs))
    gm.graph.lint()
    for node in gm.graph.nodes:
        if (node.op, node.name, str(node.target)) not in before:
            assert inserted(node), f"{node.format_node()} is new and carries no mark"
        if not inserted(node):
            continue
        text = node.format_node()
        assert node.op == "call_function", text
        overload = isinstance(node.target, torch._ops.OpOverload)
        assert overload or node.target.__module__ in ("_operator", "torch", "math"), text
        if not overload:
            assert op_name(node) in ARITHMETIC | {"getitem", "sym_sum"}, text
        assert op_name(node) not in HOST, text
        found = node.meta["example_value"]
        if "_assert_async" not in op_name(node):
            assert isinstance(found, (FakeTensor, torch.SymInt, int, list, tuple)), text
        if op_name(node) in ("index", "index_put", "index_put_", "_unsafe_index"):
            for index in (i for i in node.args[1] if isinstance(i, fx.Node)):
                assert value(index).dtype != torch.bool, f"a boolean index in {text}"
        assert not any(isinstance(leaf, torch.Tensor) for leaf in node.args), text
    return gm


RICH = Schedule(
    merge=(Merge("width", length=3, layer=0), Merge("height", length=3, layer=-1)),
    prune=(
        Prune(tokens=7, layer=0),
        Prune(tokens=4, layer=1, energy="lowpass", coverage="global"),
        Prune(tokens=3, layer=2, selector="random"),
    ),
)
EACH: dict[str, Schedule] = {
    "a merge": Schedule(merge=RICH.merge[:1]),
    "two merges": Schedule(merge=RICH.merge),
    "block spectrum": Schedule(prune=RICH.prune[:1]),
    "block spectrum on a whole grid": Schedule(prune=Prune(tokens=4, layer=0)),
    "global spectrum": Schedule(prune=RICH.prune[1:2]),
    "random": Schedule(prune=RICH.prune[2:]),
    "uniform": Schedule(prune=Prune(tokens=5, layer=1, selector="uniform")),
    "none left": Schedule(prune=Prune(tokens=0, layer=1)),
    "rich": RICH,
}


@pytest.mark.parametrize("name", EACH)
def test_each_kind_of_site_is_static(name: str) -> None:
    check_static(toy_whole(), EACH[name])


def test_with_a_symbolic_length_too() -> None:
    check_static(toy_whole(True), EACH["block spectrum"])


@settings(max_examples=examples(4))
@given(schedules(blocks=3, grid=(8, 8), layers=4))
def test_any_schedule_is_static(schedule: Schedule) -> None:
    check_static(whole(batch=2), schedule)


def test_forced_identity_sites_are_static() -> None:
    schedule = Schedule(merge=Merge("width", keep=1.0, layer=0), prune=Prune(keep=1.0, layer=1))
    gm = check_static(whole(batch=2), schedule, forced=True)
    assert any(inserted(node) for node in gm.graph.nodes)


def test_fake_values_are_what_comes_at_run_time() -> None:
    captured = whole(batch=2)
    gm = check_static(captured, Schedule(merge=Merge("width", length=5, layer=1), prune=Prune(0.5, layer=2)))

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            fake = value(n)
            if isinstance(result, torch.Tensor) and isinstance(fake, torch.Tensor):
                assert tuple(result.shape) == tuple(map(hint, fake.shape)), n.format_node()
                assert result.dtype == fake.dtype, n.format_node()
            return result

    with torch.no_grad():
        Watch(gm).run(*captured.values)


def test_placeholders_and_names_stay() -> None:
    captured = whole()
    gm = check_static(captured, RICH)

    def places(graph: fx.Graph) -> list[tuple[str, Any]]:
        return [(n.name, getattr(n, "_dynamo_source", None)) for n in graph.nodes if n.op == "placeholder"]

    assert places(gm.graph) == places(captured.gm.graph)
    assert any(source is not None for _, source in places(gm.graph))
    assert len(prompt()) < len(places(gm.graph))


# ----------------------------------------------------------------------------------------------- emit


def graph_of_two() -> tuple[fx.Graph, fx.Node, fx.Node]:
    graph = capture(lambda x, y: (x.sin(), y.cos()), x=torch.randn(2, 3), y=torch.randn(2, 3)).gm.graph
    x, y = (n for n in graph.nodes if n.op == "placeholder")
    return graph, x, y


def test_emit_inserts_behind_the_last_argument() -> None:
    graph, x, y = graph_of_two()
    sine = next(n for n in graph.nodes if op_name(n) == "sin")
    total, shifted = emit(graph, "here", lambda a, b: ((a + b).relu(), b - 1.0), sine, y)
    graph.lint()
    order = list(graph.nodes)
    assert order.index(sine) < order.index(total) < order.index(output(graph))
    assert [op_name(total), op_name(shifted)] == ["relu", "sub"]
    assert tuple(value(total).shape) == (2, 3)
    assert total.meta["luvc_fx"] == "here"
    assert not inserted(sine)
    assert x in graph.nodes


def test_emit_waits_for_a_later_place() -> None:
    graph, x, _ = graph_of_two()
    cosine = next(n for n in graph.nodes if op_name(n) == "cos")
    (doubled,) = emit(graph, "late", lambda a: a * 2.0, x, after=cosine)
    order = list(graph.nodes)
    assert order.index(cosine) < order.index(doubled)


def test_emit_refuses_a_hidden_constant() -> None:
    graph, x, _ = graph_of_two()
    before = len(graph.nodes)
    with pytest.raises(AssertionError, match="closes over a constant"):
        emit(graph, "constant", lambda a: a + torch.tensor([1.0, 2.0, 3.0]), x)
    assert len(graph.nodes) == before


def test_emit_leaves_out_what_nobody_reads() -> None:
    graph, x, _ = graph_of_two()
    before = len(graph.nodes)

    def body(a: torch.Tensor) -> torch.Tensor:
        a.exp()
        return a.tan()

    emit(graph, "tidy", body, x)
    assert len(graph.nodes) == before + 1


def output(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "output")


@pytest.mark.parametrize(("folder", "steps"), [("passes", PASSES), ("passes/prepare", PREPARE)])
def test_each_file_of_a_step_is_once_in_its_tuple(folder: str, steps: tuple[Any, ...]) -> None:
    """A step that is in no tuple would never run."""
    files = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert sorted(step.__name__ for step in steps) == sorted(files)


@pytest.mark.parametrize("step", [*PREPARE, *PASSES], ids=lambda step: step.__name__)
def test_each_step_is_alone_in_its_file_and_shows_a_graph_before_and_after(step: Any) -> None:
    assert step.__module__.rpartition(".")[2] == step.__name__
    shown = inspect.getdoc(step) or ""
    assert "->" in shown or "becomes" in shown
    assert shown.count("::") >= 1 and shown.count(" = ") >= 3
