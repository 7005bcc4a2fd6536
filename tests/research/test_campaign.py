"""The campaign on a GPU: rows fail, end in time, are written and left out when they are there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.research.benchmarks import campaign, speed_table
from examples.research.benchmarks.campaign import ROWS, Row, options_of
from luvc_fx.apps.bench import SHAPES


def script(name: str, code: str, **more: Any) -> Row:
    return Row(name, script=("-c", code), **more)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_row_that_fails_is_written_and_the_next_one_follows(tmp_path: Path) -> None:
    said: list[str] = []
    rows = (
        script("bad", "print('a word'); raise SystemExit(3)"),
        script("slow", "import time; time.sleep(600)", minutes=0.02),
        script("good", "print('fine')"),
    )
    assert campaign.campaign(rows, tmp_path, 1.0, False, said.append) == 2
    bad, slow, good = (read(tmp_path / f"gpu-{row.name}.json") for row in rows)
    assert bad["error"] == "exit code 3" and bad["printed"] == ["a word"]
    assert slow["error"].startswith("ended after") and slow["seconds"] < 30
    assert good["printed"] == ["fine"] and "error" not in good
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}

    said.clear()
    again = (*rows[:2], script("good", "raise SystemExit(9)"))
    assert campaign.campaign(again, tmp_path, 1.0, False, said.append) == 2
    assert "good: is there" in said and any(line.startswith("bad: exit code 3") for line in said)


def test_tests_that_are_all_skipped_are_no_result(tmp_path: Path) -> None:
    def row(name: str, last: str) -> Row:
        return Row(name, script=("-c", f"print({last!r})", "pytest"))

    rows = (row("skipped", "18 skipped in 3.2s"), row("some", "2 passed, 16 skipped in 3.2s"))
    assert campaign.campaign(rows, tmp_path, 1.0, False, lambda _: None) == 1
    skipped, some = (read(tmp_path / f"gpu-{row.name}.json") for row in rows)
    assert skipped["error"] == "no test passed" and "error" not in some
    assert campaign.campaign(rows[:1], tmp_path, 1.0, True, lambda _: None) == 0, "--small, without a GPU"


def test_a_row_ends_with_the_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            started.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(campaign.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        campaign.campaign((script("long", "import time; time.sleep(60)"),), tmp_path, 1.0, False, print)
    assert started[0].returncode == -signal.SIGKILL
    assert not (tmp_path / "gpu-long.json").exists()


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def interrupted(path: Path, text: str, **options: Any) -> int:
        write(path, text[:5], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    row = script("good", "print(1)")
    with pytest.raises(KeyboardInterrupt):
        campaign.campaign((row,), tmp_path, 1.0, False, print)
    monkeypatch.undo()
    said: list[str] = []
    assert campaign.campaign((row,), tmp_path, 1.0, False, said.append) == 0
    assert said[0].startswith("good: done")


@pytest.mark.parametrize(
    ("given", "text"),
    [(["--only", "gpu-tests"], "there is no CUDA device"), (["--small"], "--small needs --out")],
)
def test_numbers_of_a_cpu_are_no_results(
    given: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(campaign, "campaign", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["campaign.py", *given])
    with pytest.raises(SystemExit):
        campaign.main()
    assert text in capsys.readouterr().err


def test_nothing_starts_when_the_time_is_over(tmp_path: Path) -> None:
    said: list[str] = []
    assert campaign.campaign((script("late", "print(1)"),), tmp_path, 0.0, False, said.append) == 1
    assert said == ["late: no time left"] and not list(tmp_path.iterdir())


def test_time_is_kept_for_the_tests(tmp_path: Path) -> None:
    said: list[str] = []
    rows = (script("long", "print(1)"), script("tests", "print(2)", minutes=2.0, held=True))
    assert campaign.campaign(rows, tmp_path, 1.5, False, said.append) == 1
    assert said[0] == "long: no time left" and said[1].startswith("tests: done")


def test_the_most_important_row_comes_first_and_the_tests_last() -> None:
    assert (ROWS[0].shape, ROWS[0].frames) == ("llava-ov-7b", 32)
    assert ROWS[-1].script[:2] == ("-m", "pytest") and [row for row in ROWS if row.held] == [ROWS[-1]]
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if row.shape], ids=lambda row: row.name)
def test_rows_are_options_of_the_benchmark(row: Row) -> None:
    options = options_of(row, False, True)
    assert options.shape in SHAPES and options.layers is None
    small = options_of(row, True, False)
    assert small.layers == 3 and small.batch and small.mode is None
    assert small.schedule == options.schedule and small.names == options.names


def test_the_headline_row_ends_at_2048_tokens() -> None:
    schedule = campaign.to_2048()
    (merge,), (prune,) = schedule.merge, schedule.prune
    assert merge.keep is not None
    assert prune.count(round(8192 * merge.keep)) == 2048


def test_a_row_without_a_result_is_not_measured() -> None:
    lines = speed_table.lines_of([])
    assert sum("not measured" in line for line in lines) == sum(row.shape is not None for row in ROWS)
    result = {**speed_table.read()[0], "row": ROWS[0].name}
    assert sum("not measured" in line for line in speed_table.lines_of([result])) == len(
        [row for row in ROWS[1:] if row.shape]
    )


def test_a_result_behind_the_gate_says_so() -> None:
    result = {**speed_table.read()[0], "obstacles": ["it ran eagerly"], "realised": None}
    assert speed_table.lines_of([result])[-1].endswith("no speed-up is given: it ran eagerly")
