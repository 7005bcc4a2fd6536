"""One arm on a model: hooks that note how long each of its graphs runs, and how long it took to compile."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import luvc_fx
from luvc_fx import _compat
from luvc_fx.bench.arms import Arm
from luvc_fx.bench.timing import DECODE, PREFILL, VISION, Clock, Stages
from luvc_fx.encoders import modalities
from luvc_fx.fingerprint import depends_on_us, fingerprint
from luvc_fx.frontdoor import put_on, take_off
from luvc_fx.report import Report


class Compiled:
    """An arm through the front door.

    Attributes:
        compile_s: seconds that Inductor took.
        first_s: seconds of the first run, in which everything is traced and compiled.
    """

    def __init__(self, model: Any, arm: Arm, inputs: Mapping[str, Tensor], mode: str | None) -> None:
        assert arm.schedule is not None
        self.model, self.arm, self.inputs, self.mode = model, arm, dict(inputs), mode
        self.stages = Stages(Clock(model.device))
        self.compile_s = self.first_s = 0.0
        _compat.forget_shapes()
        luvc_fx.compile(model, arm.schedule, inner=self._inner, on_no_match="ignore")
        self.report: Report = luvc_fx.report_of(model)
        self.door = take_off(model)
        self.calls: dict[str, int] = {}

    def _inner(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        kind = self.report.graphs[-1].kind
        key = fingerprint(self.arm.schedule) if self.arm.schedule and depends_on_us(gm.graph) else ""
        started = time.perf_counter()
        made = _compat.compile_inductor(gm, example_inputs, self.mode, None, key)
        self.compile_s += time.perf_counter() - started
        timed = self.stages.timed(kind, made)

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


class Stock:
    """The model as it is, without a compiler."""

    def __init__(self, model: Any, arm: Arm, inputs: Mapping[str, Tensor]) -> None:
        self.model, self.arm, self.inputs = model, arm, dict(inputs)
        self.stages = Stages(Clock(model.device))
        self.report = Report()
        self.compile_s = self.first_s = 0.0
        self.calls: dict[str, int] = {}

    def generate(self, tokens: int) -> Any:
        """As of `Compiled`."""
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
        self.seen = 0
        try:
            self.stages.begin()
            return _generate(self.model, self.inputs, tokens)
        finally:
            for owner, name in hooked:
                delattr(owner, name)

    def _forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        prefill, decode = (self.stages.timed(stage, forward) for stage in (PREFILL, DECODE))

        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            return (prefill if self.seen == 1 else decode)(*args, **kwargs)

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

        def call(*args: Any) -> Any:
            # The counter has no formula for the CPU's fused attention.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                result = gm.forward(*args)
            self.flops[kind] = self.flops.get(kind, 0) + counter.get_total_flops()
            return result

        return call


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
