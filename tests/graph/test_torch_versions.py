"""What `luvc_fx` adds to Dynamo of torch 2.11 and 2.12, so that it captures as 2.13 does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import luvc_fx
from luvc_fx import Prune, Schedule, _compat
from luvc_fx.graph.nodes import op_name, value, writes
from tests.support.models import inputs, tiny_llava


@pytest.fixture(autouse=True)
def taught() -> None:
    """What `luvc_fx.backend` and its kin do first."""
    _compat.dynamo_patches.install()


class Kept:
    """An inner compiler that keeps the graphs it got and leaves them to another."""

    def __init__(self, inner: str = "eager") -> None:
        self.graphs: list[fx.GraphModule] = []
        self.inner = torch._dynamo.lookup_backend(inner)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return self.inner(gm, example_inputs)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_tensor_check_is_traced_and_still_checks(inner: str) -> None:
    """transformers calls it where scalars are captured; the condition goes nowhere else."""
    kept = Kept(inner)

    def positive(x: Tensor) -> Tensor:
        torch._check_tensor_all(x > 0, lambda: "not positive")
        return x + 1

    with _compat.tracing_settings():
        compiled = torch.compile(positive, backend=kept, fullgraph=True)
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
        with pytest.raises(RuntimeError, match="u0 >= 1"):
            compiled(torch.tensor([1.0, -1.0, 1.0]))
    assert len(kept.graphs) == 1


def test_compiling_is_not_exporting() -> None:
    """Dynamo of 2.11 says so; transformers then gives each prompt a mask."""
    compiled = torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.zeros(2))


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17."), reason="5.17 makes a mask of whatever is compiled"
)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask of ones"])
@torch.no_grad()
def test_a_prompt_without_padding_has_no_mask(masked: bool) -> None:
    """So pruned layers may use flash kernels, which take none."""
    model, kept = tiny_llava(decoder_layers=3, encoder_layers=2, grid=4), Kept()
    batch = inputs(model)
    if not masked:
        del batch["attention_mask"]
    schedule = Schedule(prune=Prune(keep=0.5, layer=1, selector="uniform"))
    with luvc_fx.applied(model, schedule, inner=kept, strict=True):
        model(**batch)
    calls = [n for n in kept.graphs[-1].graph.nodes if op_name(n) == "scaled_dot_product_attention"]
    rows = [value(call).shape[-2] for call in calls]
    assert rows == [24, 16, 16]
    assert [call.kwargs["attn_mask"] for call in calls] == [None] * 3
    assert all(call.kwargs["is_causal"] for call in calls)


def test_a_row_cut_out_of_a_symbolic_number_runs_on_fake_values() -> None:
    """Its sizes are numbers, its strides are not."""
    seen: list[torch.Size] = []

    def run_last(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        (last,) = [n for n in gm.graph.nodes if op_name(n) == "linear"]
        fakes = [value(n) for n in last.all_input_nodes]
        assert all(isinstance(size, int) for size in fakes[0].shape)
        assert isinstance(fakes[0].storage_offset(), torch.SymInt)
        with _compat.fake_run(fakes):
            seen.append(nn.functional.linear(*fakes).shape)
        return gm.forward

    rows = torch.ones(1, 7, 4)
    torch._dynamo.mark_dynamic(rows, 1)
    compiled = torch.compile(lambda x, w: nn.functional.linear(x[:, -1:], w), backend=run_last)
    compiled(rows, torch.ones(5, 4))
    assert seen == [(1, 1, 5)]


def test_an_operator_written_as_a_method_has_its_name() -> None:
    """`ids == token` is one in graphs of 2.11."""
    graph = fx.Graph()
    ids = graph.placeholder("ids")
    equal = graph.call_method("__eq__", (ids, 3))
    both = graph.call_method("__and__", (equal, equal))
    added = graph.call_method("add_", (both, 1))
    assert [op_name(n) for n in (equal, both, added)] == ["eq", "and_", "add_"]
    assert [writes(n) for n in (equal, both, added)] == [False, False, True]
