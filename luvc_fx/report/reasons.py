"""Why something was left as it was: reasons, refusals, and the warning and the error that carry them."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from dataclasses import dataclass


class LuvcWarning(UserWarning):
    """Something that the schedule asked for was not done; the text says what and why."""


class NotRewritten(RuntimeError):
    """Raised in place of a `LuvcWarning` with ``on_no_match="raise"`` or ``strict=True``."""


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Raise `NotRewritten` itself where Dynamo raises an error of its own around it."""
    try:
        yield
    except Exception as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, NotRewritten):
            raise inner from error
        raise


class Reason(enum.StrEnum):
    """Why something that the schedule asked for was not done."""

    NO_FUSION = "no-fusion"
    CAPTURE_ENDED_BEFORE_FUSION = "capture-ended-before-fusion"
    NO_ATTENTION = "no-attention"
    NO_GRID = "no-grid"
    RESIDUAL_STREAM = "residual-stream"
    UNEVEN_BATCH = "uneven-batch"
    PAST_NOT_EMPTY = "past-not-empty"
    TOKEN_AXIS = "token-axis"
    SCHEDULE = "schedule"
    TRAINING = "training"
    INPUTS = "inputs"
    CACHE = "cache"
    PASS_FAILED = "pass-failed"
    FELL_BACK = "fell-back"
    RECOMPILE_LIMIT = "recompile-limit"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that was not done: the reason, a sentence for people, and the graph node that it is about."""

    reason: Reason
    text: str
    node: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.text}" + (f" [{self.node}]" if self.node else "")


class Refused(Exception):
    """Raised inside recognition, plan and passes; the backend turns it into a `Refusal`."""

    def __init__(self, reason: Reason, text: str, node: object = "") -> None:
        super().__init__(text)
        self.refusal = Refusal(reason, text, str(node))
