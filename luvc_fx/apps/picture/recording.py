"""Run a model once on its rewritten graphs, node by node, and note what became of every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from luvc_fx import _compat
from luvc_fx.anatomy.encoder import patch_convolution
from luvc_fx.anatomy.recognise import recognise
from luvc_fx.apps.picture.owners import owners
from luvc_fx.generate.frontdoor import applied, report_of
from luvc_fx.graph import markers
from luvc_fx.graph.emit import MARK
from luvc_fx.graph.notes import LAYOUT, ORIGINS, SHRUNK, Layout, Merged, Pruned
from luvc_fx.report import Refusal
from luvc_fx.schedule import Schedule


@dataclass(frozen=True, slots=True)
class RecordedMerge:
    """One merge of one encoder.

    Attributes:
        owners: int64 ``[images, rows]`` or ``[rows]``: per row before the merge the row that it is in now.
    """

    note: Merged
    owners: Tensor


@dataclass(frozen=True, slots=True)
class RecordedPrune:
    """One prune of one prompt.

    Attributes:
        places: int64 ``[tokens]``, the visual rows before it.
        rows: int64 ``[rows]``, those that are left, text among them.
        owners: int64 ``[all rows]``: per row before the prune the row that it is in now, or -1.
    """

    note: Pruned
    places: Tensor
    rows: Tensor
    owners: Tensor


@dataclass(slots=True)
class Vision:
    """One run of an encoder.

    Attributes:
        pixels: what it was given, ``[frames, 3, height, width]``, or ``[patches, numbers]`` of a packed one.
        origins: see `Layout.origins`, after the merges.
    """

    layout: Layout
    pixels: Tensor
    origins: tuple[int, ...] | None
    merges: list[RecordedMerge] = field(default_factory=list)


@dataclass(slots=True)
class Recording:
    """What the graphs did to the tokens of one prompt.

    Attributes:
        refusals: what of the schedule was left alone, and why.
    """

    visions: list[Vision] = field(default_factory=list)
    prunes: list[RecordedPrune] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def record(model: Any, inputs: Mapping[str, Any], schedule: Schedule) -> Recording:
    """Prefill `model` on `inputs` with `schedule`; model and what was compiled for it are left as they were.

    The graphs are those that `luvc_fx.compile` makes; an interpreter runs them in place of compiled code.

    Raises:
        ValueError: a schedule that this model cannot follow.
    """
    recording = Recording()

    def inner(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        return lambda *args: _Recorder(gm, recording).run(*args)

    _compat.forget_shapes()
    # Inference tensors have no gradients, which the recorder asks for.
    with torch.inference_mode(False), applied(model, schedule, inner=inner, on_no_match="ignore"):
        model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
        report = report_of(model)
    recording.refusals = list(dict.fromkeys(report.all_refusals()))
    return recording


class _Recorder(fx.Interpreter):
    """Runs one rewritten graph.

    Where a site shrinks a value, its nodes run with gradients from that value on: the gradient says which
    rows went into which. What the graph computes stays the same.
    """

    def __init__(self, gm: fx.GraphModule, recording: Recording) -> None:
        super().__init__(gm)
        self.recording = recording
        self.sites = {node.meta[MARK]: node for node in gm.graph.nodes if SHRUNK in node.meta}
        named = {node.name: node for node in gm.graph.nodes}
        self.sources = {node: named[node.meta[SHRUNK].source] for node in self.sites.values()}
        self.leaves: dict[str, Tensor] = {}
        self.noted: dict[str, Tensor] = {}
        notes = [node.meta[SHRUNK] for node in self.sites.values()]
        self.wanted = {name for n in notes if isinstance(n, Pruned) for name in (n.places, n.rows)}
        self.vision = _vision_of(gm.graph)
        self.pixels = None if self.vision is None else self.vision[1].name

    def run_node(self, n: fx.Node) -> Any:
        """Run `n`, and note what it says about the tokens."""
        site = self.sites.get(n.meta.get(MARK))
        result = super().run_node(n) if site is None else self._run_site(n, site)
        if n.name in self.wanted:
            self.noted[n.name] = result
        if n.name == self.pixels:
            assert self.vision is not None
            layout, _, origins = self.vision
            self.recording.visions.append(Vision(layout, result.detach(), origins))
        if n is site:
            result = self._shrunk(n, result)
        return result

    def _run_site(self, n: fx.Node, site: fx.Node) -> Any:
        source = self.sources[site]
        if source not in n.all_input_nodes:
            with torch.enable_grad():
                return super().run_node(n)
        plain = self.env[source]
        if site.name not in self.leaves:
            self.leaves[site.name] = plain.detach().clone().requires_grad_()
        self.env[source] = self.leaves[site.name]
        try:
            with torch.enable_grad():
                return super().run_node(n)
        finally:
            self.env[source] = plain

    def _shrunk(self, n: fx.Node, result: Tensor) -> Tensor:
        note = n.meta[SHRUNK]
        rows_now = owners(self.leaves.pop(n.name), result)
        if isinstance(note, Merged):
            self.recording.visions[-1].merges.append(RecordedMerge(note, rows_now))
        else:
            places, rows = self.noted[note.places], self.noted[note.rows]
            self.recording.prunes.append(RecordedPrune(note, places[0], rows[0], rows_now[0]))
        return result.detach()


def _vision_of(graph: fx.Graph) -> tuple[Layout, fx.Node, tuple[int, ...] | None] | None:
    """Layout of the encoder in this graph, the value with its pixels, and the features' origins."""
    marker = next((n for n in graph.nodes if markers.is_call(n, markers.PATCHES)), None)
    first, layout = _first_block(graph)
    if marker is not None:
        layout = layout or _layout_of(marker)
        return layout, marker, layout.origins
    if first is None or layout is None:
        return None
    convolution = patch_convolution(graph, first)
    assert convolution is not None
    origins = next((n.meta[ORIGINS] for n in graph.nodes if ORIGINS in n.meta), layout.origins)
    return layout, convolution.all_input_nodes[0], origins


def _first_block(graph: fx.Graph) -> tuple[fx.Node | None, Layout | None]:
    """The value that leaves the first encoder block, and the layout; a graph left alone has no note of it."""
    for node in graph.nodes:
        if LAYOUT in node.meta:
            return node, node.meta[LAYOUT]
    encoder = recognise(graph).encoder
    return (None, None) if encoder is None else (encoder.leaving[0], encoder.layout)


def _layout_of(marker: fx.Node) -> Layout:
    """Of an encoder that was not recognised: what the front door says of its patches."""
    _, numbers, unit = marker.args
    assert isinstance(numbers, (list, tuple)) and isinstance(unit, int)
    sizes: list[int] = [int(number) for number in numbers]  # type: ignore[arg-type]
    frames = tuple((sizes[i], (sizes[i + 1], sizes[i + 2])) for i in range(0, len(sizes), 3))
    return Layout(frames, 0, (unit, unit), True, None, False)
