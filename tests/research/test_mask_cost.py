"""The figures of the mask: written only if asked for, and the README's."""

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


def test_the_readme_says_them() -> None:
    found = json.loads((mask.RESULTS / "mask.json").read_text(encoding="utf-8"))
    text = (Path(mask.__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    _, _, text = text.partition("The mask by itself")
    text = " ".join(text[:900].split())
    whole, left = (found["layer"][str(rows)] for rows in (mask.ROWS, mask.LEFT))
    assert f"takes {whole['prefill_causal_ms']:.0f} ms instead of {whole['prefill_masked_ms']:.0f}" in text
    assert f"takes {left['step_plain_ms']:.3f} ms instead of {left['step_masked_ms']:.3f}" in text
    assert f"({whole['step_plain_ms']:.2f} instead of {whole['step_masked_ms']:.2f} over all 1,549)" in text
    assert f"in {found['mask']['made_anew_ms']:.2f} ms, where cutting it out took" in text
