"""Run the kernels generated for the cases named on the command line, and compare with eager; prints JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from tests.inductor.lowering import interpret
from tests.inductor.lowering.cuda_graphs import inputs_of, on_the_host
from tests.inductor.lowering.fake_cuda import HOPPER, fake_cuda, generate
from tests.inductor.lowering.lowering_cases import ALL


def compared(got: Tensor, want: Tensor) -> dict[str, Any]:
    whole = not want.is_floating_point()
    return {
        "shape": list(got.shape),
        "wanted shape": list(want.shape),
        "whole numbers": whole,
        "wrong": int((got != want).sum()),
        "error": 0.0 if whole else float((got - want).abs().max() / want.abs().max()),
    }


def main(names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        case = ALL[name]
        whole, part = case.made()
        inputs = inputs_of(part, whole, case.captured)
        with fake_cuda(HOPPER):
            code = generate(part.gm, part.inputs)
            if os.environ.get("LUVC_SPOIL") == "1":
                code = code.replace(" <= ", " < ")
            with torch.no_grad():
                got = interpret.run(code, inputs)
                want = on_the_host(part)(*inputs)
        found[name] = [compared(a, b) for a, b in zip(got, want, strict=True)]
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
