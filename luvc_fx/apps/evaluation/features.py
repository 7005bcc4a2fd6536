"""What several schedules share: features of an encoder without merges, and the graphs of decoding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luvc_fx.generate.frontdoor import door_of
from luvc_fx.generate.graphs import DecodeGraphs
from luvc_fx.schedule import Schedule

MOST_BYTES = 2 << 30
"""Features that are kept; those beyond are computed each time."""

TOGETHER = 20
"""So many schedules share graphs of decoding: each may need a few more, and their number is limited."""


class Features:
    """What the encoders of one model made of batches of pixels.

    Only on a CPU, where encoding costs more than comparing pixels, and only where nothing merges: a merge is
    part of the schedule. What is remembered are the very tensors, so answers do not change. Of the rest of a
    schedule only whether it prunes changes an encoder's graph: it then also tells the token grid.

    Attributes:
        kept: what an encoder returned, by a hash of its pixels and options and of whether tokens are pruned.
    """

    def __init__(self) -> None:
        self.kept: dict[bytes, Any] = {}
        self._bytes = 0

    def share(self, model: Any) -> None:
        """Let the encoders of a model that is compiled now look here first; `restore` ends it."""
        if model.device.type == "cpu":
            graphs = door_of(model).graphs
            graphs.wrap_unmerged_encoders(
                lambda modality, run: self._remembering((modality, graphs.prunes), run)
            )

    def _remembering(self, of: tuple[str, bool], run: Callable[..., Any]) -> Callable[..., Any]:
        def call(pixels: Tensor, plain: dict[str, Any], text: dict[str, str], layout: dict[str, str]) -> Any:
            if any(isinstance(value, Tensor) for value in plain.values()):
                return run(pixels, plain, text, layout)
            about = repr((of, pixels.shape, pixels.dtype, sorted(plain.items()), text, layout))
            hasher = hashlib.blake2b(about.encode(), digest_size=24)
            hasher.update(pixels.contiguous().flatten().view(dtype=torch.uint8).numpy().data)
            key = hasher.digest()
            if key in self.kept:
                return self.kept[key]
            encoded = run(pixels, plain, text, layout)
            size = sum(part.nbytes for part in _tensors(encoded))
            if self._bytes + size <= MOST_BYTES:
                self.kept[key] = encoded
                self._bytes += size
            return encoded

        return call


class Decoders:
    """Compiled decoding that schedules of one model share.

    Nothing of a schedule is in a graph without images but how many rows each layer's cache has, and where
    questions share a prefill (`luvc_fx.apps.evaluation.together`) a graph is for any number of them but none.
    """

    def __init__(self) -> None:
        self._shared: dict[tuple[Any, ...], DecodeGraphs] = {}
        self._numbers: dict[Schedule, int] = {}

    def share(self, model: Any) -> None:
        """Let a model that is compiled now decode with the graphs of earlier schedules."""
        door = door_of(model)
        number = self._numbers.setdefault(door.schedule, len(self._numbers))
        key = (door.settings["inner"], door.graphs.prunes, number // TOGETHER)
        door.graphs.share_decoding(self._shared.setdefault(key, door.graphs.decode))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for part in value for tensor in _tensors(part)]
