"""Capture a model's graph once, rewrite copies of it many times, and compare with the oracle."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

import luvc_fx
from luvc_fx import _compat
from luvc_fx.dynamo.backend import LuvcBackend
from luvc_fx.report import GraphReport, Refusal
from luvc_fx.schedule import Schedule
from tests.support.models import inputs as make_inputs
from tests.support.models import tiny_llava
from tests.support.oracle import OracleResult

PROFILE = os.environ.get("LUVC_HYPOTHESIS", "fast")


def examples(full: int) -> int:
    """How many examples a property that compiles gets: a quarter in the default run, `full` in test-all."""
    return {"fast": max(3, full // 4), "full": full, "thorough": 10 * full}[PROFILE]


# ------------------------------------------------------------------------------------------ capturing


@dataclass(frozen=True)
class Captured:
    """One Dynamo graph with the inputs it was captured on."""

    gm: fx.GraphModule
    example_inputs: tuple[Any, ...]

    def copy(self) -> fx.GraphModule:
        """A graph module that a backend may rewrite in place."""
        twin = copy.deepcopy(self.gm)
        for old, new in zip(self.gm.graph.nodes, twin.graph.nodes, strict=True):
            if hasattr(old, "_dynamo_source"):
                new._dynamo_source = old._dynamo_source
        return twin

    @property
    def values(self) -> tuple[Any, ...]:
        """The example inputs as they come at run time, with numbers for symbols."""
        return tuple(int(x) if isinstance(x, torch.SymInt) else x for x in self.example_inputs)

    @torch.no_grad()
    def plain(self) -> tuple[Any, ...]:
        """What the graph gives as it was captured."""
        return self.gm.forward(*self.values)

    @torch.no_grad()
    def rewritten(self, backend: LuvcBackend) -> tuple[tuple[Any, ...], fx.GraphModule, GraphReport]:
        """What a copy gives after `backend`, that copy, and the report."""
        gm = self.copy()
        compiled = backend(gm, list(self.example_inputs))
        return compiled(*self.values), gm, backend.report.graphs[-1]


class _Stopped(Exception):
    """Raised in place of running a captured graph."""


def _stop(*_: Any) -> None:
    raise _Stopped


class Recorder:
    """An inner compiler or a backend that keeps what it is given and runs it as it is."""

    def __init__(self, run: bool = True) -> None:
        self.graphs: list[Captured] = []
        self.run = run

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        self.graphs.append(Captured(gm, tuple(example_inputs)))
        return gm.forward if self.run else _stop


@torch.no_grad()
def capture(
    call: Callable[..., Any], dynamic: bool | None = False, run: bool = True, **kwargs: Any
) -> Captured:
    """The only graph of ``call(**kwargs)``; without `run`, one that could not run as it is."""
    torch._dynamo.reset()
    recorder = Recorder(run)
    stopping = contextlib.suppress(_Stopped)
    _compat.dynamo_patches.install()
    with torch._dynamo.config.patch(capture_scalar_outputs=True), stopping:
        torch.compile(call, backend=recorder, dynamic=dynamic)(**kwargs)
    torch._dynamo.reset()
    assert len(recorder.graphs) == 1, f"captured {len(recorder.graphs)} graphs, expected one"
    return recorder.graphs[0]


@cache
def llava(**options: Any) -> nn.Module:
    """A tiny LLaVA that captures as one graph; do not change it."""
    return luvc_fx.prepare(tiny_llava(**options))


@cache
def prompt(batch: int = 1, **options: Any) -> dict[str, Tensor]:
    """`models.inputs` for `llava` with the options in `model` (a tuple of pairs)."""
    model = llava(**dict(options.pop("model", ())))
    return make_inputs(model, batch, **options)


@cache
def whole(dynamic: bool | None = False, batch: int = 1, **options: Any) -> Captured:
    """The graph of a whole tiny LLaVA on `prompt` with the same arguments."""
    model = llava(**dict(options.get("model", ())))
    return capture(model, dynamic, **prompt(batch=batch, **options))


# --------------------------------------------------------------------------------- models by hand

_CHANNELS = 8


class Block(nn.Module):
    """Attention and a perceptron, both residual; `causal` or under a mask."""

    def __init__(self, causal: bool, residual: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(_CHANNELS, _CHANNELS) for _ in range(5))
        self.norm = nn.LayerNorm(_CHANNELS)
        self.causal, self.residual = causal, residual

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            part(h).view(*h.shape[:2], 2, _CHANNELS // 2).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out = self.o(out.transpose(1, 2).reshape(*h.shape[:2], _CHANNELS))
        x = x + out if self.residual else out
        return x + self.up(x)


class Toy(nn.Module):
    """The least that is a vision-language model: convolution, blocks, `masked_scatter`, blocks, head.

    Each flag makes it one that has to be refused.

    Args:
        conv: patches by a convolution; else the caller gives patch features.
        fusions: how often image features enter the text.
        residual: whether the decoder's first layer keeps its input.
        between: applied to the hidden states between two decoder layers.
        vision_between: the same in the encoder.
    """

    def __init__(
        self,
        conv: bool = True,
        fusions: int = 1,
        residual: bool = True,
        between: Callable[[Tensor], Tensor] | None = None,
        vision_between: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, _CHANNELS, 4, 4) if conv else nn.Linear(3, _CHANNELS)
        self.encoder = nn.ModuleList([Block(False), Block(False)])
        self.embed = nn.Embedding(11, _CHANNELS)
        self.decoder = nn.ModuleList([Block(True, residual), Block(True), Block(True)])
        self.head = nn.Linear(_CHANNELS, 11)
        self.conv, self.fusions = conv, fusions
        self.between, self.vision_between = between, vision_between

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        x = self.patches(pixels)
        if self.conv:
            x = x.flatten(2).transpose(1, 2)
        for number, block in enumerate(self.encoder):
            if number and self.vision_between is not None:
                x = self.vision_between(x)
            x = block(x)
        hidden = self.embed(ids)
        where = (ids == 1).unsqueeze(-1).expand_as(hidden)
        for _ in range(self.fusions):
            hidden = hidden.masked_scatter(where, x.reshape(-1, _CHANNELS))
        for number, block in enumerate(self.decoder):
            if number == 1 and self.between is not None:
                hidden = self.between(hidden)
            hidden = block(hidden)
        return self.head(hidden)


def toy(seed: int = 0, **options: Any) -> Toy:
    """A `Toy` with weights from `seed`."""
    torch.manual_seed(seed)
    return Toy(**options).eval().requires_grad_(False)


def toy_inputs(
    rows: int = 2, images: int | None = None, side: int = 4, conv: bool = True
) -> dict[str, Tensor]:
    """Two text tokens, side * side placeholders and three text tokens in each of `rows`."""
    images = rows if images is None else images
    ids = torch.full((rows, 5 + side * side), 1)
    ids[:, :2], ids[:, -3:] = 3, torch.tensor([4, 5, 6])
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(images, 3, 4 * side, 4 * side, generator=generator)
    if not conv:
        pixels = torch.randn(images, side * side, 3, generator=generator)
    return {"ids": ids, "pixels": pixels}


@cache
def toy_whole(dynamic: bool | None = False) -> Captured:
    """The graph of a whole `toy` on `toy_inputs`."""
    return capture(toy(), dynamic, **toy_inputs())


# ------------------------------------------------------------------------------------------ comparing


@dataclass(frozen=True)
class Outputs:
    """What a captured LLaVA graph returns."""

    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Outputs:
        """Sort a graph's flat outputs: caches have four axes, values before keys; logits have three.

        InternVL's image features have three too, but the vocabulary is larger than any width here.
        """
        caches = [x for x in flat if isinstance(x, Tensor) and x.dim() == 4]
        logits = max((x for x in flat if isinstance(x, Tensor) and x.dim() == 3), key=lambda x: x.shape[-1])
        return cls(logits, caches[1::2], caches[::2])

    @classmethod
    def of_model(cls, result: Any) -> Outputs:
        """The same of a model's output object."""
        layers = result.past_key_values.layers
        return cls(result.logits, [layer.keys for layer in layers], [layer.values for layer in layers])


