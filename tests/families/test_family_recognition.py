"""Recognition of every family survives other names, no metadata, other shapes and dtypes; or says why not.

`test_anatomy` has the same for graphs of LLaVA and of models written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule
from luvc_fx.dynamo.backend import LuvcBackend
from luvc_fx.report import Reason, Report
from tests.support.cases import slow_unless
from tests.support.family_matrix import (
    FAMILIES,
    PRUNES,
    SCHEDULE,
    Batch,
    Outcome,
    cell,
    compare_forward,
    done_to,
    first_input,
    prompt_of,
    refused,
)
from tests.support.models import rename_everything
from tests.support.oracle import oracle_forward, oracle_generate
from tests.support.replay import rms

NEW_TOKENS = 4
KINDS = ("llava", "internvl", "qwen2")
"""Features in a row, pixel shuffle, packed patches: what the default run has one of, each."""
FOUND = (*KINDS, "qwen3", "next")
"""And deepstack, and tiles."""
FLEX = [family for family, found in FAMILIES.items() if found.flex]


def fresh(family: str, **options: Any) -> Any:
    """A model that nobody has run or prepared."""
    return FAMILIES[family].make(**{**FAMILIES[family].size, **options})


def prompt(family: str) -> Batch:
    return prompt_of(family, first_input(family))


@torch.no_grad()
def forward(family: str, model: Any, **settings: Any) -> tuple[Any, Report]:
    """A forward of the plainest prompt, and its report."""
    with luvc_fx.applied(model, SCHEDULE, inner="eager", on_no_match="ignore", **settings):
        return model(**prompt(family)), luvc_fx.report_of(model)


def assert_as_declared(family: str, model: Any, out: Any, report: Report) -> None:
    """The two graphs of a forward, rewritten as the matrix says; the result is the oracle's."""
    given, told = cell(family, first_input(family)), Outcome()
    assert [graph.kind for graph in report.graphs] == ["vision", "prefill"]
    assert tuple(refusal.reason for refusal in refused(report)) == given.reasons
    vision, prefill = report.graphs
    assert len(vision.inserted) == (2 if given.merged else 0)
    assert len(prefill.inserted) == 2
    # The oracle knows a model by its class, so it is asked about the twin with the same weights.
    compare_forward(model, done_to(given), prompt(family), out, told)
    assert told.differences == []


def without_names(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take all words about modules and sources off each graph before we see it; counts the graphs."""
    original: Callable[..., Any] = LuvcBackend.__call__
    seen: list[int] = []

    def stripped(self: LuvcBackend, gm: fx.GraphModule, example_inputs: list[Any], **given: Any) -> Any:
        for number, node in enumerate(gm.graph.nodes):
            for key in ("nn_module_stack", "source_fn_stack", "stack_trace"):
                node.meta.pop(key, None)
            if node.op not in ("placeholder", "output"):
                node._rename(f"n{number}")
        gm.recompile()
        seen.append(len(gm.graph.nodes))
        return original(self, gm, example_inputs, **given)

    monkeypatch.setattr(LuvcBackend, "__call__", stripped)
    return seen


@pytest.mark.parametrize("family", slow_unless(FAMILIES, FOUND))
def test_renamed_classes_and_paths(family: str) -> None:
    model = rename_everything(luvc_fx.prepare(fresh(family)), paths=True)
    words = {word for name, _ in model.named_modules() for word in name.split(".") if name}
    assert all(word.lstrip("m").isdigit() for word in words), "the paths still mean something"
    assert all(type(module).__name__[0] == "K" for module in model.modules())
    out, report = forward(family, model)
    assert_as_declared(family, fresh(family), out, report)


@pytest.mark.parametrize("family", slow_unless(FAMILIES, KINDS))
def test_no_module_stack_and_static_shapes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = without_names(monkeypatch)
    model = fresh(family)
    out, report = forward(family, model, dynamic=False)
    assert len(seen) == len(report.graphs)
    assert_as_declared(family, model, out, report)


@pytest.mark.parametrize("family", slow_unless(FAMILIES, ["qwen2"]))
@torch.no_grad()
def test_symbolic_shapes_of_a_model_that_never_ran(family: str) -> None:
    """From the first call on: ``dynamic=True``, the prompt's length is a symbol."""
    model, longer = fresh(family), prompt_of(family, first_input(family), more=3)
    given, told = cell(family, first_input(family)), Outcome()
    with luvc_fx.applied(model, SCHEDULE, inner="eager", on_no_match="ignore", dynamic=True):
        report = luvc_fx.report_of(model)
        out = model(**prompt(family))
        assert_as_declared(family, model, out, report)
        compare_forward(model, done_to(given), longer, model(**longer), told)
        assert told.differences == []
        assert len(report.graphs) == 2, "more text is no recompile"


@pytest.mark.parametrize("family", slow_unless(FAMILIES, ["internvl"]))
@torch.no_grad()
def test_bfloat16(family: str) -> None:
    """Counts are the plan's; the answer is the bfloat16 oracle's where no choice is close."""
    model = fresh(family).to(torch.bfloat16)
    batch = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in prompt(family).items()
    }
    merges = cell(family, first_input(family)).merged
    # Every position of an axis and every token is a comfortable choice.
    schedule = Schedule(
        merge=Merge("width", keep=0.5, layer=1, pairing="shared") if merges else (),
        prune=(Prune(keep=0.5, layer=1, selector="uniform"), Prune(keep=0.0, layer=-1)),
    )
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        out = model(**batch)
        report = luvc_fx.report_of(model)
    want = oracle_forward(model, schedule, **batch)
    assert report.tokens_per_layer() == want.tokens_per_layer
    assert out.logits.dtype == torch.bfloat16
    assert out.logits.shape == want.logits.shape
    if want.gap > 0.02:
        assert torch.equal(out.row_index, want.rows)
        assert rms(out.logits.float() - want.logits.float()) < 0.03 * rms(want.logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_unless(FAMILIES, KINDS))
