"""What luvc_fx changes of this process's Dynamo it changes when it is called, and not when it is imported."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
import torch

import luvc_fx
from tests.support.replay import toy, toy_inputs

STATE = """
import importlib, json, logging, sys
import torch, torch._dynamo
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

handlers = TorchInGraphFunctionVariable._get_handlers()
# Dynamo of 2.13 has a handler for this check; without it, it looks as 2.11 does to whoever would add one.
handlers.pop(torch._check_tensor_all, None)
log = logging.getLogger("torch._dynamo.convert_frame")


def state():
    return (
        {key: repr(getattr(torch._dynamo.config, key)) for key in torch._dynamo.config.get_config_copy()},
        dict(handlers),
        list(log.handlers),
        torch.compile,
    )


def changes(before):
    config, known, watching, compile_ = before
    found = [key for key, setting in state()[0].items() if setting != config[key]]
    found += ["handlers"] * (state()[1] != known) + ["log"] * (state()[2] != watching)
    return found + ["torch.compile"] * (state()[3] is not compile_)


before = state()
"""

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(luvc_fx.__path__, "luvc_fx.")
    if not module.name.endswith("__main__")
)


def changes(program: str, *args: str) -> Any:
    """What a fresh process prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", STATE + program, *args], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_every_module_changes_nothing() -> None:
    assert {"luvc_fx.dynamo.by_name", "luvc_fx.passes.retarget", "luvc_fx.generate.graphs"} <= {*MODULES}
    program = """
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(changes(before)))
"""
    assert changes(program, json.dumps(MODULES)) == []


SETTINGS = ["capture_scalar_outputs", "handlers", "log", "recompile_limit"]
CALLS = {
    "backend": ("import luvc_fx; luvc_fx.backend()", SETTINGS),
    "backend twice": ("import luvc_fx; luvc_fx.backend(); luvc_fx.backend()", SETTINGS),
    "backend that leaves settings alone": (
        "import luvc_fx; luvc_fx.backend(capture_scalars=False, recompile_limit=None)",
        ["handlers", "log"],
    ),
    "a backend that is refused": (
        "import contextlib, luvc_fx\nwith contextlib.suppress(ValueError): luvc_fx.backend(inner='none')",
        [],
    ),
    "the name is looked up": ("torch.compile(torch.relu, backend='luvc_fx')", SETTINGS),
}


@pytest.mark.parametrize("how", CALLS)
def test_calls_change_what_they_say(how: str) -> None:
    call, expected = CALLS[how]
    assert sorted(changes(f"{call}\nprint(json.dumps(changes(before)))")) == expected


def test_by_name_the_first_graph_of_a_process_is_whole() -> None:
    """Settings that came with the first captured graph would come too late for it."""
    program = """
from tests.support.models import inputs, tiny_llava
import transformers
model = tiny_llava(decoder_layers=2, encoder_layers=2, grid=4)
batch = inputs(model)
with torch.no_grad():
    model(**batch)  # so that transformers has its hooks
assert not torch._dynamo.config.capture_scalar_outputs
import luvc_fx
report = luvc_fx.Report()
schedule = luvc_fx.Schedule(merge=luvc_fx.Merge("width", keep=0.5, layer=0))
compiled = torch.compile(
    model,
    backend="luvc_fx",
    options={"luvc.inner": "eager", "luvc.schedule": schedule, "luvc.report": report, "luvc.strict": True},
)
with torch.no_grad():
    compiled(**batch)
print(json.dumps([graph.kind for graph in report.graphs]))
"""
    assert changes(program) == ["whole"]


# ----------------------------------------------------------------------------------------- the name


def test_only_torch_compile_reading_the_name_counts() -> None:
    model = toy()
    model.generate = lambda: None
    backend = luvc_fx.backend("image", inner="eager", on_no_match="ignore")
    plain = model.generate
    read: list[str] = []

    def within(gm: Any, example_inputs: Any) -> Any:
        read.append(backend.__name__)
        return gm.forward

    assert backend.__name__ == "luvc_fx"
    torch.compile(model, backend=within)(**toy_inputs())
    assert read == ["luvc_fx"]
    assert model.generate is plain
