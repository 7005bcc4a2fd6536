"""Ask a model questions under one schedule."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import luvc_fx
from luvc_fx import _compat
from luvc_fx.evaluation.features import Features
from luvc_fx.evaluation.prompts import Prompts, Row, batches, collate
from luvc_fx.evaluation.questions import Question
from luvc_fx.report import unwrapped
from luvc_fx.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Facts:
    """What was seen while one batch was asked.

    Attributes:
        tokens_per_layer: visual tokens of a row that enter each decoder layer.
        visual: visual tokens of a row without luvc_fx, and of its images as they were.
        budget: mean over the layers of what enters, over them; the mean of the rows.
        seconds_per_question: in `generate`, compilation included.
    """

    tokens_per_layer: list[int]
    visual: int
    budget: float
    seconds_per_question: float


def combined(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was seen of some questions together.

    Args:
        facts: of each question those of its batch, as a dictionary; one object for all of a batch.

    Returns:
        The tokens of the first question, the mean budget, and the median pace of the batches, so that those
        which compiled something do not count.
    """
    paces = {id(batch): batch["seconds_per_question"] for batch in facts}
    return {
        "tokens_per_layer": facts[0]["tokens_per_layer"],
        "visual": facts[0]["visual"],
        "budget": statistics.fmean(batch["budget"] for batch in facts),
        "seconds_per_question": statistics.median(paces.values()),
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
) -> Iterator[tuple[list[tuple[Question, str]], Facts]]:
    """Questions and the model's greedy answers, batch by batch, with what was seen of each batch.

    The model is restored at the end. What it generates is that of `model.generate` alone: of the tokens
    up to the end of the sentence the text, without special tokens and spaces around it. Where `prompts`
    makes images smaller, the model runs as it is, and `schedule` has to do nothing. Pixels are held for one
    batch at a time, beside those that `prompts` keeps.

    Args:
        inner: what compiles the rewritten graphs; accuracy needs no speed, and all give the same tokens.
        new_tokens: at most so many; None: what the generation config says.
        features: what earlier schedules' encoders made of the same pixels.

    Raises:
        luvc_fx.NotRewritten: something of the schedule that the graphs cannot follow.
        ValueError: a layer or block that the model does not have.
    """
    model = prompts.model
    outlines = [prompts.outline(question) for question in questions]
    most: dict[str, Any] = {} if new_tokens is None else {"max_new_tokens": new_tokens}
    _compat.forget_shapes()
    stock = prompts.smaller is not None
    entering: dict[int, list[int]] = {}
    hooks = luvc_fx.applied(model, schedule, inner=inner, strict=True)
    with contextlib.nullcontext() if stock else hooks:
        if features is not None and not stock:
            features.share(model)
        for numbers, count in batches(outlines, batch):
            chosen = [prompts.row(questions[number]) for number in numbers]
            inputs = collate(chosen, count, prompts.padding, model.device, model.dtype)
            started = time.perf_counter()
            if chosen[0].smaller is not None:
                inputs = chosen[0].smaller.encoded(model, inputs)
            with unwrapped():
                output = model.generate(**inputs, do_sample=False, num_beams=1, **most)
            new = output[: len(chosen), inputs["input_ids"].shape[1] :]
            texts = prompts.processor.batch_decode(new, skip_special_tokens=True)
            pace = (time.perf_counter() - started) / count
            if not stock:
                # Rows of other shape but with as many tokens may run the graph of an earlier batch.
                entering.setdefault(chosen[0].visual, luvc_fx.report_of(model).tokens_per_layer())
            facts = _facts(chosen, entering.get(chosen[0].visual), pace, model)
            del chosen, inputs  # before those of the next batch are made
            yield (
                [(questions[number], text.strip()) for number, text in zip(numbers, texts, strict=True)],
                facts,
            )


def _facts(rows: Sequence[Row], entering: list[int] | None, pace: float, model: Any) -> Facts:
    """`entering`: what enters each layer; None where the model is the stock one."""
    layers = model.config.get_text_config().num_hidden_layers
    tokens = entering or [rows[0].visual] * layers
    originals = [row.visual if row.smaller is None else row.smaller.of for row in rows]
    # The rows of a batch have as many tokens each, but the images before they were made smaller may not.
    budgets = [sum(tokens) / (layers * original) for original in originals]
    return Facts(tokens, originals[0], statistics.fmean(budgets), pace)
