"""The research programs are one package, and every one of them is started as a module."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from examples.research.benchmarks import campaign
from tests.support.paths import EXAMPLES, RESEARCH, ROOT

SOURCES = sorted(RESEARCH.rglob("*.py"))
DOCUMENTS = sorted(EXAMPLES.rglob("*.md"))
PROGRAMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in SOURCES
    if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
}


def commands() -> set[str]:
    """Modules that a command of the documentation, or of a program, runs."""
    texts = (path.read_text(encoding="utf-8") for path in (*SOURCES, *DOCUMENTS))
    return {name for text in texts for name in re.findall(r"-m (examples\.[\w.]+\w)", text)}


def test_every_program_is_run_as_a_module_somewhere_in_its_documentation() -> None:
    assert commands() == PROGRAMS


@pytest.mark.parametrize("name", [campaign.CAMPAIGN, campaign.REALISATIONS])
def test_a_row_of_the_campaign_is_a_program(name: str) -> None:
    assert name in PROGRAMS
    assert find_spec(name) is not None


def test_a_program_starts_from_the_root_of_the_checkout() -> None:
    done = subprocess.run(
        [sys.executable, "-m", campaign.CAMPAIGN, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--small" in done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(RESEARCH).as_posix())
def test_no_program_changes_where_modules_are_looked_for(path: Path) -> None:
    assert "sys.path" not in path.read_text(encoding="utf-8")
