"""Parts of a stage, compiled and timed by themselves on tensors of the sizes that they have in it.

A graph that Inductor compiled has no place at which the clock could be read, so what the projector and
the selectors take of the vision graph and of the prefill is measured beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from luvc_fx import _compat
from luvc_fx.apps.bench.timing import Clock, Span
from luvc_fx.report import Report
from luvc_fx.schedule import Schedule
from luvc_fx.selectors import Site, choose_mask

_PROJECTORS = ("multi_modal_projector", "merger")
"""What models call the module between encoder and text."""

Part = Sequence[Callable[[], Any]]
"""Calls that together are one part of a run."""


def projector_of(model: Any) -> torch.nn.Module | None:
    """The module that turns what leaves the encoder into features for the text."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _PROJECTORS:
            return module
    return None


def projector_rows(gm: fx.GraphModule) -> tuple[int, ...] | None:
    """The size of what enters the projector in a captured graph; None where it has none."""
    for node in gm.graph.nodes:
        if any(_names_projector(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()):
            for source in node.args:
                rows = source.meta.get("example_value") if isinstance(source, fx.Node) else None
                if isinstance(rows, Tensor) and rows.is_floating_point():
                    return tuple(int(size) for size in rows.shape)
    return None


def _names_projector(path: str) -> bool:
    return any(re.search(rf"\b{name}\b", path) for name in _PROJECTORS)


def projector(model: Any, size: tuple[int, ...] | None, mode: str | None) -> Part:
    """The projector, compiled for rows of this size."""
    module = projector_of(model)
    if module is None or size is None:
        return ()
    rows = torch.randn(size, dtype=model.dtype, device=model.device)
    compiled = torch.compile(module.forward, dynamic=False, mode=mode)
    return (partial(compiled, rows),)


def selectors(model: Any, schedule: Schedule, report: Report, batch: int, mode: str | None) -> Part:
    """The selector of each prune of one prefill, compiled by itself; empty if one needs attention or keys."""
    config = model.config.get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    prunes = dict(schedule.prunes_at(layers))
    calls: list[Callable[[], Any]] = []
    for insertion in (item for graph in report.graphs for item in graph.inserted):
        if insertion.kind == "merge" or not insertion.after:
            continue
        assert insertion.before is not None, "the tokens before a prune are always known"
        layer, prune = insertion.layer, prunes[insertion.layer]
        if prune.selector.needs_attention:
            return ()
        tokens = torch.randn(batch, insertion.before, width, dtype=model.dtype, device=model.device)
        site = Site(layer, layers, None, 1)

        def pick(x: Tensor, prune: Any = prune, count: int = insertion.after, site: Site = site) -> Any:
            return choose_mask(x, prune, count, site)

        # Dynamo counts compilations per code object, and runs the ninth eagerly.
        compiled = torch.compile(_compat.with_own_code(pick), dynamic=False, mode=mode)
        calls.append(partial(compiled, tokens))
    return calls


def _run(part: Part) -> None:
    for call in part:
        call()


@torch.no_grad()
def timed(parts: dict[Any, Part], device: torch.device, rounds: int) -> dict[Any, list[Span]]:
    """The spans of each part, in turns, after one round that compiles and one that warms up."""
    clock = Clock(device)
    spans: dict[Any, list[Span]] = {name: [] for name, part in parts.items() if part}
    for number in range(-2, rounds):
        for name in spans:
            clock.wait()
            stop = clock.stop_after(partial(_run, parts[name]))
            clock.wait()
            if number >= 0:
                spans[name].append(stop())
    return spans
