"""The body of a prune site, compiled once for all layers, sizes and graphs that prune alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.graph.site_operator import COMPILERS, CompiledCut, Numbers
from luvc_fx.schedule import Prune
from luvc_fx.selectors import Site
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
        COMPILERS[name] = _SiteCompiler(inner, settings)
    return name


class _SiteCompiler:
    """Compiles bodies of sites, each once; threads share them."""

    def __init__(self, inner: str, settings: dict[str, Any]) -> None:
        self._inner = inner
        self._settings = settings
        self._known: dict[tuple[object, ...], CompiledCut] = {}
        self._lock = threading.Lock()

    def __call__(self, prune: Prune, layer: int, layers: int, x: Tensor) -> CompiledCut:
        key = (prune, layer, layers, x.shape[2], x.dtype, x.device)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._compile(prune, layer, layers)
            return self._known[key]

    def _compile(self, prune: Prune, layer: int, layers: int) -> CompiledCut:
        run = torch.compile(
            _body(prune, layer, layers),
            backend=self._inner,
            options=self._settings or None,
            fullgraph=True,
        )

        def compiled(
            x: Tensor, places: Tensor, numbers: Numbers, attention: Sequence[Tensor | None]
        ) -> tuple[Tensor, Tensor, Tensor]:
            sizes = {name: torch.empty(number, 0) for name, number in numbers.items()}
            for size in sizes.values():
                torch._dynamo.maybe_mark_dynamic(size, 0)
            for tensor in (x, places, *attention):
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, 1)
            with _compat.tracing_settings():
                result: tuple[Tensor, Tensor, Tensor] = run(x, places, sizes, tuple(attention))
                return result

        return compiled


def _body(prune: Prune, layer: int, layers: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def body(
        x: Tensor, places: Tensor, sizes: dict[str, Tensor], attention: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A number as the size of an empty tensor is a symbol from the first call on; an integer would be one
        # from the second value on, after another compilation.
        numbers = {name: size.shape[0] for name, size in sizes.items()}
        grid = (numbers["height"], numbers["width"]) if "height" in numbers else None
        site = Site(layer, layers, grid, numbers.get("images", 1), *attention, sizes=numbers)
        return cut(x, places, prune, numbers["count"], numbers["rows"], site)

    return _compat.with_own_code(body)
