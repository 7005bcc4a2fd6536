"""What `luvc_fx.compile` puts on a model, and how it comes off again."""

import sys

import torch
from shipped import shipped

import luvc_fx
from luvc_fx import Prune, Schedule

inner = sys.argv[1] if len(sys.argv) > 1 else "inductor"

model, inputs = shipped()

with torch.no_grad():
    plain = model(**inputs).logits

    # the block
    schedule = Schedule(prune=Prune(keep=0.5, layer=2))
    with luvc_fx.applied(model, schedule, inner=inner):
        output = model(**inputs)
        print(output.row_index)  # [batch, rows]: which rows of the prompt are left
    # end of the block
    assert output.logits.shape[1] == output.row_index.shape[1] < plain.shape[1]

    # on and off
    luvc_fx.compile(model, schedule, inner=inner, on_no_match="raise")
    shorter = model(**inputs).logits
    luvc_fx.restore(model)
    # end of on and off
    assert torch.equal(shorter, output.logits)
    assert torch.equal(model(**inputs).logits, plain)
