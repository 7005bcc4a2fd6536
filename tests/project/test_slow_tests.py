"""The slow tests are dealt out whole, nothing that has started is stopped, and their costs can be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.durations import by_file, read, table
from tests.support.paths import ROOT
from tests.support.slow_share import SHARES, dealt, first_of, share_of

NAMES = [f"tests/test_it.py::test_{number:02}" for number in range(10)]


def test_every_slow_test_is_in_one_share() -> None:
    shares = [dealt(NAMES, share) for share in range(SHARES)]
    assert sorted(name for share in shares for name in share) == NAMES
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert dealt(NAMES[::-1], 0) == shares[0], "whatever order they were found in"


def test_the_commit_says_whose_share() -> None:
    commits = [f"{number:08x}" + "e" * 32 for number in range(2 * SHARES)]
    assert [share_of(commit) for commit in commits] == [*range(SHARES), *range(SHARES)]


def test_commits_of_one_share_begin_with_different_tests() -> None:
    commits = [f"{0:08x}{number:08x}" + "e" * 24 for number in range(5)]
    assert {share_of(commit) for commit in commits} == {0}
    assert [first_of(commit, 3) for commit in commits] == [0, 1, 2, 0, 1]
    assert first_of(commits[1], 0) == 0


@pytest.mark.parametrize(("minutes", "late"), [("1", 0), ("0", 2)])
def test_what_a_run_says(minutes: str, late: int, tmp_path: Path) -> None:
    cases = f"@pytest.mark.parametrize('n', range({2 * SHARES}))"
    tests = f"import pytest\n{cases}\ndef test_it(n):\n    assert n >= 0\n"
    (tmp_path / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.slow_share", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, str(tmp_path), "--commit", "00000001" + "0" * 32, "--minutes", minutes],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = f"share 2 of {SHARES}, by commit 00000001; {late} not started within {minutes} minutes"
    assert said in done.stdout
    assert ("2 passed" in done.stdout) is (late == 0)
    assert f"{2 * SHARES - 2} deselected" in done.stdout


def test_durations_are_read_from_a_log() -> None:
    tests = read(
        "=== slowest durations ===\n"
        "2.50s call     tests/a/test_b.py::test_c[a case]\n"
        "0.50s setup    tests/a/test_b.py::test_c[a case]\n"
        "9.00s call     tests/a/test_d.py::test_e\n"
        "12 passed in 12.00s\n"
    )
    assert tests == {"tests/a/test_b.py::test_c[a case]": 3.0, "tests/a/test_d.py::test_e": 9.0}
    assert table(by_file(tests), "file")[2:] == [
        "| all | 12 |",
        "| tests/a/test_d.py | 9 |",
        "| tests/a/test_b.py | 3 |",
    ]
