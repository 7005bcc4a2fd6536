"""`transformers.pipeline("image-text-to-text")` over a compiled model."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import luvc_fx
from luvc_fx.apps.demo import MODEL_DIR
from tests.support.paths import EXAMPLES

EXAMPLE = runpy.run_path(str(EXAMPLES / "pipeline.py"))
QUESTIONS = ("where is the ring ?", "how many yellow objects are there ?", "what color is the star ?")


def tokens_by_generate(model: Any, processor: Any, question: str) -> torch.Tensor:
    (chat,) = EXAMPLE["chats"]([question])
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, **options)
    inputs = inputs.to(model.device, model.dtype)
    return model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]


@pytest.mark.slow
@torch.no_grad()
def test_a_batch_of_chats_gets_the_tokens_of_generate() -> None:
    pipe = EXAMPLE["make"]("eager")
    got = pipe(text=EXAMPLE["chats"](QUESTIONS), batch_size=2, return_tensors=True)
    report = luvc_fx.report_of(pipe.model)
    (merge,) = report.of_kind("vision")[0].inserted
    assert str(merge) == "merge after encoder block 2: width 16 -> 12"
    assert {graph.batch for graph in report.of_kind("prefill")} == {1, 2}
    assert all(len(graph.inserted) == 3 for graph in report.of_kind("prefill"))
    assert not report.refusals
    words = []
    for question, (answer,) in zip(QUESTIONS, got, strict=True):
        wanted = tokens_by_generate(pipe.model, pipe.processor, question)
        tail = answer["generated_token_ids"][-len(wanted) :]
        assert torch.equal(torch.as_tensor(tail), wanted), question
        words.append(pipe.tokenizer.decode(wanted, skip_special_tokens=True).strip())
    assert words == ["right", "1", "purple"]


@pytest.mark.slow
@torch.no_grad()
def test_a_model_compiled_before_and_a_request_that_is_no_chat() -> None:
    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    luvc_fx.compile(model, "image", inner="eager", strict=True)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    text = f"USER: <image> {QUESTIONS[2]} ASSISTANT:"
    (answer,) = pipe(images=str(MODEL_DIR / "objects.png"), text=text, return_full_text=False)
    assert answer["generated_text"].strip() == "purple"
    assert luvc_fx.report_of(pipe.model).tokens_per_layer()[-1] == 0
