"""`luvc_fx.backend`: the whole model as one graph, for those who call `forward` themselves."""

import sys

import torch
from shipped import shipped

import luvc_fx

inner = sys.argv[1] if len(sys.argv) > 1 else "inductor"

model, inputs = shipped()
stock = model

with torch.no_grad():
    # the backend
    backend = luvc_fx.backend("image", inner=inner)  # "inductor", unless you say otherwise
    model = torch.compile(luvc_fx.prepare(model), backend=backend)
    logits = model(**inputs).logits  # of the surviving rows
    # end of the backend
    assert logits.shape[1] < inputs["input_ids"].shape[1]
    assert [graph.kind for graph in backend.report.graphs] == ["whole"]

    torch._dynamo.reset()
    options = {"luvc.schedule": "image", "luvc.inner": inner}
    # by name
    named = torch.compile(stock, backend="luvc_fx", options=options)
    # end of by name
    assert torch.equal(named(**inputs).logits, logits)
print(backend.report)
