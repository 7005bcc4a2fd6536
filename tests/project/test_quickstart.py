"""`examples/quickstart.py` runs, and its three lines are the README's."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


def test_the_readme_shows_the_lines_of_the_example() -> None:
    example = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    three = example.partition("# the three lines\n")[2].partition("# end of the three lines")[0]
    shown = re.search(r"<!-- the three lines -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert shown is not None
    assert shown[1] == three
    assert len(three.splitlines()) == 3


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
