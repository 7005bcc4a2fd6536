"""A pytest plugin: the share of the slow tests that a commit runs, with no new test after a time limit.

``pytest -p tests.support.slow_share -m slow --commit HASH --minutes 25`` is what `.ci/run` does after
`make test`. The slow tests are dealt into `SHARES` hands in the order of their names, and the commit's
hash says whose hand is played, and with which test it begins: one commit always runs the same ones in the
same order. A test that has started is never stopped. When the minutes are used the others are skipped, and
their number is said; other commits begin with other tests, so it is not always the same ones that are left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

SHARES = 3
"""As many as it takes for each to fit into CI's limit, see tests/DURATIONS.md."""
LATE = "the minutes for slow tests are used"
BEGAN = pytest.StashKey[float]()


def share_of(commit: str) -> int:
    """The share of a commit, from 0; `commit` is its hash in hexadecimal digits."""
    return int(commit[:8], 16) % SHARES


def dealt(names: Sequence[str], share: int) -> set[str]:
    """Every `SHARES`-th name, beginning with number `share`."""
    return set(sorted(names)[share::SHARES])


def first_of(commit: str, count: int) -> int:
    """With which of `count` tests a commit begins, by digits of its hash that do not decide its share."""
    return int(commit[8:16], 16) % count if count else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("slow share")
    group.addoption(
        "--commit", metavar="HASH", required=True, help="whose share of the selected tests to run"
    )
    group.addoption("--minutes", type=float, metavar="N", required=True, help="start no test after N minutes")


@pytest.hookimpl(trylast=True)  # after -m has selected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[BEGAN] = time.monotonic()
    commit = config.getoption("commit")
    mine = dealt([item.nodeid for item in items], share_of(commit))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in mine])
    hand = [item for item in items if item.nodeid in mine]
    first = first_of(commit, len(hand))
    items[:] = hand[first:] + hand[:first]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - item.config.stash[BEGAN] > 60 * item.config.getoption("minutes"):
        pytest.skip(LATE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    commit = config.getoption("commit")
    late = sum(LATE in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(
        f"Slow tests: share {share_of(commit) + 1} of {SHARES}, by commit {commit[:8]}; "
        f"{late} not started within {config.getoption('minutes'):g} minutes."
    )
