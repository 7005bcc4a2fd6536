"""Answers on disk: appended batch by batch, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luvc_fx.report.errors import InputError, one_line
from luvc_fx.schedule.json_text import parse


class Answers:
    """A JSONL file of answers, by run (see `luvc_fx.apps.evaluation.keys.run_key`) and question.

    Each line is a batch, ``{"run", "answers": {question: answer}, "facts"}``, written at once; the facts are
    the measurements of that batch. A line that a crash cut short is dropped, once all others are known to be
    answers; so are lines of earlier versions, which knew facts of whole runs only: no run of this version
    has their keys.

    Attributes:
        answers: by run and question; `facts`: by run and question, one object for all of a batch.

    Raises:
        InputError: the file cannot be read or written, or holds something else; it is then left as it is.
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
                *lines, last = file.read().split(b"\n")
                for number, line in enumerate(lines, 1):
                    self._read(number, line)
                if last and _is_json(last):  # whole, but for the end of the line
                    self._read(len(lines) + 1, last)
                    file.write(b"\n")
                elif last:
                    file.truncate(file.tell() - len(last))
        except OSError as error:
            raise InputError(f"'{path}' cannot be written: {error.strerror}") from None

    def _read(self, number: int, line: bytes) -> None:
        if not line.strip():
            return
        try:
            entry = parse(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("run"), str):
                raise ValueError("it is no object with a run")
            if "answers" not in entry:  # of an earlier version
                return
            answers, facts = entry["answers"], entry.get("facts")
            if not isinstance(answers, dict) or not all(isinstance(text, str) for text in answers.values()):
                raise ValueError("its answers are no object of texts")
            if not isinstance(facts, dict):
                raise ValueError("its facts are no object")
        except ValueError as error:
            raise InputError(
                f"'{self.path}', line {number}, is no answer of `luvc-fx eval`: {one_line(error)}"
            ) from None
        self._remember(entry["run"], answers, facts)

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


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    except RecursionError:  # whatever it is, no answer that was cut short
        return True
    return True
