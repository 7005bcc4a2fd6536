"""The `image` preset on the shipped model: what a token budget costs in answers, next to random."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from examples.research.tinyvlm.questions import export
from luvc_fx import Prune, Schedule
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.apps.evaluation import EvalResult, Options, run

QUESTIONS = 100


@cache
def found() -> EvalResult:
    """The same test questions, by seed from 0, without a budget, with the preset, with random, and blind."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        export(folder, "test", 20)
        blind = folder / "blind.json"
        blind.write_text(Schedule(prune=(Prune(keep=0.0, layer=0),)).to_json())
        options = Options(
            MODEL_DIR,
            folder / "questions.jsonl",
            folder / "out",
            methods=("last",),
            budgets=(),
            schedules=("image", "image:random", str(blind)),
            limit=QUESTIONS,
        )
        return run(options, lambda _: None, lambda *_: None)


@pytest.mark.slow
def test_the_image_preset_keeps_the_answers() -> None:
    unpruned, last, image, random, _ = found().rows
    scores = unpruned.scores["all"]
    assert scores.questions == QUESTIONS
    assert scores.accuracy > 0.9, "the shipped model no longer answers"
    assert image.measured is not None and image.measured <= 0.5
    assert image.tokens_per_layer[-1] == last.tokens_per_layer[-1] == 0
    assert image.tokens_per_layer == random.tokens_per_layer
    assert image.scores["all"].accuracy >= 0.95 * scores.accuracy
    assert image.scores["all"].accuracy >= random.scores["all"].accuracy
    # The preset and its control are compared on the same questions.
    difference = image.scores["all"].accuracy - random.scores["all"].accuracy
    assert image.scores["all"].against["random"].difference == pytest.approx(difference)


@pytest.mark.slow
def test_without_visual_tokens_the_answers_are_gone() -> None:
    """Or accuracy would say nothing about tokens."""
    unpruned, *_, blind = found().rows
    assert blind.tokens_per_layer == [0] * len(unpruned.tokens_per_layer)
    assert blind.scores["all"].accuracy < 0.5 * unpruned.scores["all"].accuracy
