"""From answers to scores: accuracy, retention, agreement, and paired tests, by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from luvc_fx.apps.evaluation.questions import ALL_TASKS, Question, normalised
from luvc_fx.apps.evaluation.result import UNPRUNED, Cell, Comparison, Score
from luvc_fx.apps.evaluation.statistics import cluster_sums, holm, ratio_interval, sign_flip

Right = NDArray[np.float64]


def tasks_of(questions: Sequence[Question]) -> dict[str, NDArray[np.int64]]:
    """Numbers of the questions of each task; first those of all tasks together."""
    names = dict.fromkeys(question.task for question in questions)
    numbers = {
        name: np.array([i for i, question in enumerate(questions) if question.task == name]) for name in names
    }
    return {ALL_TASKS: np.arange(len(questions)), **numbers}


def score(
    questions: Sequence[Question],
    answers: Mapping[Cell, Sequence[str]],
    unpruned: Cell,
    rivals: Mapping[str, Mapping[Cell, Cell]] | None = None,
    seed: int = 0,
    again: Mapping[Cell, Sequence[Sequence[str]]] | None = None,
) -> dict[Cell, dict[str, Score]]:
    """Scores of every cell by task.

    Args:
        answers: of each cell to `questions`, in their order; `unpruned` is among them.
        rivals: by a name, what else cells are compared with.
        seed: of the bootstrap; all cells see the same resampled scenes.
        again: of cells that a seed decides, the answers with further seeds; all are counted together.
    """
    seeds = {cell: [said, *(again or {}).get(cell, ())] for cell, said in answers.items()}
    same = [normalised(text) for text in answers[unpruned]]
    right = {
        cell: _summed([[q.right(t) for q, t in zip(questions, said, strict=True)] for said in all_])
        for cell, all_ in seeds.items()
    }
    agrees = {
        cell: _summed([[normalised(t) == s for t, s in zip(said, same, strict=True)] for said in all_])
        for cell, all_ in seeds.items()
    }
    tasks = tasks_of(questions)
    scenes = [question.scene for question in questions]
    scores: dict[Cell, dict[str, Score]] = {cell: {} for cell in answers}
    for task, numbers in tasks.items():
        within = [scenes[i] for i in numbers]
        asked = cluster_sums(np.ones(len(numbers)), within)
        base = cluster_sums(right[unpruned][numbers], within)
        for cell in answers:
            count, sums = len(seeds[cell]), cluster_sums(right[cell][numbers], within)
            scores[cell][task] = Score(
                questions=len(numbers),
                scenes=len(asked),
                accuracy=float(sums.sum() / (count * len(numbers))),
                accuracy_interval=ratio_interval(sums, count * asked, seed),
                retention=float(sums.sum() / (count * base.sum())) if base.any() else None,
                retention_interval=ratio_interval(sums, count * base, seed),
                agreement=float(agrees[cell][numbers].mean()) / count,
            )
    counts = {cell: len(all_) for cell, all_ in seeds.items()}
    _compare(scores, UNPRUNED, {cell: unpruned for cell in answers}, right, counts, tasks, scenes)
    for name, others in (rivals or {}).items():
        _compare(scores, name, others, right, counts, tasks, scenes)
    return scores


def _summed(of_seeds: list[list[bool]]) -> Right:
    """``[seeds][questions]`` to ``[questions]``: how many seeds."""
    return np.asarray(of_seeds, dtype=np.float64).sum(axis=0)


def _compare(
    scores: dict[Cell, dict[str, Score]],
    name: str,
    others: Mapping[Cell, Cell],
    right: Mapping[Cell, Right],
    seeds: Mapping[Cell, int],
    tasks: Mapping[str, NDArray[np.int64]],
    scenes: Sequence[str],
) -> None:
    """Compare each cell with its other, and correct over the cells; none is compared with itself.

    `right` are sums over the cell's seeds. Each is taken as often as the other has seeds: so differences stay
    whole numbers, and a scene stays one difference however many seeds saw it.
    """
    pairs = [(cell, other) for cell, other in others.items() if cell != other]
    families = ([task for task in tasks if task == ALL_TASKS], [task for task in tasks if task != ALL_TASKS])
    for family in families:
        where, values, differences = [], [], []
        for task in family:
            numbers = tasks[task]
            within = [scenes[i] for i in numbers]
            for cell, other in pairs:
                gained = seeds[other] * right[cell][numbers] - seeds[cell] * right[other][numbers]
                where.append(scores[cell][task])
                values.append(sign_flip(cluster_sums(gained, within)))
                differences.append(float(gained.mean()) / (seeds[cell] * seeds[other]))
        for scored, difference, p, adjusted in zip(where, differences, values, holm(values), strict=True):
            scored.against[name] = Comparison(difference, p, adjusted)
