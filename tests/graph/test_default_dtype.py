"""`torch.set_default_dtype(torch.float64)` changes nothing of ours: operations, selectors, merges, graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.generate.sizes import synthetic_image
from luvc_fx.ops import absorb, lowpass, orthogonal_merge
from luvc_fx.ops.tome import sequence_merge
from luvc_fx.selectors import SELECTORS, SHIPPED, Site
from tests.support.models import inputs, tiny_llava

TOKENS, LEFT = 16, 6


@contextlib.contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_same(run: Callable[[], Any]) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        with default(dtype):
            found.append(run())
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in found), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, TOKENS, 8, dtype=torch.float32)


@pytest.mark.parametrize("realization", ["fft", "basis", "fir"])
def test_filters(x: torch.Tensor, realization: str) -> None:
    check_same(lambda: lowpass(x, 0.3, realization))


@pytest.mark.parametrize("name", SHIPPED)
def test_selectors(x: torch.Tensor, name: str) -> None:
    paid = torch.rand(2, TOKENS, dtype=torch.float32)
    site = Site(2, 4, (4, 4), 1, paid, paid, x)
    check_same(lambda: SELECTORS.get(name)(x, LEFT, site))


def test_merges_and_absorbing(x: torch.Tensor) -> None:
    sizes = torch.ones(2, TOKENS, dtype=torch.float32)
    numbers = torch.arange(TOKENS).expand(2, TOKENS)
    grid = [part.reshape(2, 4, 4, *part.shape[2:]) for part in (x, sizes, numbers)]
    check_same(lambda: orthogonal_merge(*grid, "width", 3))
    check_same(lambda: sequence_merge(x, sizes, numbers, LEFT))
    keep = numbers < LEFT
    check_same(lambda: absorb(x, keep, numbers, numbers[:, :LEFT]))


def test_the_synthetic_image() -> None:
    def draw() -> torch.Tensor:
        image = synthetic_image.synthetic_image(tiny_llava(), SimpleNamespace(image_processor=None), (9, 7))
        return torch.from_numpy(np.array(image))

    check_same(draw)


@pytest.mark.parametrize("method", ["oim", "tome"])
@torch.no_grad()
def test_a_rewritten_graph(method: str) -> None:
    model = tiny_llava()
    given = inputs(model)
    schedule = Schedule(
        merge=(Merge("width", keep=0.75, depth=0.5, method=method),),
        prune=(
            Prune(keep=0.5, layer=1, realization="basis", absorb=True),
            Prune(keep=0.25, layer=2, selector="distinct"),
        ),
    )

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        torch._dynamo.reset()
        with luvc_fx.applied(model, schedule, inner="eager", strict=True):
            output = model(**given)
        return output.logits, output.row_index

    check_same(run)