@torch.no_grad()
def test_attention_that_is_written_out(family: str) -> None:
    """transformers' "eager": two products and a softmax, and a mask that is added."""
    model, batch = fresh(family, attn="eager"), prompt(family)
    out, report = forward(family, model)
    assert_as_declared(family, model, out, report)
    schedule = done_to(cell(family, first_input(family)))
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        said = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(said, oracle_generate(model, schedule, NEW_TOKENS, **batch))


# ------------------------------------------------------------------------- where recognition fails


def einsum_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention of somebody's own, which nobody could have told us about."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value).contiguous(), None


AttentionInterface.register("einsum", einsum_attention)
AttentionMaskInterface.register("einsum", eager_mask)


@pytest.mark.parametrize(
    ("family", "attn"),
    [
        *slow_unless([(family, "einsum") for family in FAMILIES], [("llava", "einsum")]),
        # Dynamo breaks flex attention's own code into dozens of graphs, which takes its time.
        *slow_unless([(family, "flex_attention") for family in FLEX], []),
    ],
)
@torch.no_grad()
def test_other_attention_is_left_alone_with_a_reason(family: str, attn: str) -> None:
    """The attention call is the anchor of recognition: without one the answer is the stock model's."""
    model, batch = fresh(family, attn=attn), prompt(family)
    stock = model(**batch).logits
    said = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    with (
        luvc_fx.applied(model, SCHEDULE, inner="eager"),
        pytest.warns(LuvcWarning, match=r"no-attention: no supported attention .* \[\w+\]"),
    ):
        out = model(**batch)
        report = luvc_fx.report_of(model)
        assert torch.equal(model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False), said)
    assert {refusal.reason for refusal in refused(report)} == {Reason.NO_ATTENTION}
    assert all(refusal.node for refusal in refused(report)), "at which node"
    assert not any(graph.rewritten for graph in report.graphs)
    assert rms(out.logits - stock) <= 1e-5 * rms(stock)
    assert torch.equal(out.row_index, torch.arange(stock.shape[1]).expand(len(stock), -1))


@pytest.mark.parametrize("family", [family for family, found in FAMILIES.items() if not found.flex])
def test_flex_attention_where_the_stock_model_refuses_it(family: str) -> None:
    """If transformers learns it, the family's entry in the matrix must change."""
    with pytest.raises(ValueError, match="flex_attention"):
        fresh(family, attn="flex_attention")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2"])
@torch.no_grad()
def test_what_is_not_recognised_is_what_inductor_gives(family: str) -> None:
    """Bit for bit: the same wiring with a schedule that does nothing, which is plain Inductor."""
    model, batch = fresh(family, attn="einsum"), prompt(family)
    got = []
    for schedule in (SCHEDULE, Schedule()):
        torch._dynamo.reset()
        with luvc_fx.applied(model, schedule, on_no_match="ignore"):
            got.append((model(**batch).logits, model.generate(**batch, max_new_tokens=NEW_TOKENS)))
    for mine, plain in zip(*got, strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("family", slow_unless(["llava", "onevision"], ["llava"]))
@torch.no_grad()
def test_backend_on_a_fresh_model_says_what_to_do(family: str) -> None:
    """Its hooks end the graphs before the fusion: pruned, not merged, and the mend in the reason."""
    model, batch, told = fresh(family), prompt(family), Outcome()
    backend = luvc_fx.backend(SCHEDULE, inner="eager", on_no_match="ignore")
    out = torch.compile(model, backend=backend)(**batch)
    assert {refusal.reason for refusal in refused(backend.report)} == {Reason.CAPTURE_ENDED_BEFORE_FUSION}
    assert all("luvc_fx.compile(model)" in refusal.text for refusal in refused(backend.report))
    compare_forward(model, Schedule(prune=PRUNES), batch, out, told)
    assert told.differences == []
