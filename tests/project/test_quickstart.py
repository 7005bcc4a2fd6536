"""`examples/quickstart.py` runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_example_answers() -> None:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "merge after encoder block" in done.stdout
    assert "prune before decoder layer" in done.stdout
    question, _, answer = done.stdout.splitlines()[-1].partition("?")
    assert question and answer.strip()
