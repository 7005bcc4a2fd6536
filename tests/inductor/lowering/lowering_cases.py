"""What goes through Inductor's CUDA code generation: sites, a layer and a block, as the passes write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from luvc_fx.anatomy.recognise import recognise
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.inductor.lowering.cuda_graphs import OnCuda, between, rewritten, site
from tests.support.replay import Captured, capture, llava, prompt, toy, toy_inputs


@cache
def llava_graph(masked: bool = False) -> Captured:
    """A LLaVA (CLIP with its CLS row, 8 x 8 patches) as one graph; `masked`: with an attention mask."""
    given = dict(prompt())
    if not masked:
        del given["attention_mask"]
    return capture(llava(), False, **given)


@cache
def toy_graph() -> Captured:
    """The toy model on 12 x 12 patches. (Of lines up to 8 long Inductor unrolls the reductions.)"""
    return capture(toy(), False, **toy_inputs(rows=1, side=12))


@dataclass(frozen=True)
class Case:
    """One part of one rewritten graph, and what Inductor is to make of it.

    Attributes:
        launches: Triton kernels that a call launches.
        externs: calls of anything that Inductor did not generate, in order.
        graph: captures the model; the toy has no CLS row in front of its patches.
    """

    schedule: Schedule
    part: Callable[[Captured, OnCuda], OnCuda]
    launches: int
    externs: tuple[str, ...] = ()
    graph: Callable[[], Captured] = llava_graph

    @property
    def captured(self) -> Captured:
        """The graph before the passes."""
        return self.graph()

    def made(self) -> tuple[OnCuda, OnCuda]:
        """The rewritten graph, and the part of it."""
        whole, report = rewritten(self.captured, self.schedule)
        assert report.inserted and not report.refusals
        return whole, self.part(self.captured, whole)


def spu(captured: Captured, whole: OnCuda) -> OnCuda:
    return site(whole, "prune before decoder layer 1")


def _oim(captured: Captured, whole: OnCuda) -> OnCuda:
    return site(whole, "merge after encoder block 0")


def _layer(captured: Captured, whole: OnCuda) -> OnCuda:
    decoder = recognise(captured.copy().graph).decoder
    assert decoder is not None
    return between(whole, decoder.entering[1].name, decoder.entering[2].name)


def _block(captured: Captured, whole: OnCuda) -> OnCuda:
    encoder = recognise(captured.copy().graph).encoder
    assert encoder is not None
    return between(whole, encoder.leaving[0].name, encoder.leaving[1].name)


def prune(**options: Any) -> Schedule:
    return Schedule(prune=Prune(layer=1, **{"tokens": 20, **options}))


def _merge(axis: str = "width", length: int = 6, **options: Any) -> Schedule:
    return Schedule(merge=Merge(axis, length=length, layer=0, **options))


MATMULS = ("extern_kernels.mm", "extern_kernels.mm")

SITES = {
    "SPU, runs": Case(prune(), spu, 6),
    "SPU, runs, lowpass": Case(prune(energy="lowpass"), spu, 6),
    "SPU, runs, with a mask": Case(prune(), spu, 7, graph=partial(llava_graph, True)),
    "SPU, squares": Case(prune(tokens=16), spu, 6),
    "SPU, global": Case(prune(coverage="global"), spu, 7),
    "SPU, by matrix products": Case(prune(realization="basis"), spu, 8, MATMULS),
    "SPU, none left": Case(prune(tokens=0), spu, 3),
    "OIM, width": Case(_merge(length=9), _oim, 6, graph=toy_graph),
    "OIM, height": Case(_merge("height", 9), _oim, 6, graph=toy_graph),
    "OIM, shared": Case(_merge(length=9, pairing="shared"), _oim, 7, graph=toy_graph),
    "OIM, width, behind a CLS row": Case(_merge(), _oim, 7),
    "OIM, height, behind a CLS row": Case(_merge("height"), _oim, 7),
}


def _calls(text: str) -> tuple[str, ...]:
    return tuple(f"extern_kernels.{name}" for name in text.split())


# Attention is two products here: a build without CUDA has no fused one to call.
PARTS = {
    "decoder layer": Case(prune(), _layer, 15, _calls("mm mm bmm mm bmm mm mm mm mm")),
    "encoder block": Case(_merge(), _block, 15, _calls("mm mm bmm addmm bmm mm mm mm")),
}

ALL = {**SITES, **PARTS}
