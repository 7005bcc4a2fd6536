"""Ask a model questions under one schedule."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import luvc_fx
from luvc_fx import _compat
from luvc_fx.evaluation.features import Features
from luvc_fx.evaluation.prompts import Prompts, Row, batches, collate
from luvc_fx.evaluation.questions import Question
from luvc_fx.report import NotRewritten, Report
from luvc_fx.schedule import Schedule


@dataclass(slots=True)
class Facts:
    """What was seen while questions were asked.

    Attributes:
        tokens_per_layer: visual tokens of a row that enter each decoder layer, in the first batch.
        visual: visual tokens of a row of that batch without luvc_fx.
        budgets: by the visual tokens of a prompt, the mean over the layers of what enters, over them.
        asked: by the visual tokens of a prompt, how many questions had such a one.
        paces: of each batch, seconds for a question, compilation included.
    """

    tokens_per_layer: list[int] = field(default_factory=list)
    visual: int = 0
    budgets: dict[int, float] = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)
    paces: list[float] = field(default_factory=list)

    @property
    def budget(self) -> float:
        """The mean budget of the questions."""
        return sum(self.budgets[n] * count for n, count in self.asked.items()) / sum(self.asked.values())

    @property
    def seconds_per_question(self) -> float:
        """The median of the batches, so that those which compiled something do not count."""
        return statistics.median(self.paces)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "tokens_per_layer": self.tokens_per_layer,
            "visual": self.visual,
            "budget": self.budget,
            "seconds_per_question": self.seconds_per_question,
        }


@torch.inference_mode()
def ask(
    prompts: Prompts,
    questions: Sequence[Question],
    schedule: Schedule,
    facts: Facts,
    inner: str = "eager",
    batch: int = 25,
    new_tokens: int | None = None,
    features: Features | None = None,
) -> Iterator[list[tuple[Question, str]]]:
    """Questions and the model's greedy answers, batch by batch; `facts` is filled on the way.

    The model is restored at the end. What it generates is that of `model.generate` alone: of the tokens
    up to the end of the sentence the text, without special tokens and spaces around it. Where `prompts`
    makes images smaller, the model runs as it is, and `schedule` has to do nothing.

    Args:
        inner: what compiles the rewritten graphs; accuracy needs no speed, and all give the same tokens.
        new_tokens: at most so many; None: what the generation config says.
        features: what earlier schedules' encoders made of the same pixels.

    Raises:
        luvc_fx.NotRewritten: something of the schedule that the graphs cannot follow.
        ValueError: a layer or block that the model does not have.
    """
    model = prompts.model
    rows = [prompts.row(question) for question in questions]
    most: dict[str, Any] = {} if new_tokens is None else {"max_new_tokens": new_tokens}
    _compat.forget_shapes()
    stock = prompts.smaller is not None
    hooks = luvc_fx.applied(model, schedule, inner=inner, strict=True)
    with contextlib.nullcontext() if stock else hooks:
        if features is not None and not stock:
            features.share(model)
        for numbers, count in batches(rows, batch):
            chosen = [rows[number] for number in numbers]
            inputs = collate(chosen, count, prompts.padding, model.device, model.dtype)
            started = time.perf_counter()
            if chosen[0].smaller is not None:
                inputs = chosen[0].smaller.encoded(model, inputs)
            output = _generate(model, inputs, most)
            new = output[: len(chosen), inputs["input_ids"].shape[1] :]
            texts = prompts.processor.batch_decode(new, skip_special_tokens=True)
            facts.paces.append((time.perf_counter() - started) / count)
            _note(facts, None if stock else luvc_fx.report_of(model), chosen, model)
            yield [(questions[number], text.strip()) for number, text in zip(numbers, texts, strict=True)]


def _generate(model: Any, inputs: dict[str, Any], most: dict[str, Any]) -> Tensor:
    try:
        return model.generate(**inputs, do_sample=False, num_beams=1, **most)
    except Exception as error:
        # What a backend raises, Dynamo wraps.
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, NotRewritten):
            raise inner from error
        raise


def _note(facts: Facts, report: Report | None, rows: Sequence[Row], model: Any) -> None:
    visual, smaller = rows[0].visual, rows[0].smaller
    if report is not None:
        budget, tokens = report.budget(visual), report.tokens_per_layer()
    else:
        assert smaller is not None
        budget = smaller.tokens / smaller.of
        tokens = [visual] * model.config.get_text_config().num_hidden_layers
    facts.budgets.setdefault(visual, budget)
    if not facts.tokens_per_layer:
        facts.tokens_per_layer, facts.visual = tokens, round(visual / budget) if smaller else visual
    facts.asked[visual] = facts.asked.get(visual, 0) + len(rows)
