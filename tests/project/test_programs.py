"""The programs whose lines the documentation shows run, and print what it says they print.

Those of `examples/` have tests of their own: `test_quickstart` here, and in tests/stacks and tests/graph.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from luvc_fx.apps.evaluation.questions import read_questions
from tests.support.cases import slow_unless
from tests.support.paths import RESEARCH, ROOT

PROGRAMS = ROOT / "docs" / "programs"
ARGUMENTS = {
    "forward": ("eager",),
    "generate": ("eager",),
    "own_check": ("eager",),
    "own_family": ("eager",),
    "own_merger": ("eager",),
    "picture": ("{tmp}/kept.png",),
    "report": ("eager",),
    "saved": ("{tmp}/saved",),
    "sizes": (str(RESEARCH / "models" / "qwen2_vl"), "eager"),
}
FAST = ("forward", "own_pass", "schedules")
MEASURED = re.compile(r"\d+ ms|[\d.]+ s\b|\d+ -> \d+ nodes")
"""What differs from run to run, or with the version of torch."""


def names() -> list[str]:
    return sorted(path.stem for path in PROGRAMS.glob("*.py"))


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", slow_unless(names(), FAST))
def test_a_program_runs_and_prints_what_stands_beside_it(name: str, tmp_path: Path) -> None:
    arguments = [argument.format(tmp=tmp_path) for argument in ARGUMENTS.get(name, ())]
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / f"{name}.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = PROGRAMS / f"{name}.out"
    if output.exists():
        wanted = output.read_text(encoding="utf-8")
        assert MEASURED.sub("N", done.stdout) == MEASURED.sub("N", wanted)


def test_settings_are_of_programs_that_exist() -> None:
    outputs = {path.stem for path in PROGRAMS.glob("*.out")}
    assert {*ARGUMENTS, *FAST, *outputs} <= set(names())


def test_the_line_of_questions_that_is_shown_can_be_read(tmp_path: Path) -> None:
    line = tmp_path / "questions.jsonl"
    line.write_text((PROGRAMS / "question.json").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "a.png").touch()
    (question,) = read_questions(line)
    assert (question.answer, question.task) == ("red", "color")
