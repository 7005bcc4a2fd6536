"""Answers on disk: appended batch by batch, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luvc_fx.report.errors import InputError


class Answers:
    """A JSONL file of answers, by run (see `luvc_fx.apps.evaluation.keys.run_key`) and question.

    Each line is a batch, ``{"run", "answers": {question: answer}, "facts"}``, written at once; the facts are
    the measurements of that batch. A line that a crash cut short is dropped. So are lines of earlier
    versions, which knew facts of whole runs only: no run of this version has their keys.

    Attributes:
        answers: by run and question; `facts`: by run and question, one object for all of a batch.

    Raises:
        InputError: the file cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, dict[str, str]] = defaultdict(dict)
        self.facts: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Created and tried now, not after the first batch.
            with path.open("ab+") as file:
                file.seek(0)
                lines = file.read().split(b"\n")
                if lines[-1]:
                    file.truncate(file.tell() - len(lines[-1]))
        except OSError as error:
            raise InputError(f"'{path}' cannot be written: {error.strerror}") from None
        for number, line in enumerate(lines[:-1], 1):
            try:
                entry = json.loads(line)
                run = entry["run"]
                if "answers" in entry:
                    self._remember(run, entry["answers"], entry["facts"])
            except (ValueError, KeyError, TypeError):
                raise InputError(f"'{path}', line {number}, is no answer of `luvc-fx eval`") from None

    def add(self, run: str, answers: Mapping[str, str], facts: dict[str, Any]) -> None:
        """Keep the answers of one batch, by the keys of the questions, and its measurements."""
        self._remember(run, answers, facts)
        text = json.dumps({"run": run, "answers": dict(answers), "facts": facts}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"'{self.path}' cannot be written: {error.strerror}") from None

    def _remember(self, run: str, answers: Mapping[str, str], facts: dict[str, Any]) -> None:
        self.answers[run].update(answers)
        self.facts[run].update(dict.fromkeys(answers, facts))
