"""What a comparison is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BUDGETS = (0.75, 0.5, 0.33, 0.25, 0.125)


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
