"""Tracing as the compiler does it: fake tensors, one ATen graph."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

DATA_DEPENDENT = ("nonzero", "masked_select", "_local_scalar_dense", "item", "_unique2")


def trace(fn, *inputs, device="cpu"):
    """The ATen graph of `fn` on fake copies of the tensors in `inputs`, on `device`."""
    mode = FakeTensorMode()

    def fake(value):
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device=device)

    fakes = [fake(value) for value in inputs]
    with mode:
        graph = make_fx(fn)(*fakes)
    _check_static(graph)
    return graph


def _names(graph):
    return {
        node.target.overloadpacket.__name__
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }


def _check_static(graph):
    assert not _names(graph) & set(DATA_DEPENDENT)
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            value = node.meta.get("val")
            values = value if isinstance(value, (tuple, list)) else [value]
            assert all(v.device.type == _device(graph) for v in values if _placed(v)), node.format_node()
        if node.target in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default):
            indices = [i for i in node.args[1] if i is not None]
            assert all(i.meta["val"].dtype != torch.bool for i in indices)


def _placed(value):
    # A number that a kernel takes as an argument stays on the host.
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _device(graph):
    return next(n.meta["val"].device.type for n in graph.graph.nodes if n.op == "placeholder")


@pytest.fixture(params=["cpu", "cuda"])
def traced_names(request):
    """Call with a function and real inputs: the names of the ATen ops it traces to, by device."""

    def names(fn, *inputs):
        return _names(trace(fn, *inputs, device=request.param))

    names.device = request.param
    return names


@pytest.fixture
def compiled():
    """Compile with Inductor as one graph."""
    return lambda fn: torch.compile(fn, fullgraph=True, backend="inductor", dynamic=False)
