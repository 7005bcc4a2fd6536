"""FLOPs and cache bytes of a graph, against numbers worked out by hand and torch's own counter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import luvc_fx
from luvc_fx.anatomy import costs
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.oracle import oracle_forward
from tests.support.replay import Outputs, capture, llava, prompt, quietly, toy, toy_inputs, toy_whole, whole

BOTH = Schedule(
    merge=Merge("width", length=2, layer=0), prune=(Prune(tokens=3, layer=1), Prune(tokens=0, layer=2))
)


class Tiny(nn.Module):
    """One of each thing that counts, and a few that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.linear = nn.Linear(8, 10)

    def forward(self, pixels: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        x = self.conv(pixels).flatten(2).transpose(1, 2)  # [2, 4, 8]
        dead = self.linear(x) @ other  # noqa: F841
        y = self.linear(F.gelu(x))  # [2, 4, 10]
        z = y @ other  # [2, 4, 6]
        q = torch.bmm(z.transpose(1, 2), y).reshape(2, 2, 3, 10)
        a = F.scaled_dot_product_attention(q, y.unsqueeze(1), y.unsqueeze(1)[..., :5])
        return torch.addmm(other.new_zeros(6), y[0], other), a.softmax(-1)


def by_hand() -> int:
    convolution = 2 * (2 * 8 * 2 * 2) * (3 * 4 * 4)
    linear = 2 * (2 * 4 * 10) * 8
    product = 2 * (2 * 4 * 6) * 10
    batched = 2 * (2 * 6 * 10) * 4
    attention = 2 * (2 * 2 * 3 * 4) * 10 + 2 * (2 * 2 * 3 * 5) * 4
    added = 2 * (4 * 6) * 10
    return convolution + linear + product + batched + attention + added


@pytest.mark.parametrize("dynamic", [False, True])
def test_flops_by_hand(dynamic: bool) -> None:
    model = Tiny().requires_grad_(False)
    captured = capture(model, dynamic, pixels=torch.randn(2, 3, 8, 8), other=torch.randn(10, 6))
    assert any(node.name.startswith("dead") for node in captured.gm.graph.nodes)
    assert costs.flops(captured.gm.graph) == by_hand()
    assert costs.kv_bytes(captured.gm.graph) == []


def torchs_count(call: Any, **inputs: Any) -> int:
    """With the composite attention, as torch has no formula for the CPU's fused one."""
    composite = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), composite:
        call(**inputs)
    return counter.get_total_flops()


def test_flops_of_models_are_torchs() -> None:
    assert costs.flops(toy_whole().gm.graph) == torchs_count(toy(), **toy_inputs())
    # The eager model computes the last encoder layer although only the one before it is used.
    batch = prompt(batch=2)
    plain = costs.flops(whole(batch=2).gm.graph)
    eager = torchs_count(llava(), **batch)
    rows, hidden, inner, layers = 2 * 65, 32, 40, 1
    unused = layers * (2 * rows * hidden * (4 * hidden + 2 * inner) + 4 * rows * 65 * hidden)
    small = eager - unused - plain
    assert 0 <= small <= 0.002 * eager, "rotary frequencies are a product of outer size one, and count little"


@torch.no_grad()
def test_kv_bytes_are_those_of_the_cache() -> None:
    model, batch = llava(), prompt(batch=2)
    for schedule in (Schedule(), BOTH):
        backend = luvc_fx.backend(schedule, inner="eager", strict=True)
        torch._dynamo.reset()
        out = Outputs.of_model(torch.compile(model, backend=backend)(**batch))
        held = [2 * math.prod(keys.shape) * 4 for keys in out.keys]
        (report,) = backend.report.graphs
        assert report.kv_bytes_after == held
        full = [2 * 2 * 2 * batch["input_ids"].shape[1] * 12 * 4] * 4
        assert report.kv_bytes_before == full
    lengths = oracle_forward(model, BOTH, **batch).kv_lengths
    assert held == [2 * 2 * 2 * length * 12 * 4 for length in lengths]


def test_flops_fall_with_the_tokens() -> None:
    captured = whole(batch=2)
    counts = {}
    for name, schedule in (("none", Schedule()), ("both", BOTH)):
        _, gm, report = captured.rewritten(quietly(schedule))
        assert report.flops_before == costs.flops(captured.gm.graph)
        assert report.flops_after == costs.flops(gm.graph)
        counts[name] = report.flops_after
    assert counts["none"] == costs.flops(captured.gm.graph)
    assert counts["both"] < 0.6 * counts["none"]


def test_a_refused_graph_costs_what_it_did() -> None:
    captured = toy_whole()
    _, _, report = captured.rewritten(quietly(Schedule(prune=Prune(tokens=99, layer=1))))
    assert report.refusals
    assert report.flops_before == report.flops_after > 0


def test_what_cannot_be_counted_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any) -> int:
        raise KeyError("mat1")

    monkeypatch.setattr(costs, "flops", broken)
    _, _, report = toy_whole().rewritten(luvc_fx.backend(BOTH, inner="eager", strict=True))
    assert report.rewritten
    assert report.flops_after == 0
    assert report.notes == ["its costs could not be counted: KeyError: 'mat1'"] * 2
