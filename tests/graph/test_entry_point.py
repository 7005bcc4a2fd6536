"""``torch.compile(model, backend="luvc_fx", options={...})``: the backend by its name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import luvc_fx
from luvc_fx import LuvcWarning, Report, _compat
from luvc_fx.dynamo.by_name import from_options
from luvc_fx.report import Insertion
from luvc_fx.schedule import Prune, Schedule
from tests.support.replay import Recorder, toy, toy_inputs

HALF = Schedule(prune=Prune(tokens=8, layer=1))


@pytest.fixture(autouse=True)
def capturing() -> None:
    """What the look-up of the name in a process switches on; `fresh` takes it back after a test."""
    _compat.enable_scalar_capture()


def run(mode: str | None = None, **options: Any) -> Tensor:
    given = {"luvc.inner": "eager", **{key.replace("__", "."): value for key, value in options.items()}}
    with torch.no_grad():
        return torch.compile(toy(), backend="luvc_fx", options=given, mode=mode)(**toy_inputs())


def test_torch_lists_it_and_looks_it_up_only_when_asked() -> None:
    program = (
        "import sys, torch, torch._dynamo; assert 'luvc_fx' in torch._dynamo.list_backends(); "
        "assert 'luvc_fx.dynamo.by_name' not in sys.modules; "
        "assert not torch._dynamo.config.capture_scalar_outputs; "
        "import luvc_fx.dynamo.by_name; assert not torch._dynamo.config.capture_scalar_outputs; "
        "torch.compile(torch.relu, backend='luvc_fx'); assert torch._dynamo.config.capture_scalar_outputs"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("spelling", ["object", "JSON"])
def test_it_does_what_the_object_does(spelling: str) -> None:
    report = Report()
    schedule = HALF if spelling == "object" else "\n " + HALF.to_json()
    got = run(luvc__schedule=schedule, luvc__report=report, luvc__strict=True)
    backend = luvc_fx.backend(HALF, inner="eager", strict=True)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(toy(), backend=backend)(**toy_inputs()), got)
    (mine,), (theirs,) = report.graphs, backend.report.graphs
    assert mine.inserted == theirs.inserted == [Insertion("prune", 1, "spectrum", 16, 8)]


def test_the_name_of_a_preset_and_the_default() -> None:
    assert from_options(None, {"luvc.schedule": "video"}).schedule == Schedule.preset("video")
    assert from_options(None, None) == luvc_fx.backend()


def test_every_other_option_is_inductors() -> None:
    made = from_options(None, {"luvc.schedule": HALF, "max_autotune": True, "triton.cudagraphs": False})
    assert made == luvc_fx.backend(HALF, options={"max_autotune": True, "triton.cudagraphs": False})
    assert from_options("max-autotune", {"luvc.schedule": HALF}) == luvc_fx.backend(HALF, mode="max-autotune")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"luvc.shedule": HALF}, r"unknown options \['luvc.shedule'\]; allowed: luvc.schedule, luvc.inner"),
        ({"luvc.schedule": "photo"}, r"preset is 'photo'; allowed"),
        ({"luvc.schedule": "{"}, r"a schedule must be JSON"),
        ({"luvc.inner": "triton"}, r"inner is 'triton'; allowed"),
        ({"luvc.on_no_match": "log"}, r"on_no_match is 'log'; allowed"),
        ({"luvc.report": "report.json"}, r"luvc.report is 'report.json'; allowed: a luvc_fx.Report"),
        ({"epilogue_fusing": True}, r"'epilogue_fusing' is no option of Inductor; did you mean epilogue"),
        ({"luvc.inner": "eager", "max_autotune": True}, r"mode and options are Inductor's; inner is 'eager'"),
    ],
)
def test_what_is_not_allowed_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_options(None, options)


def test_an_unknown_option_comes_out_of_the_compiled_call() -> None:
    with pytest.raises(Exception, match=r"ValueError: unknown options \['luvc.keep'\]"):
        run(luvc__schedule=HALF, luvc__keep=0.5)


def test_on_no_match_and_strict_arrive() -> None:
    impossible = Schedule(prune=Prune(tokens=99, layer=1))
    with pytest.warns(LuvcWarning, match="schedule: Prune.tokens is 99"):
        run(luvc__schedule=impossible)
    for how in ({"luvc__strict": True}, {"luvc__on_no_match": "raise"}):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="NotRewritten"):
            run(luvc__schedule=impossible, **how)


def test_equal_options_do_not_recompile_and_others_do() -> None:
    inner = Recorder()

    def graphs_after(schedule: Schedule | str, report: Report) -> int:
        run(luvc__schedule=schedule, luvc__inner=inner, luvc__report=report)
        return len(inner.graphs)

    report = Report()
    assert graphs_after(HALF, report) == 1
    assert graphs_after(Schedule(prune=(Prune(tokens=8, layer=1),)), report) == 1
    assert graphs_after(Schedule(), report) == 2
    assert len(report.graphs) == 2
    other = Report()
    assert graphs_after(HALF, other) == 3, "its own report is filled by its own compilation"
    assert len(other.graphs) == 1


@pytest.mark.slow
@torch.no_grad()
def test_inductor_by_name_with_options_of_its_own() -> None:
    seen = []

    def note(graph: torch.fx.Graph) -> None:
        seen.append(torch._inductor.config.epilogue_fusion)

    report = Report()
    options = {
        "luvc.schedule": HALF,
        "luvc.report": report,
        "epilogue_fusion": False,
        "post_grad_custom_pre_pass": note,
    }
    got = torch.compile(toy(), backend="luvc_fx", options=options)(**toy_inputs())
    assert report.graphs[0].rewritten
    assert seen == [False]
    torch._dynamo.reset()
    want = run(luvc__schedule=HALF)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
