"""Bodies of prune and merge sites, each compiled once for all layers, sizes and graphs that do the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.graph import merge_operator
from luvc_fx.graph.merge_operator import CompiledMerge, Steps, run_merge
from luvc_fx.graph.site_operator import COMPILERS, CompiledCut, Numbers, site_of
from luvc_fx.schedule import Prune
from luvc_fx.selectors.cut import cut


def site_compiler(inner: str, mode: str | None, options: Mapping[str, Any]) -> str:
    """The name under which sites of a graph find their compiler, which is the graph's; it is entered.

    Args:
        inner, mode, options: as of `luvc_fx.backend`.
    """
    if inner == "eager":
        return inner
    settings = {} if inner != "inductor" else dict(_compat.inductor_options(mode, dict(options)))
    settings.pop("triton.cudagraphs", None)  # the graph around it is captured, its sites with it
    shown = json.dumps(settings, sort_keys=True, default=repr)
    name = f"{inner} {shown}"
    if name not in COMPILERS:
        bodies = _Bodies(inner, settings)
        merge_operator.COMPILERS[name] = bodies.merge
        COMPILERS[name] = bodies.cut
    return name


class _Bodies:
    """Compiles bodies of sites, each once; threads share them."""

    def __init__(self, inner: str, settings: dict[str, Any]) -> None:
        self._inner = inner
        self._settings = settings
        self._known: dict[tuple[object, ...], Any] = {}
        self._lock = threading.Lock()

    def cut(self, prune: Prune, layer: int, layers: int, x: Tensor) -> CompiledCut:
        """What `luvc_fx.graph.site_operator.COMPILERS` asks for."""
        key = (prune, layer, layers, x.shape[2], x.dtype, x.device)
        run = self._once(key, lambda: _cut_body(prune, layer, layers))

        def compiled(
            x: Tensor, places: Tensor, numbers: Numbers, attention: Sequence[Tensor | None]
        ) -> tuple[Tensor, Tensor, Tensor]:
            sizes = {name: _as_size(number) for name, number in numbers.items()}
            _mark(1, x, places, *attention)
            with _compat.tracing_settings():
                result: tuple[Tensor, Tensor, Tensor] = run(x, places, sizes, tuple(attention))
                return result

        return compiled

    def merge(self, steps: Steps, count: int, unit: int, x: Tensor) -> CompiledMerge:
        """What `luvc_fx.graph.merge_operator.COMPILERS` asks for."""
        key = (steps, count, unit, x.shape[1], x.dtype, x.device)
        run = self._once(key, lambda: _merge_body(steps, count, unit))

        def compiled(
            x: Tensor,
            angles: Tensor | None,
            keys: Sequence[Tensor],
            state: Sequence[Tensor],
            sides: Sequence[int],
        ) -> list[Tensor]:
            blocks = [_as_size(side // unit) for side in sides]
            _mark(0, x, angles)
            _mark(2, *keys)
            for tensor in state:
                _mark(1, tensor)
                _mark(tensor.dim() - 1, tensor)
            with _compat.tracing_settings():
                result: list[Tensor] = run(x, angles, list(keys), list(state), blocks)
                return result

        return compiled

    def _once(self, key: tuple[object, ...], body: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        with self._lock:
            if key not in self._known:
                options = self._settings or None
                self._known[key] = torch.compile(body(), backend=self._inner, options=options, fullgraph=True)
            compiled: Callable[..., Any] = self._known[key]
            return compiled


def _as_size(number: int) -> Tensor:
    """A number as the size of an empty tensor.

    That is a symbol from the first call on; an integer would be one from its second value on, after another
    compilation.
    """
    size = torch.empty(number, 0)
    _mark(0, size)
    return size


def _mark(axis: int, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)


def _merge_body(steps: Steps, count: int, unit: int) -> Callable[..., list[Tensor]]:
    def body(
        x: Tensor, angles: Tensor | None, keys: list[Tensor], state: list[Tensor], blocks: list[Tensor]
    ) -> list[Tensor]:
        sides = [size.shape[0] * unit for size in blocks]
        return run_merge(steps, count, unit, x, angles, keys, state, sides)

    return _compat.with_own_code(body)


def _cut_body(prune: Prune, layer: int, layers: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def body(
        x: Tensor, places: Tensor, sizes: dict[str, Tensor], attention: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        numbers = {name: size.shape[0] for name, size in sizes.items()}
        grid = (numbers["height"], numbers["width"]) if "height" in numbers else None
        site = site_of(layer, layers, grid, numbers.get("images", 1), attention, numbers)
        return cut(x, places, prune, numbers["count"], numbers["rows"], site)

    return _compat.with_own_code(body)
