"""Promise 6: what fails leaves the graph as it was, and says so once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import luvc_fx
from luvc_fx import LuvcWarning, Reason
from luvc_fx.dynamo import rewrite
from luvc_fx.passes import PASSES, PREPARE, Context
from luvc_fx.report import Refused
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.replay import code, quietly, reasons, toy, toy_inputs, toy_whole, whole

BOTH = Schedule(merge=Merge("width", length=2, layer=0), prune=Prune(tokens=3, layer=1))


def broken(error: Exception) -> Callable[[Context], None]:
    """A pass that has done harm by the time it fails."""

    def break_graph(context: Context) -> None:
        graph = context.graph
        victim = next(n for n in graph.nodes if n.op == "call_function")
        with graph.inserting_after(victim):
            graph.call_function(torch.ops.aten.neg.default, (victim,))
        for node in graph.nodes:
            node.meta["example_value"] = node.meta.get("example_value")
        raise error

    return break_graph


PLACES = range(len(PASSES) + 1)


@pytest.mark.parametrize("place", PLACES, ids=lambda p: f"after {p} passes")
@torch.no_grad()
def test_a_failing_pass_is_rolled_back(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = (*PASSES[:place], broken(RuntimeError("a bug of ours")), *PASSES[place:])
    monkeypatch.setattr(rewrite, "PASSES", passes)
    captured = toy_whole()
    gm = captured.copy()
    sources = [n._dynamo_source for n in gm.graph.nodes if n.op == "placeholder"]
    backend = luvc_fx.backend(BOTH, inner="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = backend(gm, list(captured.example_inputs))
    messages = [str(w.message) for w in caught if issubclass(w.category, LuvcWarning)]
    assert len(messages) == 1
    assert "pass-failed: RuntimeError: a bug of ours" in messages[0]
    (report,) = backend.report.graphs
    assert reasons(report.refusals) == [Reason.PASS_FAILED]
    assert (report.inserted, report.rewritten, report.tokens_per_layer) == ([], False, [16] * 3)
    assert report.nodes_before == report.nodes_after == len(captured.gm.graph.nodes)
    assert code(gm.graph) == code(captured.gm.graph)
    assert [n._dynamo_source for n in gm.graph.nodes if n.op == "placeholder"] == sources
    for mine, plain in zip(compiled(*captured.values), captured.plain(), strict=True):
        assert torch.equal(mine, plain)


def test_the_rolled_back_graph_has_its_old_fake_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "PASSES", (*PASSES, broken(RuntimeError("late"))))
    captured = whole(batch=2)
    gm = captured.copy()
    quietly(Schedule(merge=Merge("width", keep=0.5, layer=0), prune=Prune(tokens=3, layer=1)))(
        gm, list(captured.example_inputs)
    )
    for old, new in zip(captured.gm.graph.nodes, gm.graph.nodes, strict=True):
        before, after = old.meta.get("example_value"), new.meta.get("example_value")
        assert before is after, new.format_node()


@pytest.mark.parametrize("how", ["strict", "through torch.compile"])
def test_strict_raises_the_error_itself(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "PASSES", (*PASSES, broken(ZeroDivisionError("a bug of ours"))))
    backend = luvc_fx.backend(BOTH, inner="eager", strict=True)
    if how == "strict":
        captured = toy_whole()
        gm = captured.copy()
        with pytest.raises(ZeroDivisionError, match="a bug of ours"):
            backend(gm, list(captured.example_inputs))
        assert code(gm.graph) == code(captured.gm.graph)
        return
    with pytest.raises(Exception, match="a bug of ours"):
        torch.compile(toy(), backend=backend)(**toy_inputs())


def test_a_refusal_in_a_pass_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    error = Refused(Reason.TOKEN_AXIS, "no way", "some_node")
    monkeypatch.setattr(rewrite, "PASSES", (*PASSES, broken(error)))
    captured = toy_whole()
    backend = luvc_fx.backend(BOTH, inner="eager")
    gm = captured.copy()
    with pytest.warns(LuvcWarning, match=r"token-axis: no way \[some_node\]"):
        backend(gm, list(captured.example_inputs))
    assert code(gm.graph) == code(captured.gm.graph)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@torch.no_grad()
def test_the_inner_compiler_takes_a_rolled_back_graph(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what Dynamo hangs on placeholders it would not."""
    monkeypatch.setattr(rewrite, "PASSES", (*PASSES, broken(RuntimeError("a bug of ours"))))
    model, batch = toy(), toy_inputs()
    backend = quietly(BOTH, inner)
    got = torch.compile(model, backend=backend)(**batch)
    assert reasons(backend.report.graphs[0].refusals) == [Reason.PASS_FAILED]
    assert torch.allclose(got, model(**batch), atol=1e-5)


def test_a_failure_is_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rewrite, "PASSES", (broken(RuntimeError("a bug of ours")),))
    captured: Any = toy_whole()
    with caplog.at_level("WARNING", logger="luvc_fx.dynamo.rewrite"):
        quietly(BOTH)(captured.copy(), list(captured.example_inputs))
    (record,) = (r for r in caplog.records if r.name == "luvc_fx.dynamo.rewrite")
    assert record.exc_info is not None
    assert "break_graph" in (record.exc_text or "")


# -------------------------------------------------------------------------------------- prepare steps


def note(graph: fx.Graph) -> None:
    """Put a node that nobody reads in front of the output."""
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "output")):
        graph.call_function(torch.ops.aten.neg.default, (next(iter(graph.nodes)),))


def test_a_graph_is_copied_only_for_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[fx.Graph] = []

    def spy(original: Any, *memo: Any) -> Any:
        if isinstance(original, fx.Graph):
            copied.append(original)
        return plain(original, *memo)

    plain = copy.deepcopy
    captured = toy_whole()
    gm = captured.copy()
    monkeypatch.setattr(copy, "deepcopy", spy)
    quietly(Schedule())(gm, list(captured.example_inputs))
    assert copied == []
    quietly(BOTH)(gm, list(captured.example_inputs))
    assert len(copied) == 1


@pytest.mark.parametrize("fails", [True, False], ids=["it fails", "nothing else is to do"])
def test_what_a_prepare_step_did_is_rolled_back(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(graph: fx.Graph, schedule: Schedule) -> Callable[[], None]:
        def edit() -> None:
            note(graph)
            if fails:
                raise RuntimeError("a bug of ours")

        return edit

    monkeypatch.setattr(rewrite, "PREPARE", (*PREPARE, step))
    captured = toy_whole()
    gm = captured.copy()
    backend = quietly(Schedule())
    backend(gm, list(captured.example_inputs))
    (report,) = backend.report.graphs
    assert reasons(report.refusals) == ([Reason.PASS_FAILED] if fails else [])
    assert code(gm.graph) == code(captured.gm.graph)
    assert "step" in report.milliseconds
