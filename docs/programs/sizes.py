"""Images of many sizes: brought to a few, whose graphs are compiled ahead; or through one graph for all."""

import sys
from pathlib import Path

import torch
from PIL import Image
from shipped import prompt

import luvc_fx
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.apps.local_model import load

model_dir, inner = sys.argv[1:]

model, processor = load(Path(model_dir))
image = Image.open(MODEL_DIR / "objects.png").convert("RGB")
luvc_fx.compile(model, "image", inner=inner)

# the sizes
granularity = luvc_fx.SizeBuckets.granularity_of(model)  # pixels that make one visual token
buckets = luvc_fx.SizeBuckets.spread(2, area=112 * 112, granularity=granularity, narrowest=0.5, widest=2.0)
print(luvc_fx.warmup(model, buckets, processor))  # or a list of (height, width); or inputs=[...] of your own
image = buckets.fit(image)  # resized; or fit(image, how="pad")
# end of the sizes

graphs = len(luvc_fx.report_of(model).graphs)
assert graphs <= buckets.most_graphs()
inputs = prompt(model, processor, image, "where is the ring ?")
with torch.no_grad():
    model.generate(**inputs, max_new_tokens=4)
assert len(luvc_fx.report_of(model).graphs) == graphs, "nothing is compiled any more"

# all sizes
luvc_fx.compile(model, "image", inner=inner, sizes="symbolic")
with torch.no_grad():
    model.generate(**inputs, max_new_tokens=4)
    model.generate(**inputs, max_new_tokens=4, budget=0.3)  # 30 % of the visual tokens, over all layers
luvc_fx.set_budget(model, 0.25)  # from now on
# end of all sizes
assert len(luvc_fx.report_of(model).of_kind("prefill")) == 1
