"""What the tests cost, by file, from the log of a run with ``--durations=0 -vv``.

    make test-all 2>&1 | tee log      (with PYTEST_ADDOPTS="--durations=0 -vv")
    python -m tests.support.durations log [--tests 20]

prints a Markdown table of files, dearest first, and of the dearest tests. Fixtures count with the test
that they were made for.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

LINE = re.compile(r"^(\d+\.\d+)s (?:call|setup|teardown) +(\S+?\.py)(::.*)$")


def read(log: str) -> Counter[str]:
    """Seconds by test (its node id)."""
    seconds: Counter[str] = Counter()
    for line in log.splitlines():
        found = LINE.match(line)
        if found is not None:
            seconds[found[2] + found[3].rstrip()] += float(found[1])
    return seconds


def by_file(tests: Counter[str]) -> Counter[str]:
    """Seconds by file."""
    files: Counter[str] = Counter()
    for name, seconds in tests.items():
        files[name.partition("::")[0]] += seconds
    return files


def table(seconds: Counter[str], head: str, most: int | None = None) -> list[str]:
    """A Markdown table, dearest first, with the sum of all rows."""
    total = sum(seconds.values())
    rows = [f"| {name} | {value:.0f} |" for name, value in seconds.most_common(most) if value >= 0.5]
    return [f"| {head} | seconds |", "| --- | ---: |", f"| all | {total:.0f} |", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--tests", type=int, default=20, help="how many single tests to list")
    arguments = parser.parse_args()
    tests = read(arguments.log.read_text(encoding="utf-8"))
    if not tests:
        raise SystemExit(f"{arguments.log} has no durations: run pytest with --durations=0 -vv")
    print("\n".join([*table(by_file(tests), "file"), "", *table(tests, "test", arguments.tests)]))


if __name__ == "__main__":
    main()
