"""Export the prefill of a model with a token budget inside, and compile it into a package of its own.

    python examples/export_package.py vlm.pt2 inputs.pt

The package needs torch alone (see run_package.py): no luvc_fx, no transformers, no Python model.
"""

import sys

import torch

import luvc_fx
from luvc_fx.apps.demo import ask, load_model


def package(model, inputs, schedule, path):
    """Compile the forward of `model` for images and batch as in `inputs`, any length of text."""
    # the export
    program = luvc_fx.export(model, inputs, schedule)
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    # end of the export


def main(path, inputs_path):
    """Package the model that luvc_fx ships, and save a prompt for it."""
    model, processor = load_model()
    question = ask()
    content = [{"type": "image", "image": question.image}, {"type": "text", "text": question.text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    package(model, inputs, "image", path)
    torch.save(inputs, inputs_path)
    print(f"{question.text} {path} has the answer")


if __name__ == "__main__":
    main(*sys.argv[1:])
