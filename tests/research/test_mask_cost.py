"""The figures of the mask are written only if asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples.research.benchmarks import mask


def test_the_committed_figures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = mask.torch.get_num_threads()
    monkeypatch.setattr(mask, "RESULTS", tmp_path)
    monkeypatch.setattr(mask, "ROWS", 24)
    monkeypatch.setattr(mask, "LEFT", 8)
    try:
        monkeypatch.setattr(sys, "argv", ["mask.py"])
        mask.main()
        printed = json.loads(capsys.readouterr().out)
        assert set(printed["layer"]) == {"24", "8"} and not list(tmp_path.iterdir())
        monkeypatch.setattr(sys, "argv", ["mask.py", "--write"])
        mask.main()
        assert (tmp_path / "mask.json").exists()
    finally:
        mask.torch.set_num_threads(threads)
