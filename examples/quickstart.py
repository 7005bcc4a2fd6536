"""The README's three lines, on the model and the image that luvc_fx ships. Prints the answer.

python examples/quickstart.py
"""

import json

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import luvc_fx
from luvc_fx.apps.demo import MODEL_DIR

example = json.loads((MODEL_DIR / "examples.json").read_text(encoding="utf-8"))[0]
image = Image.open(MODEL_DIR / example["image"])
question = example["questions"][0]["text"]

model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(MODEL_DIR)
inputs = processor(images=image, text=f"USER: <image> {question} ASSISTANT:", return_tensors="pt")

# the three lines
luvc_fx.compile(model, schedule="image")
output = model.generate(**inputs)
print(luvc_fx.report_of(model))
# end of the three lines

answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(f"{question} {answer}")
