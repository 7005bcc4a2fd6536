"""The report of the shipped model's three graphs."""

import sys

import torch
from shipped import shipped

import luvc_fx

INNER = sys.argv[1] if len(sys.argv) > 1 else "inductor"

model, inputs = shipped()
luvc_fx.compile(model, "image", inner=INNER)
with torch.no_grad():
    model.generate(**inputs, max_new_tokens=2)
for graph in luvc_fx.report_of(model).graphs[:2]:
    print(graph)

# as data
report = luvc_fx.report_of(model)
assert not report.refusals  # of calls; each graph has its own
for graph in report.graphs:
    assert not graph.refusals, graph.refusals
assert report.tokens_per_layer()[-1] == 0  # no visual token enters the last layer
assert report.budget(original=256) < 0.3
# end of as data
