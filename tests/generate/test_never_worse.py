"""Promise 6 through `luvc_fx.compile`: an error of ours becomes the stock model's answer and a reason.

`tests/graph/passes/test_rollback.py` has the same for `luvc_fx.backend`, pass by pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Reason, Schedule
from luvc_fx.dynamo import rewrite
from luvc_fx.passes import PASSES
from tests.support.models import inputs, tiny_llava

SCHEDULE = Schedule(merge=Merge("width", keep=0.5, layer=0), prune=Prune(keep=0.5, layer=1))


def fails(_: Any) -> None:
    raise RuntimeError("a bug of ours")


@torch.no_grad()
def test_a_failing_pass_leaves_the_stock_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = luvc_fx.prepare(tiny_llava(decoder_layers=2, encoder_layers=3, grid=4))
    batch = inputs(model, batch=2, padding=(3, 0))
    stock = model(**batch).logits
    said = model.generate(**batch, max_new_tokens=4, do_sample=False)
    monkeypatch.setattr(rewrite, "PASSES", (*PASSES, fails))
    with luvc_fx.applied(model, SCHEDULE, inner="eager"):
        with pytest.warns(LuvcWarning, match="pass-failed: RuntimeError: a bug of ours"):
            out = model(**batch)
            answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
        graphs = luvc_fx.report_of(model).graphs
    assert torch.equal(out.logits, stock)
    assert torch.equal(answer, said)
    refused = {graph.kind: [refusal.reason for refusal in graph.refusals] for graph in graphs}
    assert refused["vision"] == refused["prefill"] == [Reason.PASS_FAILED]
    assert not any(graph.rewritten for graph in graphs)
