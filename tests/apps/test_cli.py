"""The `luvc-fx` command: one JSON object, or one line on stderr and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import luvc_fx
from luvc_fx.apps import demo
from luvc_fx.cli.main import main as cli
from luvc_fx.schedule import Prune, Schedule

ARM = {"answer", "prefill_ms", "prefill_spread_ms", "tokens_per_layer", "kv_lengths", "compile_s"}


def _demo(*arguments: str) -> dict[str, Any]:
    """Run `luvc-fx demo --json` in a process of its own; everything on stdout must be the object."""
    command = [sys.executable, "-m", "luvc_fx.cli.main", "demo", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def _check_image_preset(result: dict[str, Any]) -> None:
    schedule = Schedule.preset("image")
    for arm in ("baseline", "luvc"):
        assert set(result[arm]) == ARM
        assert result[arm]["answer"]
        assert result[arm]["prefill_ms"] > 0
    layers, visual = len(result["baseline"]["tokens_per_layer"]), result["visual_tokens"]
    assert layers >= 16
    assert result["baseline"]["tokens_per_layer"] == [visual] * layers
    tokens = result["luvc"]["tokens_per_layer"]
    assert tokens[-1] == 0
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) == len(schedule.prune) + 1
    text = {k - t for arm in ("baseline", "luvc") for k, t in _pairs(result[arm])}
    assert len(text) == 1
    assert result["budget"] == pytest.approx(sum(tokens) / (layers * visual))
    assert result["budget"] <= 0.5
    assert Schedule.from_json(json.dumps(result["schedule"])) == schedule
    assert result["no_speedup_because"] == []
    assert "picture" not in result
    expected = result["baseline"]["prefill_ms"] / result["luvc"]["prefill_ms"]
    assert result["prefill_speedup"] == pytest.approx(expected)
    assert {graph["kind"] for graph in result["report"]["graphs"]} >= {"vision", "prefill"}
    assert set(result["versions"]) == {"python", "luvc-fx", "torch", "transformers"}
    assert set(result["hardware"]) == {"device", "dtype", "threads", "platform"}


def _pairs(arm: dict[str, Any]) -> list[tuple[int, int]]:
    return list(zip(arm["kv_lengths"], arm["tokens_per_layer"], strict=True))


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_demo_with_an_image_of_ones_own(tmp_path: Path) -> None:
    image = tmp_path / "my image.png"
    image.write_bytes((demo.MODEL_DIR / "objects.png").read_bytes())
    arguments = ("--image", str(image), "--question", "how many objects are there ?")
    result = _demo("--inner", "eager", "--runs", "2", *arguments)
    _check_image_preset(result)
    assert (result["image"], result["question"], result["expected"]) == (str(image), arguments[3], None)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_demo_with_inductor() -> None:
    result = _demo("--runs", "3")
    _check_image_preset(result)
    assert result["inner"] == "inductor"
    assert result["expected"]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_an_empty_schedule_gets_no_speedup(tmp_path: Path) -> None:
    file = tmp_path / "nothing.json"
    file.write_text(Schedule().to_json())
    result = _demo("--inner", "eager", "--runs", "1", "--schedule", str(file))
    assert result["prefill_speedup"] is None
    assert result["no_speedup_because"] == ["the schedule does nothing"]
    assert result["luvc"]["tokens_per_layer"] == result["baseline"]["tokens_per_layer"]
    assert result["luvc"]["answer"] == result["baseline"]["answer"]


def _refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    assert cli(list(arguments)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("...")]
    assert len(lines) == 1
    assert lines[0].startswith("luvc-fx: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("dmo",), "dmo"),
        (("demo", "--imgae", "x.png"), "--imgae"),
        (("demo", "--runs", "0"), "runs"),
        (
            ("demo", "--runs", "1" + "0" * 20),
            "10000",
        ),
        (("demo", "--image", "x" * 5000), "File name too long"),
        (("inspect", "x" * 5000), "does not exist"),
        (("bench", "--threads", "1" + "0" * 20), "--threads"),
        (("bench", "--batch", "9" * 30), "--batch is '9"),
        (("bench", "--plot", "nowhere/x.png"), "a file in a folder that exists"),
        (("bench", "--plot", "x.xyz"), "--plot is 'x.xyz'; allowed: an ending of"),
        (("demo", "--schedule", "x\0y"), "neither a preset"),
        (("demo", "--image", "a\nb.png"), "image 'a b.png' cannot be read"),
        (("demo", "--inner", "onnx"), "onnx"),
        (("demo", "--question", "  "), "the question is empty"),
        (("demo", "--question", "<image> or <image> ?"), "<image>"),
        (("demo", "--schedule", "imgae"), "image, video, document"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_arguments(capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str) -> None:
    assert says in _refused(capfd, *arguments)


def test_wrong_image_files(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "No such file" in _refused(capfd, "demo", "--image", str(tmp_path / "none.png"))
    assert "directory" in _refused(capfd, "demo", "--image", str(tmp_path))
    text = tmp_path / "text.png"
    text.write_text("not an image")
    assert "format" in _refused(capfd, "demo", "--image", str(text))
    cut = tmp_path / "cut.png"
    cut.write_bytes((demo.MODEL_DIR / "objects.png").read_bytes()[:3000])
    assert "cut.png" in _refused(capfd, "demo", "--image", str(cut))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "must be JSON"),
        ("[1, 2]", "an object"),
        ('{"version": 99}', "version"),
        ('{"version": 1, "prunes": []}', "prunes"),
        ('{"version": 1, "prune": [{"keep": 2.0, "layer": 1}]}', "Prune.keep"),
        ('{"version": 1, "prune": [{"keep": 0.5, "layer": 1, "selector": "best"}]}', "selector"),
    ],
)
def test_wrong_schedule_files(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "schedule.json"
    file.write_text(text)
    line = _refused(capfd, "demo", "--schedule", str(file))
    assert says in line
    assert str(file) in line


def test_a_binary_schedule_file(capfd: pytest.CaptureFixture[str]) -> None:
    file = demo.MODEL_DIR / "objects.png"
    assert "text file" in _refused(capfd, "demo", "--schedule", str(file))


@pytest.mark.slow
def test_a_schedule_that_the_model_cannot_follow(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    eager = ("demo", "--inner", "eager", "--schedule")
    for prune in (Prune(keep=0.5, layer=99), Prune(tokens=100_000, layer=2)):
        file.write_text(Schedule(prune=(prune,)).to_json())
        assert "does not fit the model" in _refused(capfd, *eager, str(file))


def test_no_speedup_over_a_graph_that_was_refused() -> None:
    arm = demo.Arm("", 1.0, 0.0, [256] * 4, [263] * 4, 1.0)
    schedule = Schedule(prune=(Prune(keep=0.5, layer=2),))
    plain, report = luvc_fx.Report(), luvc_fx.Report()
    for each in (plain, report):
        each.graphs.append(
            luvc_fx.report.GraphReport(kind="prefill", tokens_per_layer=[256] * 4, original=256)
        )
    report.refuse(luvc_fx.Refusal(luvc_fx.Reason.CACHE, "some cache"))
    found = demo.why_no_speedup(schedule, plain, arm, report, arm, 256)
    assert found == ["cache: some cache", "no graph was rewritten to prune"]


def test_words_that_the_model_does_not_know_are_named() -> None:
    _, processor = demo.load_model()
    assert demo.unknown_words(processor, "Where is the zebra, or the red ring?") == ["zebra,", "or"]


def test_a_missing_extra_is_named(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "luvc_fx.cli.commands", raising=False)
    assert "pip install 'luvc-fx[cli]'" in _refused(capfd, "demo")
