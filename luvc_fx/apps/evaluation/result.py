"""The result of a comparison: one cell for each method and budget, scored by task."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from luvc_fx.schedule import Schedule

UNPRUNED = "unpruned"


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one budget.

    Attributes:
        budget: what was asked for; None where the method has a budget of its own.
        schedule: None where the method cannot reach the budget.
        smaller: the budget that images are made smaller to; None: they are not.
        reason: why there are no answers; empty where there are.
        seeds: those with which `schedule` is asked in turn; empty: as it is.
    """

    method: str
    budget: float | None
    schedule: Schedule | None
    smaller: float | None = None
    reason: str = ""
    seeds: tuple[int, ...] = ()

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """All that are asked, one for each seed."""
        if self.schedule is None:
            return ()
        return tuple(with_seed(self.schedule, seed) for seed in self.seeds) or (self.schedule,)

    @property
    def name(self) -> str:
        """For people."""
        return self.method if self.budget is None else f"{self.method} at {100 * self.budget:g} %"


def with_seed(schedule: Schedule, seed: int) -> Schedule:
    """The same schedule, whose prunes draw with `seed` where they draw."""
    prunes = (
        prune.with_selector(prune.selector, seed=seed) if "seed" in prune.selector.parameters() else prune
        for prune in schedule.prune
    )
    return dataclasses.replace(schedule, prune=tuple(prunes))


@dataclass(frozen=True, slots=True)
class Comparison:
    """The cell against another on the same questions.

    Attributes:
        difference: accuracy minus the other's.
        p: of the two-sided sign-flip test over scenes.
        adjusted: `p` after Holm's correction over all cells that are compared with the same kind of
            other: those of the pooled questions are one family, those of single tasks another.
    """

    difference: float
    p: float
    adjusted: float


@dataclass(slots=True)
class Score:
    """A cell's answers to the questions of one task, those of all its seeds together.

    Attributes:
        accuracy, retention: with 95 % intervals over scenes; retention is over the unpruned accuracy,
            None where that is zero.
        agreement: share of answers that are the unpruned model's.
        against: by the other's name, ``"unpruned"`` or a method at the same budget.
    """

    questions: int
    scenes: int
    accuracy: float
    accuracy_interval: tuple[float, float] | None
    retention: float | None
    retention_interval: tuple[float, float] | None
    agreement: float
    against: dict[str, Comparison] = field(default_factory=dict)


@dataclass(slots=True)
class CellResult:
    """A cell with what was measured.

    Attributes:
        measured: mean over the decoder layers of the visual tokens that enter, over the original.
        tokens_per_layer: of one prompt; `visual`: its visual tokens without luvc_fx.
        scores: by task, pooled under ``"all"``; empty where there are no answers.
        seconds_per_question: in `generate`, the median of the batches. How long this run took, and no
            measure of a method: on a CPU rows without merges share the encoder's work, which the unpruned
            row, merges and smaller images pay for, and a smaller image runs without `luvc_fx`.
        apart: why questions about one image did not share its prefill; empty: they did.
        prefill_ms: median time to the first token, compiled by Inductor; None: not timed.
    """

    cell: Cell
    measured: float | None = None
    tokens_per_layer: list[int] = field(default_factory=list)
    visual: int = 0
    scores: dict[str, Score] = field(default_factory=dict)
    seconds_per_question: float | None = None
    apart: str = ""
    prefill_ms: float | None = None
    prefill_spread_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        schedule = self.cell.schedule
        return {
            "method": self.cell.method,
            "budget": self.cell.budget,
            "reason": self.cell.reason,
            "smaller": self.cell.smaller,
            "seeds": list(self.cell.seeds),
            "schedule": None if schedule is None else json.loads(schedule.to_json()),
            "measured_budget": self.measured,
            "tokens_per_layer": self.tokens_per_layer,
            "visual_tokens": self.visual,
            "scores": {task: asdict(score) for task, score in self.scores.items()},
            "seconds_per_question": self.seconds_per_question,
            "apart": self.apart,
            "prefill_ms": self.prefill_ms,
            "prefill_spread_ms": self.prefill_spread_ms,
        }


@dataclass(frozen=True, slots=True)
class WrongImage:
    """What the unpruned model says about other scenes' images, beside what it says about the right ones.

    Attributes:
        questions: those of tasks with another scene; both accuracies are theirs.
        accuracy: with a wrong image; `right_image`: with the right one.
    """

    questions: int
    accuracy: float
    right_image: float


@dataclass(slots=True)
class EvalResult:
    """A whole comparison; the first row is the unpruned model.

    Attributes:
        tasks: their names, ``"all"`` first.
        wrong_image: by task, the unpruned model that sees another scene of that task.
        settings: what was asked for.
    """

    rows: list[CellResult]
    tasks: list[str]
    wrong_image: dict[str, WrongImage]
    settings: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]

    @property
    def budgets(self) -> list[float]:
        """Those that were asked for, in that order."""
        return list(dict.fromkeys(r.cell.budget for r in self.rows if r.cell.budget is not None))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "settings": self.settings,
            "hardware": self.hardware,
            "versions": self.versions,
            "tasks": self.tasks,
            "wrong_image": {task: asdict(wrong) for task, wrong in self.wrong_image.items()},
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), indent=1)
