"""A selector of your own, at work in `generate` on the model and the image that luvc_fx ships.

python examples/own_selector.py
"""

import json

import torch
from PIL import Image

import luvc_fx
from luvc_fx import Prune, Schedule
from luvc_fx.apps.demo import MODEL_DIR, load_model


# the selector
def contrast(x, prune, count, site):
    """How far each token is from its image's mean: [batch, tokens, dim] -> scores [batch, tokens]."""
    x = x.float().unflatten(1, (site.images, -1))
    return (x - x.mean(2, keepdim=True)).square().sum(-1).flatten(1)


luvc_fx.register_selector("contrast", contrast)
schedule = Schedule(prune=Prune(keep=0.25, layer=2, selector="contrast"))
# end of the selector


def main(inner: str = "inductor") -> None:
    """Ask the shipped model about its image, with `schedule`; print the report and the answer."""
    model, processor = load_model()
    example = json.loads((MODEL_DIR / "examples.json").read_text(encoding="utf-8"))[0]
    question = example["questions"][0]["text"]
    inputs = processor(
        images=Image.open(MODEL_DIR / example["image"]),
        text=f"USER: <image> {question} ASSISTANT:",
        return_tensors="pt",
    ).to(model.device, model.dtype)

    luvc_fx.compile(model, schedule, inner=inner)
    with torch.no_grad():
        output = model.generate(**inputs)
    print(luvc_fx.report_of(model))
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{question} {answer}")


if __name__ == "__main__":
    main()
