"""Commands print the JSON that they printed before the package was divided into rooms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from luvc_fx.cli.main import main
from tests.support import golden

# The dear ones run the shipped model with all its layers more than once, or compile with Inductor.
DEAR = {"demo", "demo-options", "inspect-video", "inspect-document", "bench"}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="recorded on a CPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    golden.prepare(folder)
    return folder


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in DEAR else ()) for case in golden.CASES]
)
def test_the_json_is_as_before(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    capfd.readouterr()
    assert main([*golden.CASES[case], "--json"]) == 0
    golden.check(case, json.loads(capfd.readouterr().out))


@pytest.mark.parametrize("case", golden.CASES)
def test_another_number_or_a_lost_key_is_seen(case: str) -> None:
    printed = json.loads((golden.GOLDEN / f"{case}.json").read_text(encoding="utf-8"))
    golden.check(case, {**printed, "new": 1})
    first = next(iter(printed))
    for wrong in ({**printed, first: "another"}, {key: printed[key] for key in printed if key != first}):
        with pytest.raises(AssertionError):
            golden.check(case, wrong)
