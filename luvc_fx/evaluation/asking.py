"""Ask a model questions under one schedule."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import luvc_fx
from luvc_fx import _compat
from luvc_fx.evaluation.prompts import Prompts, Row, batches, collate
from luvc_fx.evaluation.questions import Question
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
) -> Iterator[list[tuple[Question, str]]]:
    """Questions and the model's greedy answers, batch by batch; `facts` is filled on the way.

    The model is restored at the end. What it generates is that of `model.generate` alone: of the tokens
    up to the end of the sentence the text, without special tokens and spaces around it.

    Args:
        inner: what compiles the rewritten graphs; accuracy needs no speed, and all give the same tokens.
        new_tokens: at most so many; None: what the generation config says.

    Raises:
        luvc_fx.NotRewritten: something of the schedule that the graphs cannot follow.
        ValueError: a layer or block that the model does not have.
    """
    model = prompts.model
    rows = [prompts.row(question) for question in questions]
    most: dict[str, Any] = {} if new_tokens is None else {"max_new_tokens": new_tokens}
    _compat.forget_shapes()
    with luvc_fx.applied(model, schedule, inner=inner, strict=True):
        for numbers, count in batches(rows, batch):
            chosen = [rows[number] for number in numbers]
            inputs = collate(chosen, count, prompts.padding, model.device, model.dtype)
            started = time.perf_counter()
            output = model.generate(**inputs, do_sample=False, num_beams=1, **most)
            new = output[: len(chosen), inputs["input_ids"].shape[1] :]
            texts = prompts.processor.batch_decode(new, skip_special_tokens=True)
            facts.paces.append((time.perf_counter() - started) / count)
            _note(facts, luvc_fx.report_of(model), chosen)
            yield [(questions[number], text.strip()) for number, text in zip(numbers, texts, strict=True)]


def _note(facts: Facts, report: Any, rows: Sequence[Row]) -> None:
    visual = rows[0].visual
    if visual not in facts.budgets:
        facts.budgets[visual] = report.budget(visual)
    if not facts.tokens_per_layer:
        facts.tokens_per_layer, facts.visual = report.tokens_per_layer(), visual
    facts.asked[visual] = facts.asked.get(visual, 0) + len(rows)
