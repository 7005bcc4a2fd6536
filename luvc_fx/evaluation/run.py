"""Accuracy against budget: ask a local model the same questions under every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luvc_fx.environment import hardware, versions
from luvc_fx.evaluation.asking import Facts, ask
from luvc_fx.evaluation.features import Features
from luvc_fx.evaluation.keys import model_key, run_key
from luvc_fx.evaluation.methods import RANDOM, SPECTRUM, methods, with_selector
from luvc_fx.evaluation.prompts import Prompts, collate
from luvc_fx.evaluation.questions import Question, read_questions, with_wrong_images
from luvc_fx.evaluation.result import UNPRUNED, Cell, Result, Row
from luvc_fx.evaluation.scoring import score, tasks_of
from luvc_fx.evaluation.store import Answers
from luvc_fx.evaluation.timing import time_prefills
from luvc_fx.inputs import InputError, one_line, read_schedule
from luvc_fx.local_model import load
from luvc_fx.registry import registered
from luvc_fx.report import NotRewritten
from luvc_fx.schedule import Schedule

BUDGETS = (0.75, 0.5, 0.33, 0.25, 0.125)

Watch = Callable[[str, int, int], None]
"""Told what is asked, how many questions are answered, and of how many."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to compare.

    Attributes:
        model: a directory that `from_pretrained` can load; `questions`: see `read_questions`.
        out: folder of `answers.jsonl`, which a later run goes on with.
        methods: names of `luvc_fx.evaluation.methods`; empty: all.
        schedules: presets and JSON files, each a row with a budget of its own; behind a colon the name of
            a selector may stand, which then picks the tokens at the same counts.
        new_tokens: at most so many in an answer; None: what the generation config says.
        wrong_image: also ask the unpruned model about other scenes' images.
        rounds: timed prefills of each cell; 0: nothing is timed.
        seed: of random tokens and of the bootstrap.
    """

    model: Path
    questions: Path
    out: Path
    methods: tuple[str, ...] = ()
    budgets: tuple[float, ...] = BUDGETS
    schedules: tuple[str, ...] = ()
    split: str | None = None
    limit: int | None = None
    batch: int = 25
    new_tokens: int | None = None
    inner: str = "eager"
    wrong_image: bool = False
    rounds: int = 0
    seed: int = 0


def run(options: Options, say: Callable[[str], None], watch: Watch) -> Result:
    """Ask, score and compare; answers that `options.out` holds already are not asked for again.

    Raises:
        InputError: anything in `options` that cannot be followed, in one line.
    """
    names, given = _chosen(options), [_given(text, options.seed) for text in dict.fromkeys(options.schedules)]
    questions = read_questions(options.questions, options.split, options.limit)
    say(f"{len(questions)} questions about {len({q.scene for q in questions})} scenes")
    model, processor = load(options.model)
    # Half precision is slow on a CPU, and its ties are others.
    model = model.to("cuda") if torch.cuda.is_available() else model.float()
    asker = Asker(model, processor, options, Answers(options.out / "answers.jsonl"), watch)

    unpruned = Cell(UNPRUNED, None, Schedule())
    answers = {unpruned: asker.answers(unpruned, questions)}
    wrong_image: dict[str, float] = {}
    if options.wrong_image:
        others = with_wrong_images(questions)
        if others:
            said = asker.answers(unpruned, others, "unpruned, wrong images")
            right = torch.tensor([q.right(text) for q, text in zip(others, said, strict=True)]).double()
            wrong_image = {task: float(right[which].mean()) for task, which in tasks_of(others).items()}
    layers = model.config.get_text_config().num_hidden_layers
    cells = [unpruned, *_cells(options, names, layers), *given]
    for number, cell in enumerate(cells[1:], 1):
        if cell.schedule is None:
            continue
        try:
            answers[cell] = asker.answers(cell, questions)
        except InputError:
            raise
        except (NotRewritten, ValueError) as error:
            cells[number] = dataclasses.replace(cell, reason=one_line(error))
    rivals = {name: _rivals(name, answers) for name in (RANDOM, SPECTRUM)}
    scores = score(questions, answers, unpruned, rivals, options.seed)
    rows = [_row(cell, scores.get(cell), asker.facts(cell)) for cell in cells]
    if options.rounds:
        _time(rows, asker, questions[0], options.rounds, say)
    return Result(
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
        },
        hardware=hardware(model),
        versions=versions(),
    )


class Asker:
    """Asks one model, or remembers what it said."""

    def __init__(self, model: Any, processor: Any, options: Options, store: Answers, watch: Watch) -> None:
        self.model, self.options, self.store, self.watch = model, options, store, watch
        self.prompts, self.features = Prompts(model, processor), Features()
        self.model_key = model_key(options.model)

    def key(self, cell: Cell) -> str:
        """Of the answers of that cell."""
        assert cell.schedule is not None
        return run_key(
            self.model_key,
            cell.schedule,
            smaller=cell.smaller,
            inner=self.options.inner,
            dtype=str(self.model.dtype),
            new_tokens=self.options.new_tokens,
        )

    def answers(self, cell: Cell, questions: Sequence[Question], title: str | None = None) -> list[str]:
        """The model's answers in the order of `questions`, kept batch by batch.

        Raises:
            luvc_fx.NotRewritten, ValueError: as of `ask`.
        """
        assert cell.schedule is not None
        key, title = self.key(cell), title or cell.name
        known = self.store.answers[key]
        todo = list({q.key: q for q in questions if q.key not in known}.values())
        total, done, facts = len(todo), 0, Facts()
        new = key not in self.store.facts
        if not todo:
            return [known[question.key] for question in questions]
        self.watch(title, 0, total)
        prompts = self.prompts
        if cell.smaller is not None:
            prompts = Prompts(self.model, self.prompts.processor, cell.smaller)
        for part in ask(
            prompts,
            todo,
            cell.schedule,
            facts,
            self.options.inner,
            self.options.batch,
            self.options.new_tokens,
            self.features,
        ):
            if key not in self.store.facts:  # before the answers, which are nothing without them
                self.store.note(key, facts.to_dict())
            self.store.add(key, {question.key: text for question, text in part})
            done += len(part)
            self.watch(title, done, total)
        if new:
            self.store.note(key, facts.to_dict())
        return [known[question.key] for question in questions]

    def facts(self, cell: Cell) -> dict[str, Any]:
        """What was seen while the cell was asked; empty where it was not."""
        return {} if cell.schedule is None else self.store.facts.get(self.key(cell), {})


def _most(options: Options) -> str:
    return "new tokens as configured" if options.new_tokens is None else f"{options.new_tokens} new tokens"


def _chosen(options: Options) -> list[str]:
    known = methods()
    unknown = [name for name in options.methods if name not in known]
    if unknown:
        raise InputError(f"method {unknown[0]!r} is not known; allowed: {', '.join(known)}")
    for budget in options.budgets:
        if not 0.0 < budget <= 1.0:
            raise InputError(f"budget {budget:g} is not allowed; allowed: numbers in (0, 1]")
    return list(dict.fromkeys(options.methods or known))


def _cells(options: Options, names: Sequence[str], layers: int) -> list[Cell]:
    """The cells of these methods, budget by budget, and then those with a budget of their own."""
    known, found = methods(), []
    for budget in dict.fromkeys(options.budgets):
        for name in names:
            if known[name].own_budget:
                continue
            made = known[name].make(budget, layers)
            if made is not None and name == RANDOM:
                made = with_selector(made, RANDOM, options.seed)
            found.append(Cell(name, budget, made, budget if known[name].smaller else None))
    for name in names:
        if known[name].own_budget:
            found.append(Cell(name, None, known[name].make(1.0, layers)))
    return found


def _given(text: str, seed: int) -> Cell:
    """The row of a preset or a file, maybe with another selector behind a colon."""
    name, colon, selector = text.rpartition(":")
    if not colon or selector not in registered():
        return Cell(Path(text).stem, None, read_schedule(text))
    return Cell(f"{Path(name).stem}:{selector}", None, with_selector(read_schedule(name), selector, seed))


def _rivals(selector: str, cells: Iterable[Cell]) -> dict[Cell, Cell]:
    """The cell of that method at each cell's budget, or of the same schedule with that selector."""
    found = {}
    by_name = {(cell.method, cell.budget): cell for cell in cells}
    for (method, budget), cell in by_name.items():
        stem = method.partition(":")[0]
        rival = by_name.get((f"{stem}:{selector}", None) if budget is None else (selector, budget))
        if rival is not None:
            found[cell] = rival
    return found


def _row(cell: Cell, scores: Any, facts: dict[str, Any]) -> Row:
    if not scores:
        return Row(cell)
    return Row(
        cell,
        measured=facts["budget"],
        tokens_per_layer=facts["tokens_per_layer"],
        visual=facts["visual"],
        scores=scores,
        seconds_per_question=facts["seconds_per_question"],
    )


def _time(rows: list[Row], asker: Asker, question: Question, rounds: int, say: Callable[[str], None]) -> None:
    model, prompts = asker.model, asker.prompts
    inputs = collate([prompts.row(question)], 1, prompts.padding, model.device, model.dtype)
    timed = {row.cell.name: row for row in rows if row.scores and row.cell.smaller is None}
    schedules = {name: row.cell.schedule for name, row in timed.items() if row.cell.schedule is not None}
    for name, (median, spread) in time_prefills(model, inputs, schedules, rounds, say).items():
        timed[name].prefill_ms, timed[name].prefill_spread_ms = median, spread
