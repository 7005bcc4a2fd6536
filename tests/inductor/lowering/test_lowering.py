"""What the passes insert becomes Triton kernels and, but for matrix products asked for, nothing else.

Kernels of sites, of a whole rewritten decoder layer and of an encoder block are generated for sm_80 and
sm_90, counted, compiled to cubins, and run by Triton's interpreter against the same graph in eager mode.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from luvc_fx import selectors
from luvc_fx.ops import lowpass
from luvc_fx.schedule import Schedule
from tests.inductor.lowering.fake_cuda import (
    AMPERE,
    HOPPER,
    compile_kernels,
    disassemble,
    externs,
    fake_cuda,
    generate,
    launches,
)
from tests.inductor.lowering.lowering_cases import ALL, PARTS, SITES, Case, prune, spu
from tests.support.cases import slow_unless
from tests.support.paths import ROOT

pytest.importorskip("triton", reason="triton is installed on Linux only")

TARGETS = {AMPERE: "sm_80", HOPPER: "sm_90a"}
LOWERED = (
    *("SPU, runs", "SPU, runs, with a mask", "SPU, global", "OIM, width", "OIM, width, behind a CLS row"),
    *("decoder layer", "encoder block"),
)
"""Cases of the default run: each operation, in the ways that the presets insert it."""
LIBRARY = re.compile(r"topk|sort|fft|scatter")


def code_of(case: Case) -> str:
    _, part = case.made()
    return generate(part.gm, part.inputs)


@pytest.mark.parametrize(
    "capability", [pytest.param(AMPERE, marks=pytest.mark.slow), HOPPER], ids=["sm_80", "sm_90"]
)
@pytest.mark.parametrize("name", slow_unless(ALL, LOWERED))
def test_launches_and_externs(name: str, capability: tuple[int, int]) -> None:
    case = ALL[name]
    with fake_cuda(capability):
        code = code_of(case)
    assert tuple(externs(code)) == case.externs
    assert len(launches(code)) == case.launches, "\n".join(launches(code))


def test_the_default_sites_are_within_the_goal() -> None:
    for name in ("SPU, runs", "SPU, squares", "OIM, width", "OIM, height"):
        assert SITES[name].launches <= 6 and SITES[name].externs == ()


@pytest.mark.parametrize("capability", TARGETS, ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "name", slow_unless(["SPU, runs", "SPU, global", "OIM, width"], ["SPU, runs", "OIM, width"])
)
def test_kernels_compile_to_cubins(name: str, capability: tuple[int, int]) -> None:
    with fake_cuda(capability):
        code = code_of(ALL[name])
        kernels = compile_kernels(code)
    assert set(kernels) == set(launches(code))
    for kernel in kernels.values():
        assert f".target {TARGETS[capability]}" in kernel.asm["ptx"]
        machine = disassemble(kernel.asm["cubin"])
        assert "EXIT" in machine and re.search(r"\bSTG", machine), "a kernel that stores nothing"


def test_the_filter_of_a_long_sequence_compiles() -> None:
    """Inductor counts in 32 bits: numbers that grow with the cube of the tokens were too large for it."""
    with fake_cuda(HOPPER):
        with FakeTensorMode():
            x = torch.empty(1, 16384, 64, device="cuda")
            gm = make_fx(lambda x: lowpass(x, 0.5, "fir"))(x)
        code = generate(gm, [x])
        assert set(compile_kernels(code)) == set(launches(code)) and not externs(code)


# ------------------------------------------------------------------------------------------- controls


@pytest.fixture
def by_topk() -> Iterator[None]:
    """A selector as one would write it first."""

    def select(x: torch.Tensor, prune: Any, count: int, site: Any) -> torch.Tensor:
        return x.float().square().sum(-1).topk(count).indices

    selectors.register("topk", select)
    yield
    selectors.unregister("topk")


def test_a_topk_is_seen(by_topk: None) -> None:
    with fake_cuda(HOPPER):
        found = externs(code_of(Case(Schedule(prune=prune(selector="topk").prune), spu, 0)))
    assert "aten.topk.default" in found


def test_a_fourier_transform_is_seen() -> None:
    with fake_cuda(HOPPER):
        found = externs(code_of(Case(prune(realization="fft"), spu, 0)))
    assert {"aten._fft_r2c.default", "aten._fft_c2r.default"} <= set(found)


def test_nothing_of_a_library_in_any_case() -> None:
    assert not [name for case in ALL.values() for name in case.externs if LIBRARY.search(name)]
    assert LIBRARY.search("aten.topk.default") and LIBRARY.search("aten._fft_r2c.default")


def test_a_kernel_that_does_not_compile_is_seen() -> None:
    with fake_cuda(HOPPER):
        broken = code_of(SITES["SPU, none left"]).replace("tl.store(", "tl.no_such_store(", 1)
        with pytest.raises(Exception, match="no_such_store"):
            compile_kernels(broken)


# ---------------------------------------------------------------------------------------- interpreted


def interpreted(*names: str, spoil: bool = False) -> dict[str, Any]:
    """What `interpret_cases.py` finds, in a process of its own: a process interprets all kernels or none."""
    script = Path(__file__).with_name("interpret_cases.py")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(ROOT),
        "LUVC_SPOIL": str(int(spoil)),
    }
    done = subprocess.run([sys.executable, script, *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_generated_kernels_give_what_eager_gives() -> None:
    found = interpreted(*SITES, *PARTS)
    assert set(found) == set(ALL)
    for name, outputs in found.items():
        assert outputs, name
        for output in outputs:
            assert output["shape"] == output["wanted shape"], f"{name}: {output}"
            if output["whole numbers"]:
                assert output["wrong"] == 0, f"{name}: {output}"
            else:
                assert output["error"] <= 2e-5, f"{name}: {output}"


@pytest.mark.slow
def test_a_wrong_kernel_is_seen() -> None:
    (outputs,) = interpreted("SPU, runs", spoil=True).values()
    assert any(output["wrong"] for output in outputs)
