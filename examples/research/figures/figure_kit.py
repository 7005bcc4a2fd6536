"""What the figures share: the model, questions of every type, answers that are kept, words for numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from examples.research.tinyvlm.scenes import TASKS, Scene, sample
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.apps.evaluation.methods import SEEDED, SEEDS
from luvc_fx.apps.evaluation.options import Options
from luvc_fx.apps.evaluation.prompts import Prompts
from luvc_fx.apps.evaluation.questions import ALL_TASKS, Question
from luvc_fx.apps.evaluation.result import UNPRUNED, Cell
from luvc_fx.apps.evaluation.run import Asker, Watch
from luvc_fx.apps.evaluation.scoring import score
from luvc_fx.apps.evaluation.store import Answers
from luvc_fx.apps.local_model import load
from luvc_fx.apps.tuning.flops import DecoderCost
from luvc_fx.schedule import Schedule

SPLIT = "dev"
TYPES = {
    "attributes": ("color", "shape"),
    "position": ("position",),
    "counting": ("count", "count_color"),
    "chart": TASKS["chart"],
    "cards": TASKS["cards"],
}
"""Task types, and the tasks that each holds in equal shares."""

LEVEL = 0.05
"""Below it p values are told."""

OTHER = "other"
"""The name of the row that a row is compared with, beside the unpruned model."""

Numbers = dict[str, Any]
"""What a figure is drawn and described from: plain data, as read from JSON."""


@dataclass(frozen=True)
class Size:
    """How much is asked.

    Attributes:
        questions: of each task type, at most one of them about a scene.
        images: in figures about images alone.
    """

    questions: int = 80
    images: int = 120


class Bench:
    """A model with questions of the dev split; answers are kept in `folder`.

    Args:
        folder: of the images and of ``answers.jsonl``, which a later run goes on with.
        watch: told what is asked, how many questions are answered, and of how many.
        model_dir: the shipped model's, or that of another one which knows its words.
    """

    def __init__(self, folder: Path, size: Size, watch: Watch, model_dir: Path = MODEL_DIR) -> None:
        self.folder, self.size, self.watch, self.model_dir = folder, size, watch, model_dir

    def of(self, model_dir: Path) -> Bench:
        """The same questions for another model."""
        other = type(self)(self.folder, self.size, self.watch, model_dir)
        other.questions = self.questions
        return other

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, processor = load(self.model_dir)
        return model.float(), processor

    @property
    def model(self) -> Any:
        """In float32; not to be changed."""
        return self._loaded[0]

    @property
    def processor(self) -> Any:
        """Of that model."""
        return self._loaded[1]

    @cached_property
    def asker(self) -> Asker:
        """What asks, or remembers."""
        options = Options(self.model_dir, Path(), self.folder, batch=40)
        store = Answers(self.folder / "answers.jsonl")
        return Asker(self.model, self.processor, options, store, self.watch)

    @property
    def prompts(self) -> Prompts:
        """Of the questions."""
        return self.asker.prompts

    @cached_property
    def questions(self) -> list[Question]:
        """`size.questions` of each type, the types in turns; their images are written to `folder`."""
        asked: dict[str, list[Question]] = {name: [] for name in TYPES}
        for kind, tasks in TASKS.items():
            types = [name for name, of in TYPES.items() if set(of) <= set(tasks)]
            number = 0
            while any(len(asked[name]) < self.size.questions for name in types):
                scene = sample(SPLIT, number, kind)
                for name in types:
                    found = self._question(scene, name, f"{SPLIT}-{kind}-{number:05d}", len(asked[name]))
                    if found is not None and len(asked[name]) < self.size.questions:
                        asked[name].append(found)
                number += 1
        return [question for turn in zip(*asked.values(), strict=True) for question in turn]

    def _question(self, scene: Scene, name: str, stem: str, number: int) -> Question | None:
        """About that scene, of the task whose turn it is; None: the scene has no such question."""
        task = TYPES[name][number % len(TYPES[name])]
        chosen = next((question for question in scene.questions if question.task == task), None)
        if chosen is None:
            return None
        path = self.folder / "images" / f"{stem}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            scene.image.save(path)
        return Question((path,), chosen.text, chosen.answer, task, stem, split=SPLIT)

    @cached_property
    def scenes(self) -> list[Question]:
        """The first question about each scene, of `size.images` scenes of all kinds."""
        first = {question.scene: question for question in reversed(self.questions)}
        return list(reversed(first.values()))[: self.size.images]

    def asked(self) -> Numbers:
        """How much was asked, for captions."""
        return {
            "questions": len(self.questions),
            "scenes": len({question.scene for question in self.questions}),
            "per_type": self.size.questions,
            "split": SPLIT,
        }

    def rows(
        self, schedules: Mapping[str, Schedule], against: Mapping[str, str] | None = None
    ) -> dict[str, Numbers]:
        """What the model answers under each schedule; first without one, as ``"unpruned"``.

        Args:
            against: which other row a row is compared with.

        Returns:
            For each name the mean budget, the tokens that enter each layer, the ideal speed of the prefill
            (decoder FLOPs without a schedule over those with it), and scores by type and by task:
            accuracy, its interval, and differences with p values (``"unpruned"`` and ``"other"``).
        """
        cells = {
            name: _cell(name, schedule) for name, schedule in {UNPRUNED: Schedule(), **schedules}.items()
        }
        said, again = {}, {}
        for cell in cells.values():
            each = [dataclasses.replace(cell, schedule=one, seeds=()) for one in cell.schedules]
            said[cell], *again[cell] = [self.asker.answers(one, self.questions) for one in each]
        pairs = {cells[name]: cells[other] for name, other in (against or {}).items()}
        typed = [dataclasses.replace(q, task=_type_of(q.task)) for q in self.questions]
        by_type = score(typed, said, cells[UNPRUNED], {OTHER: pairs}, again=again)
        by_task = score(self.questions, said, cells[UNPRUNED], {OTHER: pairs}, again=again)
        cost = DecoderCost.of(self.model)
        rows = [self.prompts.prompt(question) for question in self.questions]
        text = round(median(row.length - row.visual for row in rows))
        whole = cost.flops([rows[0].visual + text] * len(cost.weights))
        found = {}
        for name, cell in cells.items():
            facts = self.asker.facts(cell, self.questions)
            entering = facts["tokens_per_layer"]
            scores = {**by_task[cell], **by_type[cell]}
            found[name] = {
                "budget": facts["budget"],
                "tokens_per_layer": entering,
                "speedup": whole / cost.flops([tokens + text for tokens in entering]),
                "scores": {task: asdict(scored) for task, scored in scores.items()},
            }
        return found


def _cell(name: str, schedule: Schedule) -> Cell:
    """With several seeds where one decides, as one seed is the same places in every image."""
    drawn = any(prune.selector.name in SEEDED for prune in schedule.prune)
    return Cell(name, None, schedule, seeds=tuple(range(SEEDS)) if drawn else ())


def _type_of(task: str) -> str:
    return next(name for name, tasks in TYPES.items() if task in tasks)


# ------------------------------------------------------------------------------------- reading numbers


def accuracy(row: Numbers, task: str = ALL_TASKS) -> float:
    """In percent."""
    return 100.0 * float(row["scores"][task]["accuracy"])


def arms(row: Numbers, task: str = ALL_TASKS) -> tuple[float, float]:
    """How far the 95 % interval of the accuracy goes below and above it, in points."""
    middle, interval = accuracy(row, task), row["scores"][task]["accuracy_interval"]
    low, high = interval or (middle / 100, middle / 100)
    return max(0.0, middle - 100 * low), max(0.0, 100 * high - middle)


def widest(rows: Sequence[Numbers], task: str = ALL_TASKS) -> float:
    """Half the widest 95 % interval of an accuracy among `rows`, in points."""
    return max(sum(arms(row, task)) / 2 for row in rows)


def told(rows: Mapping[str, Numbers], other: str, task: str = ALL_TASKS) -> str:
    """How far rows, by what to call them, are above the row that each is compared with, in points.

    What is significant after Holm's correction has its p value behind it.
    """
    parts = []
    for label, row in rows.items():
        against = row["scores"][task]["against"][other]
        p = against["adjusted"]
        sure = f" ({probability(p)})" if p < LEVEL else ""
        parts.append(f"{label} {100 * against['difference']:+.1f}{sure}".strip())
    return ", ".join(parts)


def probability(p: float) -> str:
    """For a caption."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def listed(parts: Sequence[str]) -> str:
    """``a, b and c``; ``none`` of nothing."""
    if not parts:
        return "none"
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def about(numbers: Numbers) -> str:
    """How much was asked, as a paragraph of its own."""
    asked = numbers["asked"]
    return (
        f"\n\n{asked['questions']} questions of the {asked['split']} split about {asked['scenes']} scenes, "
        f"{asked['per_type']} of each task type, at most one of a type about a scene."
    )
