"""A compiled forward in a file, loaded by a process that compiles nothing."""

import sys

import torch
from shipped import shipped

import luvc_fx
from luvc_fx import Prune, Schedule

path = sys.argv[1]

model, inputs = shipped()
arguments = (inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])
backend = luvc_fx.backend(Schedule(prune=Prune(keep=0.5, layer=2)), strict=True)
luvc_fx.prepare(model)


# the wrapper
class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False
        ).logits


options = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
with torch.no_grad():
    compiled = torch.compile(Logits(model), backend=backend, fullgraph=True, options=options)
    saved = compiled.forward.aot_compile((arguments, {}))
saved.save_compiled_function(path)
# end of the wrapper

# the other process
with open(path, "rb") as file:
    forward = torch.compiler.load_compiled_function(file)
# end of the other process
with torch.no_grad():
    logits = forward(Logits(model), *arguments)
assert logits.shape[1] < inputs["input_ids"].shape[1]
