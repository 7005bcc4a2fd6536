"""Accuracy against budget: ask a local model the same questions under every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from luvc_fx.apps.environment import hardware, versions
from luvc_fx.apps.evaluation.asking import ask, combined
from luvc_fx.apps.evaluation.cells import chosen_methods, each_seed, method_cells, rivals_of, schedule_cells
from luvc_fx.apps.evaluation.features import Decoders, Features
from luvc_fx.apps.evaluation.keys import model_key, run_key
from luvc_fx.apps.evaluation.methods import (
    DEFAULT,
    RANDOM,
    RANDOM_BLOCK,
)
from luvc_fx.apps.evaluation.options import Options
from luvc_fx.apps.evaluation.prompts import Prompts, collate
from luvc_fx.apps.evaluation.questions import Question, check_media, read_questions, with_wrong_images
from luvc_fx.apps.evaluation.result import UNPRUNED, Cell, CellResult, EvalResult, WrongImage
from luvc_fx.apps.evaluation.scoring import score, tasks_of
from luvc_fx.apps.evaluation.store import Answers
from luvc_fx.apps.evaluation.timing import time_prefills
from luvc_fx.apps.images_only import VIDEO
from luvc_fx.apps.local_model import load
from luvc_fx.report import NotRewritten
from luvc_fx.report.errors import InputError, one_line
from luvc_fx.schedule import Schedule

Watch = Callable[[str, int, int], None]
"""Shows progress: a title, the number of questions answered, and that of all questions."""


def run(options: Options, say: Callable[[str], None], watch: Watch) -> EvalResult:
    """Ask, score and compare; answers that `options.out` holds already are not asked for again.

    Raises:
        InputError: anything in `options` that cannot be followed, in one line.
    """
    names, given = chosen_methods(options), schedule_cells(options)
    questions = read_questions(options.questions, options.split, options.limit)
    say(f"{len(questions)} questions about {len({q.scene for q in questions})} scenes")
    if read_otherwise := check_media(questions):
        say(_first_of(read_otherwise))
    model, processor = load(options.model)
    # Half precision is slow on a CPU, and decides near ties differently.
    model = model.to("cuda") if torch.cuda.is_available() else model.float()
    asker = Asker(model, processor, options, Answers(options.out / "answers.jsonl"), watch)

    unpruned = Cell(UNPRUNED, None, Schedule())
    answers = {unpruned: asker.answers(unpruned, questions)}
    wrong_image = _wrong_image(asker, unpruned, questions, answers[unpruned]) if options.wrong_image else {}
    layers = model.config.get_text_config().num_hidden_layers
    cells = [unpruned, *method_cells(options, names, layers), *given]
    again: dict[Cell, list[list[str]]] = {}
    for number, cell in enumerate(cells[1:], 1):
        if cell.schedule is None:
            continue
        try:
            answers[cell], *again[cell] = [asker.answers(one, questions) for one in each_seed(cell)]
        except InputError:
            raise
        except (NotRewritten, ValueError) as error:
            cells[number] = dataclasses.replace(cell, reason=one_line(error))
    rivals = {name: rivals_of(name, answers) for name in (RANDOM, RANDOM_BLOCK, DEFAULT)}
    scores = score(questions, answers, unpruned, rivals, options.seed, again)
    rows = [_row(cell, scores.get(cell), asker, questions) for cell in cells]
    if options.rounds:
        _time(rows, asker, questions[0], options.rounds, say)
    return EvalResult(
        rows=rows,
        tasks=list(tasks_of(questions)),
        wrong_image=wrong_image,
        settings={
            "model": f"{options.model.resolve().name}, {type(model).__name__}, {asker.model_key}",
            "questions": f"{options.questions.name}, {len(questions)}",
            "split": options.split or "all",
            "answers": f"greedy, {_most(options)}, batches of {options.batch}",
            "inner": options.inner,
            "seed": options.seed,
            **({"images": _first_of(read_otherwise)} if read_otherwise else {}),
        },
        hardware=hardware(model),
        versions=versions(),
    )


class Asker:
    """Asks one model; what it has answered before is read from `store`."""

    def __init__(self, model: Any, processor: Any, options: Options, store: Answers, watch: Watch) -> None:
        self.model, self.options, self.store, self.watch = model, options, store, watch
        self.prompts, self.features, self.decoders = Prompts(model, processor), Features(), Decoders()
        self.model_key = model_key(options.model)

    def key(self, cell: Cell) -> str:
        """Of the answers of that cell with its first seed."""
        about = hardware(self.model)
        return run_key(
            self.model_key,
            cell.schedules[0],
            smaller=cell.smaller,
            inner=self.options.inner,
            device=f"{self.model.device.type}, {about['device']}",
            dtype=about["dtype"],
            # Rows of a batch are padded, and summed, together: near ties may fall otherwise in another one.
            batch=self.options.batch,
            new_tokens=self.options.new_tokens,
            videos=getattr(self.prompts.processor, VIDEO, None) is not None,
        )

    def answers(self, cell: Cell, questions: Sequence[Question], title: str | None = None) -> list[str]:
        """The model's answers in the order of `questions`, kept batch by batch; with the first seed.

        Raises:
            luvc_fx.NotRewritten, ValueError: as of `ask`.
        """
        key, title = self.key(cell), title or cell.name
        known = self.store.answers[key]
        todo = list({q.key: q for q in questions if q.key not in known}.values())
        total, done = len(todo), 0
        if not todo:
            return [known[question.key] for question in questions]
        self.watch(title, 0, total)
        prompts = self.prompts
        if cell.smaller is not None:
            prompts = Prompts(self.model, self.prompts.processor, cell.smaller)
        for part, facts in ask(
            prompts,
            todo,
            cell.schedules[0],
            self.options.inner,
            self.options.batch,
            self.options.new_tokens,
            self.features,
            self.decoders,
        ):
            self.store.add(key, {question.key: text for question, text in part}, dataclasses.asdict(facts))
            done += len(part)
            self.watch(title, done, total)
        return [known[question.key] for question in questions]

    def facts(self, cell: Cell, questions: Sequence[Question] | None = None) -> dict[str, Any]:
        """`combined` facts of the cell on these questions, or on all that it was ever asked."""
        known = self.store.facts[self.key(cell)]
        return combined(list(known.values()) if questions is None else [known[q.key] for q in questions])


def _wrong_image(
    asker: Asker, unpruned: Cell, questions: Sequence[Question], said: Sequence[str]
) -> dict[str, WrongImage]:
    """By task; empty where no task has two scenes. `said` to the right images."""
    others = with_wrong_images(questions)
    if not others:
        return {}
    asked = list(others.values())
    answers = asker.answers(unpruned, asked, "unpruned, wrong images")
    wrong = np.array([q.right(text) for q, text in zip(asked, answers, strict=True)])
    right = np.array([questions[number].right(said[number]) for number in others])
    return {
        task: WrongImage(len(which), float(wrong[which].mean()), float(right[which].mean()))
        for task, which in tasks_of(asked).items()
    }


def _most(options: Options) -> str:
    return "new tokens as configured" if options.new_tokens is None else f"{options.new_tokens} new tokens"


def _first_of(lines: Sequence[str]) -> str:
    return lines[0] if len(lines) == 1 else f"{lines[0]}; and {len(lines) - 1} more such lines"


def _row(cell: Cell, scores: Any, asker: Asker, questions: Sequence[Question]) -> CellResult:
    if not scores:
        return CellResult(cell)
    facts = asker.facts(cell, questions)
    return CellResult(
        cell,
        measured=facts["budget"],
        tokens_per_layer=facts["tokens_per_layer"],
        visual=facts["visual"],
        scores=scores,
        seconds_per_question=facts["seconds_per_question"],
        apart=facts["apart"],
    )


def _time(
    rows: list[CellResult], asker: Asker, question: Question, rounds: int, say: Callable[[str], None]
) -> None:
    model, prompts = asker.model, asker.prompts
    inputs = collate([prompts.prompt(question)], 1, prompts.padding, model.device, model.dtype)
    timed = {row.cell.name: row for row in rows if row.scores and row.cell.smaller is None}
    schedules = {name: row.cell.schedule for name, row in timed.items() if row.cell.schedule is not None}
    for name, (median, spread) in time_prefills(model, inputs, schedules, rounds, say).items():
        timed[name].prefill_ms, timed[name].prefill_spread_ms = median, spread
