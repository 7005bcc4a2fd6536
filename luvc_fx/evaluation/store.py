"""Answers on disk: appended batch by batch, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from luvc_fx.inputs import InputError


class Answers:
    """A JSONL file of answers, by run (see `luvc_fx.evaluation.keys.run_key`) and question.

    Lines are ``{"run", "question", "answer"}``, or ``{"run", "facts"}`` for what else was seen in a run;
    the last facts count. Each batch is written at once. A line that a crash cut short is dropped.

    Raises:
        InputError: the file cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, dict[str, str]] = defaultdict(dict)
        self.facts: dict[str, dict[str, Any]] = {}
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
                if "facts" in entry:
                    self.facts[entry["run"]] = entry["facts"]
                else:
                    self.answers[entry["run"]][entry["question"]] = entry["answer"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"'{path}', line {number}, is no answer of `luvc-fx eval`") from None

    def add(self, run: str, answers: Mapping[str, str]) -> None:
        """Keep the answers of one batch, by the keys of the questions."""
        self.answers[run].update(answers)
        self._append({"run": run, "question": key, "answer": text} for key, text in answers.items())

    def note(self, run: str, facts: dict[str, Any]) -> None:
        """Keep what was seen in a run."""
        self.facts[run] = facts
        self._append([{"run": run, "facts": facts}])

    def _append(self, entries: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"'{self.path}' cannot be written: {error.strerror}") from None