def rms(x: Tensor) -> float:
    """Root of the mean square, in double precision."""
    return float(x.double().pow(2).mean().sqrt())


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """The RMS of the difference, over the RMS of `want`, is at most `tolerance`."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    error, scale = rms(got.double() - want.double()), rms(want)
    assert error <= tolerance * scale, (
        f"{what}: RMS error {error:.3g} over RMS {scale:.3g} is {error / scale:.3g}, allowed {tolerance:.3g}"
    )


def assert_is_oracle(got: Outputs, want: OracleResult, tolerance: float = 2e-5) -> None:
    """Logits, keys and values of every real row, and the length of every layer's cache."""
    lengths = [keys.shape[-2] for keys in got.keys]
    assert lengths == want.kv_lengths, f"KV lengths {lengths}, the oracle has {want.kv_lengths}"
    real = want.mask
    assert got.logits.shape == want.logits.shape
    assert_close(got.logits[real], want.logits[real], tolerance, "logits")
    for number, layer in enumerate(want.cache.layers):
        valid = want.state.valid[number]
        for name, mine, theirs in (
            ("keys", got.keys[number], layer.keys),
            ("values", got.values[number], layer.values),
        ):
            rows, others = mine.transpose(1, 2)[valid], theirs.transpose(1, 2)[valid]
            assert_close(rows, others, tolerance, f"{name} of layer {number}")


def reasons(refusals: Sequence[Refusal]) -> list[luvc_fx.Reason]:
    """The reasons alone, in order."""
    return [refusal.reason for refusal in refusals]


def quietly(schedule: luvc_fx.Schedule | str, inner: Any = "eager", **options: Any) -> LuvcBackend:
    """A backend that keeps refusals to its report."""
    return luvc_fx.backend(schedule, inner=inner, on_no_match="ignore", **options)


def code(graph: fx.Graph) -> str:
    """The graph as printed Python."""
    return graph.python_code("self").src


def compare(captured: Captured, schedule: Schedule, want: OracleResult) -> Outputs:
    """Rewrite a copy of a whole graph; assert that report and outputs are the oracle's."""
    backend = luvc_fx.backend(schedule, inner="eager", strict=True)
    flat, gm, report = captured.rewritten(backend)
    got = Outputs.of(flat)
    assert report.kind == "whole"
    assert report.refusals == []
    assert report.tokens_per_layer == want.tokens_per_layer
    assert backend.report.tokens_per_layer() == want.tokens_per_layer
    assert report.nodes_after == len(gm.graph.nodes)
    assert_is_oracle(got, want)
    return got
