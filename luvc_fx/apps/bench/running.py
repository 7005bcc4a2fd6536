"""One arm on a model: hooks that note how long each of its graphs runs, and how long it took to compile."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import luvc_fx
from luvc_fx import _compat
from luvc_fx.apps.bench.alone import projector_rows
from luvc_fx.apps.bench.arms import Arm
from luvc_fx.apps.bench.timing import DECODE, PREFILL, VISION, Clock, Stages
from luvc_fx.dynamo.fingerprint import depends_on_us, fingerprint
from luvc_fx.generate.families import modalities
from luvc_fx.generate.frontdoor import put_on, take_off
from luvc_fx.report import Report


class Compiled:
    """One arm, compiled by `luvc_fx.compile`.

    Attributes:
        compile_s: seconds that Inductor took.
        first_s: seconds of the first run, in which everything is traced and compiled.
        projected: the size of what enters the projector; None until it was compiled.
        attention: the attention kernels that ATen ran in one prefill, by `watched`.
    """

    def __init__(self, model: Any, arm: Arm, inputs: Mapping[str, Tensor], mode: str | None) -> None:
        assert arm.schedule is not None
        self.model, self.arm, self.inputs, self.mode = model, arm, dict(inputs), mode
        self.stages = Stages(Clock(model.device))
        self.compile_s = self.first_s = 0.0
        self.projected: tuple[int, ...] | None = None
        self.attention: list[str] = []
        _compat.forget_shapes()
        luvc_fx.compile(model, arm.schedule, inner=self._inner, on_no_match="ignore")
        self.report: Report = luvc_fx.report_of(model)
        self.door = take_off(model)
        self.calls: dict[str, int] = {}

    def _inner(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        kind = self.report.graphs[-1].kind
        self.projected = self.projected or projector_rows(gm)
        key = fingerprint(self.arm.schedule) if self.arm.schedule and depends_on_us(gm.graph) else ""
        started = time.perf_counter()
        compiled = _compat.compile_inductor(gm, example_inputs, self.mode, None, key)
        self.compile_s += time.perf_counter() - started
        timed = self.stages.timed(kind, compiled)

        def call(*args: Any) -> Any:
            self.calls[kind] = self.calls.get(kind, 0) + 1
            return timed(*args)

        return call

    def generate(self, tokens: int) -> Any:
        """The output of `generate` for so many new tokens, with the logits and the cache."""
        assert self.door is not None
        put_on(self.model, self.door)
        try:
            self.stages.begin()
            return _generate(self.model, self.inputs, tokens)
        finally:
            take_off(self.model)

    def watched(self) -> Any:
        """The output of `generate` for one token, noting what computes its attention."""
        output, self.attention = attention_of(lambda: self.generate(1))
        return output


class Stock:
    """The model as it is, without a compiler."""

    def __init__(self, model: Any, arm: Arm, inputs: Mapping[str, Tensor]) -> None:
        self.model, self.arm, self.inputs = model, arm, dict(inputs)
        self.stages = Stages(Clock(model.device))
        self.report = Report()
        self.compile_s = self.first_s = 0.0
        self.attention: list[str] = []
        self.calls: dict[str, int] = {}

    def watched(self) -> Any:
        """As `Compiled.watched`."""
        output, self.attention = attention_of(lambda: self.generate(1))
        return output

    def generate(self, tokens: int) -> Any:
        """As `Compiled.generate`."""
        base = self.model.base_model
        hooked: list[tuple[Any, str]] = [(self.model, "forward")]
        hooked += [(base, kind.method) for kind in modalities(self.model)]
        for owner, name in hooked:
            wrapped = getattr(owner, name)
            vision = self.stages.timed(VISION, wrapped)
            setattr(
                owner,
                name,
                functools.wraps(wrapped)(self._forward(wrapped) if owner is self.model else vision),
            )
        self.forwards = 0
        try:
            self.stages.begin()
            return _generate(self.model, self.inputs, tokens)
        finally:
            for owner, name in hooked:
                delattr(owner, name)

    def _forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        prefill, decode = (self.stages.timed(stage, forward) for stage in (PREFILL, DECODE))

        def call(*args: Any, **kwargs: Any) -> Any:
            self.forwards += 1
            return (prefill if self.forwards == 1 else decode)(*args, **kwargs)

        return call


class Reference:
    """An arm's graphs without a compiler: their logits, and their FLOPs by torch's own counter."""

    def __init__(self, model: Any, arm: Arm, inputs: Mapping[str, Tensor]) -> None:
        assert arm.schedule is not None
        self.flops: dict[str, int] = {}
        _compat.forget_shapes()
        luvc_fx.compile(model, arm.schedule, inner=self._inner, on_no_match="ignore")
        self.report = luvc_fx.report_of(model)
        try:
            self.logits: Tensor = _generate(model, inputs, 1).logits[0]
        finally:
            luvc_fx.restore(model)

    def _inner(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        kind = self.report.graphs[-1].kind if hasattr(self, "report") else ""
        # The counter has no formula for the CPU's fused attention. A GPU would hold all scores in memory.
        cpu = not any(isinstance(x, Tensor) and x.is_cuda for x in example_inputs)

        def call(*args: Any) -> Any:
            counted = sdpa_kernel(SDPBackend.MATH) if cpu else contextlib.nullcontext()
            with FlopCounterMode(display=False) as counter, counted:
                result = gm.forward(*args)
            self.flops[kind] = self.flops.get(kind, 0) + counter.get_total_flops()
            return result

        return call


def attention_of(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What `call` returns, and which of ATen's attention kernels it ran; none if Inductor wrote its own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    names = {event.key for event in profile.key_averages()}
    return result, sorted(name.removeprefix("aten::") for name in names if _KERNEL.fullmatch(name))


_KERNEL = re.compile(r"aten::_scaled_dot_product_\w+")


@torch.no_grad()
def _generate(model: Any, inputs: Mapping[str, Tensor], tokens: int) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
