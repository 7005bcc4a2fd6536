"""Accuracy against budget: ask a local model the same questions under every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luvc_fx.apps.environment import hardware, versions
from luvc_fx.apps.evaluation.asking import ask, combined
from luvc_fx.apps.evaluation.features import Decoders, Features
from luvc_fx.apps.evaluation.keys import model_key, run_key
from luvc_fx.apps.evaluation.methods import (
    DEFAULT,
    RANDOM,
    RANDOM_BLOCK,
    SEEDED,
    SEEDS,
    methods,
    with_selector,
)
from luvc_fx.apps.evaluation.prompts import Prompts, collate
from luvc_fx.apps.evaluation.questions import Question, read_questions, with_wrong_images
from luvc_fx.apps.evaluation.result import UNPRUNED, Cell, CellResult, EvalResult, WrongImage
from luvc_fx.apps.evaluation.scoring import score, tasks_of
from luvc_fx.apps.evaluation.store import Answers
from luvc_fx.apps.evaluation.timing import time_prefills
from luvc_fx.apps.images_only import VIDEO
from luvc_fx.apps.inputs import read_schedule
from luvc_fx.apps.local_model import load
from luvc_fx.report import NotRewritten
from luvc_fx.report.errors import InputError, one_line
from luvc_fx.schedule import Schedule
from luvc_fx.selectors import registered

BUDGETS = (0.75, 0.5, 0.33, 0.25, 0.125)

Watch = Callable[[str, int, int], None]
"""Shows progress: a title, the number of questions answered, and that of all questions."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to compare.

    Attributes:
        model: a directory that `from_pretrained` can load; `questions`: see `read_questions`.
        out: folder of `answers.jsonl`, which a later run goes on with.
        methods: names of `luvc_fx.apps.evaluation.methods`; empty: all.
        schedules: presets and JSON files, each a row with a budget of its own; behind a colon the name of
            a selector may stand, which then picks the tokens at the same counts.
        new_tokens: at most so many in an answer; None: what the generation config says.
        wrong_image: also ask the unpruned model about other scenes' images.
        rounds: timed prefills of each cell; 0: nothing is timed.
        seed: of the bootstrap, and the first of those of random tokens.
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


def run(options: Options, say: Callable[[str], None], watch: Watch) -> EvalResult:
    """Ask, score and compare; answers that `options.out` holds already are not asked for again.

    Raises:
        InputError: anything in `options` that cannot be followed, in one line.
    """
    names, given = _chosen(options), _all_given(options)
    questions = read_questions(options.questions, options.split, options.limit)
    say(f"{len(questions)} questions about {len({q.scene for q in questions})} scenes")
    model, processor = load(options.model)
    # Half precision is slow on a CPU, and decides near ties differently.
    model = model.to("cuda") if torch.cuda.is_available() else model.float()
    asker = Asker(model, processor, options, Answers(options.out / "answers.jsonl"), watch)

    unpruned = Cell(UNPRUNED, None, Schedule())
    answers = {unpruned: asker.answers(unpruned, questions)}
    wrong_image = _wrong_image(asker, unpruned, questions, answers[unpruned]) if options.wrong_image else {}
    layers = model.config.get_text_config().num_hidden_layers
    cells = [unpruned, *_cells(options, names, layers), *given]
    again: dict[Cell, list[list[str]]] = {}
    for number, cell in enumerate(cells[1:], 1):
        if cell.schedule is None:
            continue
        try:
            answers[cell], *again[cell] = [asker.answers(one, questions) for one in _each_seed(cell)]
        except InputError:
            raise
        except (NotRewritten, ValueError) as error:
            cells[number] = dataclasses.replace(cell, reason=one_line(error))
    rivals = {name: _rivals(name, answers) for name in (RANDOM, RANDOM_BLOCK, DEFAULT)}
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
    known, cells = methods(), []
    for budget in dict.fromkeys(options.budgets):
        for name in names:
            if known[name].own_budget:
                continue
            schedule = known[name].make(budget, layers)
            cell = Cell(name, budget, schedule, budget if known[name].smaller else None)
            cells.append(_seeded(cell, options.seed))
    for name in names:
        if known[name].own_budget:
            cells.append(Cell(name, None, known[name].make(1.0, layers)))
    return cells


def _seeded(cell: Cell, seed: int) -> Cell:
    """With several seeds where a selector draws."""
    draws = cell.schedule is not None and any(prune.selector.name in SEEDED for prune in cell.schedule.prune)
    return dataclasses.replace(cell, seeds=tuple(range(seed, seed + SEEDS)) if draws else ())


def _each_seed(cell: Cell) -> list[Cell]:
    """The cell as it is, or one for each of its seeds."""
    if not cell.seeds:
        return [cell]
    return [
        dataclasses.replace(cell, method=f"{cell.method}, seed {seed}", schedule=schedule, seeds=())
        for seed, schedule in zip(cell.seeds, cell.schedules, strict=True)
    ]


def _all_given(options: Options) -> list[Cell]:
    """The rows of `options.schedules`, whose names must be free and distinct: rows are found by them."""
    taken = {name: f"the method {name!r}" for name in methods()} | {UNPRUNED: "the unpruned model"}
    cells, rows = [], set()
    for text in dict.fromkeys(options.schedules):
        source, selector = _parts(text)
        cell = _given(source, selector, options.seed)
        stem = Path(source).stem
        if taken.setdefault(stem, source) != source or cell.method in rows:
            raise InputError(
                f"schedule {text!r} cannot be told from {taken[stem]} by its name, {cell.method!r}; allowed: "
                "files whose names, without folders, are all different and of no method"
            )
        rows.add(cell.method)
        cells.append(cell)
    return cells


def _parts(text: str) -> tuple[str, str]:
    """A preset or a file, and the selector behind its colon, or nothing."""
    name, colon, selector = text.rpartition(":")
    return (name, selector) if colon and selector in registered() else (text, "")


def _given(source: str, selector: str, seed: int) -> Cell:
    """The row of a preset or a file, maybe with another selector."""
    schedule, name = read_schedule(source), Path(source).stem
    if not selector:
        return Cell(name, None, schedule)
    return _seeded(Cell(f"{name}:{selector}", None, with_selector(schedule, selector, seed)), seed)


def _rivals(selector: str, cells: Iterable[Cell]) -> dict[Cell, Cell]:
    """The cell of that method at each cell's budget, or of the same schedule with that selector."""
    rivals = {}
    by_name = {(cell.method, cell.budget): cell for cell in cells}
    for (method, budget), cell in by_name.items():
        stem = method.partition(":")[0]
        rival = by_name.get((f"{stem}:{selector}", None) if budget is None else (selector, budget))
        if rival is not None:
            rivals[cell] = rival
    return rivals


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
