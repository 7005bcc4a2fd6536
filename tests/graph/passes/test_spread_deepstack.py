"""``h[mask, :] = h[mask, :] + features`` becomes a sum of static size, bit for bit, or stays."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import luvc_fx
from luvc_fx.dynamo import rewrite
from luvc_fx.graph.emit import inserted
from luvc_fx.graph.nodes import is_tensor, op_name, value
from luvc_fx.passes.prepare.spread_deepstack import spread_deepstack
from luvc_fx.report import Reason
from luvc_fx.schedule import Prune, Schedule
from tests.support.replay import Captured, Toy, capture, code, examples, quietly, reasons, toy_inputs

DYNAMIC = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
PRUNE = Schedule(prune=Prune(tokens=5, layer=1, selector="uniform"))
MASK = torch.tensor([[False, True, True, False, False], [True, True, False, False, False]])

Body = Callable[..., Any]


def as_transformers(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    mask = mask.to(h.device)
    f = f.to(h.device, h.dtype)
    h = (h * 2.0).clone()
    local = h[mask, :] + f
    h[mask, :] = local
    return h.sin()


def other_way_round(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    h = h.clone()
    h[mask, :] = f + h[mask, :]
    return h * 3.0


def twice(h: Tensor, mask: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    h = h.clone()
    h[mask, :] = h[mask, :] + f
    first = h.tanh()
    h = first.clone()
    h[mask, :] = h[mask, :] + f.flip(0)
    return first, h


def inputs(dtype: torch.dtype = torch.float32, mask: Tensor = MASK, **more: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    h = torch.randn(*mask.shape, 6, generator=generator).to(dtype)
    features = torch.randn(int(mask.sum()), 6, generator=generator).to(more.get("features", dtype))
    return {"h": h, "mask": mask, "f": features}


def captured(body: Body, **given: Tensor) -> Captured:
    with DYNAMIC:
        return capture(body, **given)


def spread(graph: Captured) -> tuple[tuple[Any, ...], fx.GraphModule, bool]:
    """What the rewritten graph gives, that graph, and whether there was anything to rewrite."""
    gm = graph.copy()
    edit = spread_deepstack(gm.graph, PRUNE)
    if edit is not None:
        edit()
    gm.graph.lint()
    gm.recompile()
    return gm.forward(*graph.values), gm, edit is not None


def data_dependent(graph: fx.Graph) -> list[str]:
    """What reads or writes by a mask, or has a size that nobody knows."""
    found = []
    for node in graph.nodes:
        if node.target in (operator.getitem, operator.setitem):
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            if any(is_tensor(i) and value(i).dtype == torch.bool for i in index):
                found.append(node.format_node())
        if op_name(node) in ("nonzero", "masked_select", "item", "_assert_scalar"):
            found.append(node.format_node())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("body", [as_transformers, other_way_round, twice], ids=lambda f: f.__name__)
def test_it_is_the_model_bit_for_bit(body: Body, dtype: torch.dtype) -> None:
    given_ = inputs(dtype)
    graph = captured(body, **given_)
    assert data_dependent(graph.gm.graph)
    got, gm, found = spread(graph)
    assert found
    want = body(**given_)
    for mine, theirs in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.equal(mine, theirs)
    assert data_dependent(gm.graph) == []
    assert spread_deepstack(gm.graph, PRUNE) is None
    assert not any(inserted(node) for node in gm.graph.nodes), "it counts as the model's own"


def test_features_in_another_precision_are_cast_as_before() -> None:
    for dtype, features in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        given_ = inputs(dtype, features=features)
        got, _, found = spread(captured(as_transformers, **given_))
        assert found and torch.equal(got[0], as_transformers(**given_))
    got, _, found = spread(captured(other_way_round, **given_))  # the sum is as wide as the hidden states
    assert found and torch.equal(got[0], other_way_round(**given_))


def test_a_rounding_between_is_kept() -> None:
    def body(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
        return other_way_round(h, mask, f.to(torch.bfloat16).to(torch.float32))

    given_ = inputs()
    got, _, found = spread(captured(body, **given_))
    assert found and torch.equal(got[0], body(**given_))


@settings(max_examples=examples(4))
@given(st.lists(st.booleans(), min_size=12, max_size=12).filter(lambda bits: sum(bits) > 1))
def test_any_mask(bits: list[bool]) -> None:
    mask = torch.tensor(bits).reshape(2, 6)
    given_ = inputs(mask=mask)
    got, _, found = spread(captured(as_transformers, **given_))
    assert found and torch.equal(got[0], as_transformers(**given_))


def test_a_mask_as_long_as_another_one_at_run_time() -> None:
    """The graph is for a number of features, not for where they are."""
    graph = captured(as_transformers, **inputs())
    gm = graph.copy()
    edit = spread_deepstack(gm.graph, PRUNE)
    assert edit is not None
    edit()
    gm.recompile()
    given_ = inputs(mask=MASK.flip(0, 1))
    places = {"h": given_["h"], "mask": given_["mask"], "f": given_["f"]}
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    values = [next(v for k, v in places.items() if f"_{k}_" in f"{name}_") for name in names]
    assert torch.equal(gm.forward(*values)[0], as_transformers(**given_))


# ------------------------------------------------------------------------------------ left alone


def extra_user(h: Tensor, mask: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    h = h.clone()
    taken = h[mask, :]
    h[mask, :] = taken + f
    return h, taken.exp()


def sum_used_again(h: Tensor, mask: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    h = h.clone()
    local = h[mask, :] + f
    h[mask, :] = local
    return h, local.exp()


def other_mask(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    h = h.clone()
    h[mask, :] = h[mask.flip(0), :] + f
    return h


def other_index(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    h = h.clone()
    h[mask, :3] = h[mask, :3] + f[:, :3]
    return h


def other_op(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    h = h.clone()
    h[mask, :] = h[mask, :] * f
    return h


def other_rows(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    h, before = h.clone(), h * 1.0
    h[mask, :] = before[mask, :] + f
    return h


def with_a_factor(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    h = h.clone()
    h[mask, :] = torch.add(h[mask, :], f, alpha=2)
    return h


def one_row_for_all(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    h = h.clone()
    h[mask, :] = h[mask, :] + f[:1]
    return h


def one_vector_for_all(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    h = h.clone()
    h[mask, :] = h[mask, :] + f[0]
    return h


def whole_rows_of_the_batch(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    h = h.clone()
    rows = mask.sum(1) > 1
    h[rows, :] = h[rows, :] + f[:1].expand(5, 6)
    return h


def read_before(h: Tensor, mask: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    h = h.clone()
    before = h.sum(-1)
    h[mask, :] = h[mask, :] + f
    return h, before


def seen_through_a_view(h: Tensor, mask: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    h = h.clone()
    view = h[:, 1:]
    h[mask, :] = h[mask, :] + f
    return h, view.exp()


def not_a_copy(h: Tensor, mask: Tensor, f: Tensor) -> Tensor:
    h = h * 2.0
    h[mask, :] = h[mask, :] + f
    return h


OTHERS = (
    *(extra_user, sum_used_again, other_mask, other_index, other_op, other_rows, with_a_factor),
    *(one_row_for_all, one_vector_for_all, whole_rows_of_the_batch, read_before),
    *(seen_through_a_view, not_a_copy),
)


@pytest.mark.parametrize("body", OTHERS, ids=lambda f: f.__name__)
def test_what_is_something_else_is_left_alone(body: Body) -> None:
    given_ = inputs()
    graph = captured(body, **given_)
    before = code(graph.gm.graph)
    got, gm, found = spread(graph)
    assert not found and code(gm.graph) == before
    want = body(**given_)
    for mine, theirs in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.equal(mine, theirs)


def test_a_graph_without_any_is_not_touched() -> None:
    graph = capture(lambda h, mask, f: torch.where(mask.unsqueeze(-1), h, f.sum()), **inputs())
    _, gm, found = spread(graph)
    assert not found and code(gm.graph) == code(graph.gm.graph)


# ----------------------------------------------------------------------------------- the backend


class Deep(Toy):
    """A `Toy` whose image features also enter behind its first decoder layer."""

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        mask = ids == 1
        deep = self.patches(pixels).flatten(2).transpose(1, 2).flatten(0, 1)

        def late(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            hidden[mask, :] = hidden[mask, :] + deep
            return hidden

        self.between = late
        return super().forward(ids, pixels)


def deep() -> Deep:
    torch.manual_seed(0)
    return Deep().eval().requires_grad_(False)


def test_rows_are_pruned_before_the_addition() -> None:
    """Features of dropped tokens go with them: pruning behind the layer gives the same rows."""
    given_ = toy_inputs()
    graph = captured(deep(), **given_)
    assert spread_deepstack(graph.gm.graph, PRUNE) is not None
    got, gm, report = graph.rewritten(luvc_fx.backend(PRUNE, inner="eager", strict=True))
    assert report.refusals == [] and report.tokens_per_layer == [16, 5, 5]
    assert data_dependent(gm.graph) == []
    assert got[0].shape[1] == 5 + 5
    # The same model with the addition written by hand as a static one.
    twin = deep()
    twin.forward = lambda ids, pixels: _by_hand(twin, ids, pixels)  # type: ignore[method-assign]
    want, _, _ = capture(twin, **given_).rewritten(luvc_fx.backend(PRUNE, inner="eager", strict=True))
    assert torch.equal(got[0], want[0])


def _by_hand(model: Toy, ids: Tensor, pixels: Tensor) -> Tensor:
    deep = model.patches(pixels).flatten(2).transpose(1, 2)
    rows = torch.cat([torch.zeros(2, 2, 8), deep, torch.zeros(2, 3, 8)], dim=1)
    model.between = lambda hidden: torch.where((ids == 1).unsqueeze(-1), hidden + rows, hidden)
    return Toy.forward(model, ids, pixels)


@pytest.mark.parametrize("why", ["a pass fails", "recognition fails", "nothing is planned"])
def test_the_graph_is_restored(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug of ours")

    schedule = PRUNE
    if why == "a pass fails":
        monkeypatch.setattr(rewrite, "PASSES", (*rewrite.PASSES, broken))
    elif why == "recognition fails":
        monkeypatch.setattr(rewrite, "recognise", broken)
    else:
        schedule = Schedule(prune=Prune(keep=1.0, layer=1))
    graph = captured(deep(), **toy_inputs())
    got, gm, report = graph.rewritten(quietly(schedule))
    expected = [] if why == "nothing is planned" else [Reason.PASS_FAILED]
    assert reasons(report.refusals) == expected
    assert not report.rewritten
    assert code(gm.graph) == code(graph.gm.graph)
    assert torch.equal(got[0], graph.plain()[0])


def test_without_prunes_the_addition_stays() -> None:
    graph = captured(deep(), **toy_inputs())
    _, gm, _ = graph.rewritten(quietly(Schedule()))
    assert code(gm.graph) == code(graph.gm.graph)
    assert spread_deepstack(gm.graph, PRUNE) is not None
    assert spread_deepstack(gm.graph, Schedule()) is None
