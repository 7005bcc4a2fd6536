"""Ask a model questions under one schedule."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import luvc_fx
from luvc_fx import _compat
from luvc_fx.apps.evaluation.features import Decoders, Features
from luvc_fx.apps.evaluation.prompts import Prompt, Prompts, batches, collate
from luvc_fx.apps.evaluation.questions import Question
from luvc_fx.apps.evaluation.together import Group, generate_together, groups, why_apart
from luvc_fx.report import unwrapped
from luvc_fx.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Facts:
    """Measurements of one batch of questions.

    Attributes:
        tokens_per_layer: visual tokens of a row that enter each decoder layer.
        visual: visual tokens of a row without luvc_fx, and of its images as they were.
        budget: mean over decoder layers of the visual tokens entering the layer, over those of the images as
            they were; mean of the rows.
        seconds_per_question: in `generate` and what is prefilled for it, compilation included.
        apart: why the questions did not share a prefill of their image; empty: they did.
    """

    tokens_per_layer: list[int]
    visual: int
    budget: float
    seconds_per_question: float
    apart: str = ""


ONE_EACH = "no two questions are about one image"


def combined(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `Facts` of the batches of some questions, as one dictionary.

    Args:
        facts: of each question those of its batch, as a dictionary; one object for all of a batch.

    Returns:
        The tokens of the first question, the mean budget, and the median pace of the batches, so that those
        which compiled something do not count. Of reasons not to share a prefill all that there were.
    """
    paces = {id(batch): batch["seconds_per_question"] for batch in facts}
    return {
        "tokens_per_layer": facts[0]["tokens_per_layer"],
        "visual": facts[0]["visual"],
        "budget": statistics.fmean(batch["budget"] for batch in facts),
        "seconds_per_question": statistics.median(paces.values()),
        "apart": "; ".join(dict.fromkeys(batch["apart"] for batch in facts if batch["apart"])),
    }


@torch.inference_mode()
def ask(
    prompts: Prompts,
    questions: Sequence[Question],
    schedule: Schedule,
    inner: str = "eager",
    batch: int = 25,
    new_tokens: int | None = None,
    features: Features | None = None,
    decoders: Decoders | None = None,
) -> Iterator[tuple[list[tuple[Question, str]], Facts]]:
    """Questions and the model's greedy answers, batch by batch, with the `Facts` of each batch.

    The model is restored at the end. Answers are those of `model.generate`: the text of the new tokens
    without special tokens and outer spaces. Where `prompts`
    makes images smaller, the model runs as it is, and `schedule` has to do nothing. Pixels are held for one
    batch at a time, beside those that `prompts` keeps. An image is prefilled once for its questions in a
    batch where it can be (`luvc_fx.apps.evaluation.together`); `Facts.apart` says why it was not.

    Args:
        inner: what compiles the rewritten graphs; accuracy needs no speed, and all give the same tokens.
        new_tokens: at most so many; None: what the generation config says.
        features: outputs of encoders, which earlier schedules have computed for the same pixels.
        decoders: graphs of decoding that earlier schedules compiled.

    Raises:
        luvc_fx.NotRewritten: something of the schedule that the graphs cannot follow.
        ValueError: a layer or block that the model does not have.
    """
    model, stock = prompts.model, prompts.smaller is not None
    outlines = [prompts.outline(question) for question in questions]
    images = [(q.media, q.video, outline.head) for q, outline in zip(questions, outlines, strict=True)]
    apart = why_apart(model, schedule)
    if not apart and len(set(images)) == len(images):
        apart = ONE_EACH
    asking = _Asking(prompts, questions, new_tokens, apart)
    _compat.forget_shapes()
    hooks = luvc_fx.applied(model, schedule, inner=inner, strict=True)
    with contextlib.nullcontext() if stock else hooks:
        if features is not None and not stock:
            features.share(model)
        if decoders is not None and not stock:
            decoders.share(model)
        if apart:
            for numbers, count in batches(outlines, batch):
                yield asking.apart(numbers, count)
        else:
            shapes = [(outline.shape, outline.front) for outline in outlines]
            for group, most_images, most_questions in groups(shapes, images, batch):
                yield asking.together(group, most_images, most_questions)


class _Asking:
    """Asks batches of `questions`; nothing of a batch is held when its method returns.

    Args:
        why_apart: of all batches.
    """

    def __init__(
        self, prompts: Prompts, questions: Sequence[Question], new_tokens: int | None, why_apart: str
    ) -> None:
        self.prompts, self.questions, self.why_apart = prompts, questions, why_apart
        self.options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if new_tokens is not None:
            self.options["max_new_tokens"] = new_tokens
        self.entering: dict[int, list[int]] = {}

    def apart(self, numbers: list[int], count: int) -> tuple[list[tuple[Question, str]], Facts]:
        """Each prompt by itself; filled up to `count` rows."""
        prompts, model = self.prompts, self.prompts.model
        rows = [prompts.prompt(self.questions[number]) for number in numbers]
        inputs = collate(rows, count, prompts.padding, model.device, model.dtype)
        started = time.perf_counter()
        if rows[0].smaller is not None:
            inputs = rows[0].smaller.encoded(model, inputs)
        with unwrapped():
            output = model.generate(**inputs, **self.options)
        return self._answers_and_facts(numbers, rows, output[:, inputs["input_ids"].shape[1] :], started)

    def together(self, group: Group, images: int, count: int) -> tuple[list[tuple[Question, str]], Facts]:
        """One prefill for the questions about an image; filled up to so many of both."""
        full = group.filled(images, count)
        about = [self.prompts.prompt(self.questions[number]) for number in full.images]
        rows = [self.prompts.prompt(self.questions[number]) for number in full.questions]
        started = time.perf_counter()
        with unwrapped():
            output = generate_together(self.prompts, about, rows, full.places, self.options)
        return self._answers_and_facts(group.questions, rows, output, started)

    def _answers_and_facts(
        self, numbers: list[int], rows: Sequence[Prompt], output: Tensor, started: float
    ) -> tuple[list[tuple[Question, str]], Facts]:
        """Answers and facts; rows behind those of `numbers` are filling."""
        texts = self.prompts.processor.batch_decode(output[: len(numbers)], skip_special_tokens=True)
        pace = (time.perf_counter() - started) / len(output)
        model, visual = self.prompts.model, rows[0].visual
        if self.prompts.smaller is None:
            # Rows of other shape but with as many tokens may run the graph of an earlier batch.
            self.entering.setdefault(visual, luvc_fx.report_of(model).tokens_per_layer())
        facts = _facts(rows[: len(numbers)], self.entering.get(visual), pace, model, self.why_apart)
        return [(self.questions[n], text.strip()) for n, text in zip(numbers, texts, strict=True)], facts


def _facts(
    rows: Sequence[Prompt], entering: list[int] | None, pace: float, model: Any, why_apart: str
) -> Facts:
    """`entering`: what enters each layer; None where the model is the stock one."""
    layers = model.config.get_text_config().num_hidden_layers
    tokens = entering or [rows[0].visual] * layers
    originals = [row.visual if row.smaller is None else row.smaller.of for row in rows]
    # The rows of a batch have as many tokens each, but the images before they were made smaller may not.
    budgets = [sum(tokens) / (layers * original) for original in originals]
    return Facts(tokens, originals[0], statistics.fmean(budgets), pace, why_apart)
