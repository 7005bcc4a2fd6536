"""Compiler caches on disk, as a second process finds them: hit when nothing changed, miss when we did."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import _compat
from luvc_fx.dynamo.fingerprint import depends_on_us, fingerprint
from luvc_fx.graph import markers
from luvc_fx.schedule import Merge, Prune, Schedule
from luvc_fx.selectors import selector_fingerprint
from tests.support.paths import ROOT
from tests.support.replay import assert_close, toy, toy_inputs, toy_whole

PRUNE = Schedule(prune=Prune(tokens=8, layer=1))
OTHER = Schedule(prune=Prune(tokens=8, layer=2))

PROGRAM = """
import json, sys
import torch
from tests.support.replay import toy, toy_inputs
import luvc_fx

asked = json.loads(sys.argv[1])
assert luvc_fx.__file__.startswith(asked["root"]), luvc_fx.__file__
torch._dynamo.config.capture_scalar_outputs = True
backend = "inductor"
if asked["schedule"] is not None:
    backend = luvc_fx.backend(luvc_fx.Schedule.from_json(asked["schedule"]), strict=True)
with torch.no_grad():
    out = torch.compile(toy(), backend=backend)(**toy_inputs())
counters = torch._dynamo.utils.counters
found = {
    "aot": {k: v for k, v in counters["aot_autograd"].items() if "autograd_cache" in k},
    "fx": {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache")},
    "shape": list(out.shape), "sum": float(out.double().sum()),
}
print(json.dumps(found))
"""

HIT = {"aot": {"autograd_cache_hit": 1}, "fx": {"fxgraph_cache_hit": 1}}
MISS = {
    "aot": {"autograd_cache_miss": 1, "autograd_cache_saved": 1},
    "fx": {"fxgraph_cache_miss": 1},
}


def compiled(schedule: Schedule | None, folder: Path, root: Path = ROOT) -> dict[str, Any]:
    """What a process of its own counts, with its caches in `folder` and the package in `root`."""
    asked = {"schedule": schedule and schedule.to_json(), "root": str(root)}
    path = os.pathsep.join([str(root), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def outcome(found: dict[str, Any]) -> dict[str, Any]:
    """The counters alone."""
    return {
        "aot": found["aot"],
        "fx": {k: v for k, v in found["fx"].items() if k in ("fxgraph_cache_hit", "fxgraph_cache_miss")},
    }


def copy_of_the_package(folder: Path) -> Path:
    """A source tree that can be edited, laid out as an installed one."""
    ignore = shutil.ignore_patterns("__pycache__", "demo_model")
    shutil.copytree(ROOT / "luvc_fx", folder / "luvc_fx", ignore=ignore)
    return folder


def edit(package: Path, name: str) -> None:
    """Change one file of the package, not what it does."""
    with (package / "luvc_fx" / name).open("a") as file:
        file.write("# edited\n")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_second_process_hits_and_an_edit_or_another_schedule_misses(tmp_path: Path) -> None:
    caches, package = tmp_path / "caches", copy_of_the_package(tmp_path / "package")
    caches.mkdir()
    first = compiled(PRUNE, caches, package)
    assert outcome(first) == MISS
    edit(package, "apps/demo.py")  # which shapes no graph
    second = compiled(PRUNE, caches, package)
    assert outcome(second) == HIT
    assert second["sum"] == first["sum"]
    assert outcome(compiled(OTHER, caches, package)) == MISS
    edit(package, "ops/spu.py")
    edited = compiled(PRUNE, caches, package)
    assert outcome(edited) == MISS
    assert edited["sum"] == first["sum"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_graph_that_is_left_alone_shares_the_caches_of_inductor_alone(tmp_path: Path) -> None:
    alone = compiled(None, tmp_path)
    assert outcome(alone) == MISS
    ours = compiled(Schedule(), tmp_path)
    assert outcome(ours) == HIT
    assert ours["sum"] == alone["sum"]


def test_a_fingerprint_is_of_the_schedule() -> None:
    assert fingerprint(PRUNE) == fingerprint(Schedule(prune=(Prune(tokens=8, layer=1),)))
    merged = Schedule(merge=Merge("width", length=2, layer=0), prune=PRUNE.prune)
    assert len({fingerprint(schedule) for schedule in (PRUNE, OTHER, merged, Schedule())}) == 4


def test_a_fingerprint_is_of_every_file_that_shapes_a_graph(tmp_path: Path) -> None:
    """Of op, pass and marker files alike; not of what calls, measures or prints."""
    package = copy_of_the_package(tmp_path)
    program = (
        "from luvc_fx import Schedule; from luvc_fx.dynamo.fingerprint import fingerprint; "
        "print(fingerprint(Schedule()))"
    )

    def now() -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=package, capture_output=True, text=True, check=True).stdout

    seen = {now()}
    assert now() in seen
    for name in ("graph/emit.py", "passes/support/retarget.py", "plan.py"):
        edit(package, name)
        assert now() not in seen
        seen.add(now())
    for name in ("apps/demo.py", "cli/main.py", "generate/sizes/warming.py"):
        edit(package, name)
    assert now() in seen


def test_a_fingerprint_is_of_the_source_of_a_foreign_selector() -> None:
    names = ("fingerprint, first", "fingerprint, second")
    luvc_fx.register_selector(names[0], lambda x, prune, count, site: x.float().square().sum(-1))
    luvc_fx.register_selector(
        names[1],
        lambda x, prune, count, site: x.float().abs().sum(-1),
    )
    assert selector_fingerprint(names[0]) != selector_fingerprint(names[1])
    assert selector_fingerprint(names[0]) == selector_fingerprint(names[0])
    keys = {fingerprint(Schedule(prune=Prune(keep=0.5, layer=1, selector=name))) for name in names}
    assert len(keys) == 2
    assert fingerprint(Schedule()) == fingerprint(Schedule())


@pytest.mark.parametrize("body", ["square", "abs"])
def test_a_selector_made_in_memory_counts_by_its_code(body: str) -> None:
    """As in a notebook or an exec: no source file, and still another key for other code."""
    found: dict[str, Any] = {}
    exec(f"def select(x, prune, count, site):\n    return x.float().{body}().sum(-1)", found)
    luvc_fx.register_selector(f"in memory, {body}", found["select"])
    keys = {selector_fingerprint(name) for name in (f"in memory, {body}", "norm", "spectrum")}
    assert len(keys) == 3
    other = "abs" if body == "square" else "square"
    again: dict[str, Any] = {}
    exec(f"def select(x, prune, count, site):\n    return x.float().{other}().sum(-1)", again)
    name = f"in memory, not {body}"
    luvc_fx.register_selector(name, again["select"])
    assert selector_fingerprint(name) not in keys


def keys_given_to_inductor(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    keys = []

    def spy(gm: Any, example_inputs: Any, mode: Any, options: Any, cache_key: str) -> Any:
        keys.append(cache_key)
        return gm.forward

    monkeypatch.setattr(_compat, "compile_inductor", spy)
    return keys


def test_only_a_graph_with_code_of_ours_has_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_given_to_inductor(monkeypatch)
    captured = toy_whole()
    for schedule in (PRUNE, Schedule(), Schedule(prune=Prune(keep=1.0, layer=1))):
        luvc_fx.backend(schedule, strict=True)(captured.copy(), list(captured.example_inputs))
    refused = luvc_fx.backend(Schedule(prune=Prune(tokens=99, layer=1)), on_no_match="ignore")
    refused(captured.copy(), list(captured.example_inputs))
    assert keys == [fingerprint(PRUNE), "", "", ""]


def test_our_own_operators_count_as_code_of_ours() -> None:
    """The front door puts them where an empty schedule inserts nothing."""
    gm = torch.fx.symbolic_trace(lambda x: markers.PROMPT_ROWS(x) + 1)
    assert depends_on_us(gm.graph)
    assert not depends_on_us(torch.fx.symbolic_trace(lambda x: torch.relu(x) + 1).graph)


class _Pass(torch._inductor.custom_graph_pass.CustomGraphPass):
    """A user's own pass: counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str:
        return "a user's pass"


@pytest.mark.slow
@torch.no_grad()
def test_a_custom_pass_and_a_tag_of_the_user_stay() -> None:
    mine, tags = _Pass(), set()
    backend = luvc_fx.backend(PRUNE, strict=True, options={"post_grad_custom_post_pass": mine})
    module = importlib.import_module("torch._inductor.compile_fx")
    original = module.compile_fx

    def spy(*args: Any, **kwargs: Any) -> Any:
        tags.add(torch.compiler.config.cache_key_tag)
        return original(*args, **kwargs)

    settings = {"force_disable_caches": True, "cache_key_tag": "theirs "}
    with torch.compiler.config.patch(settings), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_fx", spy)
        torch.compile(toy(), backend=backend)(**toy_inputs())
        assert torch.compiler.config.cache_key_tag == "theirs "
    assert backend.report.graphs[0].rewritten
    assert mine.calls == 1
    assert tags == {f"theirs luvc_fx:{fingerprint(PRUNE)}"}


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="what Inductor returns in 2.11 cannot be serialised"
)
@torch.no_grad()
def test_the_result_can_be_saved_and_loaded(tmp_path: Path) -> None:
    """Only what Inductor returned, as it is, can be serialised."""
    model, batch = toy(), toy_inputs()
    backend = luvc_fx.backend(PRUNE, strict=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    saved = compiled.forward.aot_compile(((batch["ids"], batch["pixels"]), {}))
    saved.save_compiled_function(str(tmp_path / "saved"))
    assert backend.report.graphs[0].rewritten
    torch._dynamo.reset()
    with open(tmp_path / "saved", "rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    got = loaded(model, batch["ids"], batch["pixels"])
    eager = torch.compile(model, backend=luvc_fx.backend(PRUNE, inner="eager", strict=True))(**batch)
    assert_close(got, eager, 1e-5, "logits of the loaded function")
