"""Search for a schedule on prompts of your own, without answers."""

import json

from PIL import Image
from shipped import prompt

import luvc_fx
from luvc_fx.apps.demo import MODEL_DIR, load_model

model, processor = load_model()
# The shipped model with its first layers only, so that the search is done soon.
model.config.text_config.num_hidden_layers = 4
model.model.language_model.layers = model.model.language_model.layers[:4]
examples = json.loads((MODEL_DIR / "examples.json").read_text(encoding="utf-8"))
samples = [
    prompt(model, processor, Image.open(MODEL_DIR / example["image"]).convert("RGB"), question["text"])
    for example in examples[:2]
    for question in example["questions"][:4]
]

# the search
tuned = luvc_fx.tune(model, samples, target_speedup=2.0, candidates=4)  # or max_loss=0.01
print(tuned)  # on images held out: it, the presets, and its own counts with random tokens
luvc_fx.compile(model, tuned.schedule)
# end of the search
assert tuned.schedule.prune
