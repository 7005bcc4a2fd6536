"""The `image-text-to-text` pipeline of transformers over a compiled model: a batch of chats.

python examples/pipeline.py
"""

import json

from transformers import pipeline

import luvc_fx
from luvc_fx.apps.demo import MODEL_DIR


def chats(questions):
    """One conversation a question, each about the image that luvc_fx ships."""
    image = str(MODEL_DIR / "objects.png")
    return [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for text in questions
    ]


def make(inner="inductor"):
    """The pipeline of the shipped model with the image preset."""
    # the pipeline
    pipe = pipeline("image-text-to-text", model=str(MODEL_DIR))
    luvc_fx.compile(pipe.model, "image", inner=inner)
    # end of the pipeline
    return pipe


def main(inner="inductor"):
    """Ask the shipped model a few questions, two in a batch; print the report and the answers."""
    shipped = json.loads((MODEL_DIR / "examples.json").read_text(encoding="utf-8"))[0]["questions"]
    questions = [question["text"] for question in shipped[:4]]
    pipe = make(inner)
    answers = pipe(text=chats(questions), batch_size=2, return_full_text=False)
    print(luvc_fx.report_of(pipe.model))
    for question, (answer,) in zip(questions, answers, strict=True):
        print(question, answer["generated_text"])


if __name__ == "__main__":
    main()
