"""Promise 1 through `luvc_fx.compile`: a schedule that does nothing changes nothing.

`tests/graph/test_identity.py` has the same for `luvc_fx.backend`, with forced sites and Inductor.
"""

from __future__ import annotations

import pytest
import torch

import luvc_fx
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.models import inputs, tiny_llava

DOES_NOTHING = {
    "empty": Schedule(),
    "keep all": Schedule(
        merge=(Merge("width", keep=1.0, layer=0), Merge("height", keep=1.0, layer=1)),
        prune=(Prune(keep=1.0, layer=0), Prune(keep=1.0, layer=1, selector="random")),
    ),
}


@pytest.mark.parametrize("name", DOES_NOTHING)
@torch.no_grad()
def test_outputs_are_bit_equal_and_no_graph_is_rewritten(name: str) -> None:
    model = luvc_fx.prepare(tiny_llava(decoder_layers=2, encoder_layers=3, grid=4))
    batch = inputs(model, batch=2, padding=(3, 0))
    stock = model(**batch)
    said = model.generate(**batch, max_new_tokens=4, do_sample=False)
    with luvc_fx.applied(model, DOES_NOTHING[name], inner="eager", strict=True):
        out = model(**batch)
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), said)
        graphs = luvc_fx.report_of(model).graphs
    assert torch.equal(out.logits, stock.logits)
    for mine, theirs in zip(out.past_key_values.layers, stock.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    assert {graph.kind for graph in graphs} == {"vision", "prefill", "decode"}
    assert not any(graph.rewritten or graph.inserted or graph.refusals for graph in graphs)
