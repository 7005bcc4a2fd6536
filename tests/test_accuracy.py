"""The `image` preset on the shipped model: what a token budget costs in answers, next to random."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from compare import Arm, compare, questions, with_selector
from transformers import AutoProcessor, LlavaForConditionalGeneration

from luvc_fx import Prune, Schedule
from luvc_fx.demo import MODEL_DIR

QUESTIONS = 100


@cache
def arms() -> dict[str, Arm]:
    """The same test questions, by seed from 0, without a budget, with the preset, and with random."""
    preset = Schedule.preset("image")
    schedules = {
        "unpruned": Schedule(),
        "image": preset,
        "random": with_selector(preset, "random"),
        "nothing seen": Schedule(prune=(Prune(keep=0.0, layer=0),)),
    }
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    return {arm.name: arm for arm in compare(model, processor, schedules, questions("test", QUESTIONS))}


@pytest.mark.slow
def test_the_image_preset_keeps_the_answers() -> None:
    found = arms()
    unpruned, image, random = found["unpruned"], found["image"], found["random"]
    assert unpruned.right.shape == (QUESTIONS,)
    assert unpruned.accuracy > 0.9, "the shipped model no longer answers"
    assert image.budget <= 0.5
    assert image.tokens[-1] == 0
    assert image.tokens == random.tokens
    assert image.accuracy >= 0.95 * unpruned.accuracy
    assert image.accuracy >= random.accuracy


@pytest.mark.slow
def test_without_visual_tokens_the_answers_are_gone() -> None:
    """Or accuracy would say nothing about tokens."""
    found = arms()
    assert found["nothing seen"].tokens == [0] * len(found["image"].tokens)
    assert found["nothing seen"].accuracy < 0.5 * found["unpruned"].accuracy
