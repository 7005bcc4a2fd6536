"""The selectors: one signature, valid positions whatever the values, and the twins' choices."""

from __future__ import annotations

import inspect
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx import schedule
from luvc_fx.ops import reference, select_blocks, select_global, spectral_energy
from luvc_fx.schedule import COVERAGES, ENERGIES, Prune
from luvc_fx.selectors import SELECTORS, Selector

VALUES = st.integers(-2, 2).map(float) | st.sampled_from([float("nan"), float("inf"), 1e38])


def prune(**options):
    return Prune(keep=0.5, layer=0, **options)


def tokens(seed, batch, length, channels):
    return torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(seed))


def test_registry_covers_the_schedule():
    assert tuple(SELECTORS) == schedule.SELECTORS
    wanted = list(inspect.signature(Selector.__call__).parameters)[1:]
    for selector in SELECTORS.values():
        assert list(inspect.signature(selector).parameters) == wanted
    with pytest.raises(TypeError):
        SELECTORS["mine"] = None


@given(
    st.data(),
    st.sampled_from(sorted(SELECTORS)),
    st.sampled_from(ENERGIES),
    st.sampled_from(COVERAGES),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_positions_are_valid_whatever_the_values(data, name, energy, coverage, batch, height, width):
    length = height * width
    count = data.draw(st.integers(0, length))
    flat = data.draw(st.lists(VALUES, min_size=batch * length, max_size=batch * length))
    x = torch.tensor(flat).reshape(batch, length, 1)
    item = prune(selector=name, energy=energy, coverage=coverage)
    grid = data.draw(st.sampled_from([None, (height, width)]))
    got = SELECTORS[name](x, item, count, 3, grid)
    assert got.dtype == torch.int64 and got.shape == (batch, count)
    assert ((got >= 0) & (got < length)).all()
    assert (got.diff(dim=1) > 0).all()
    if count == length:
        assert torch.equal(got, torch.arange(length).expand(batch, length))


@pytest.mark.parametrize("energy, coverage", list(product(ENERGIES, COVERAGES)))
@pytest.mark.parametrize("shape, count, grid", [((2, 16, 3), 4, (4, 4)), ((2, 27, 3), 10, None)])
def test_spectrum_equals_twin(energy, coverage, shape, count, grid):
    x = tokens(0, *shape)
    item = prune(energy=energy, coverage=coverage, cutoff=0.4)
    got = SELECTORS["spectrum"](x, item, count, 0, grid)
    want = reference.spectrum_positions(x.numpy(), 0.4, energy, coverage, count, grid)
    np.testing.assert_array_equal(got.numpy(), want)


def test_spectrum_is_energy_then_selection():
    x = tokens(1, 2, 16, 4).bfloat16()
    scores = spectral_energy(x, 0.25, "residual")
    select = SELECTORS["spectrum"]
    assert torch.equal(select(x, prune(), 4, 0, (4, 4)), select_blocks(scores, 4, (4, 4)))
    assert torch.equal(select(x, prune(coverage="global"), 4, 0, (4, 4)), select_global(scores, 4))


@given(st.integers(1, 64), st.data(), st.integers(0, 2**63), st.integers(0, 100))
def test_random_equals_twin(length, data, seed, layer):
    count = data.draw(st.integers(0, length))
    got = SELECTORS["random"](torch.empty(2, length, 1), prune(seed=seed), count, layer, None)
    want = reference.random_positions(length, count, seed, layer)
    np.testing.assert_array_equal(got.numpy(), np.stack([want, want]))


def test_random_depends_on_seed_and_layer_only():
    x = torch.empty(1, 64, 1)
    select = SELECTORS["random"]
    first = select(x, prune(seed=1), 16, 2, None)
    assert torch.equal(first, select(torch.full((1, 64, 1), float("nan")), prune(seed=1), 16, 2, (8, 8)))
    assert not torch.equal(first, select(x, prune(seed=2), 16, 2, None))
    assert not torch.equal(first, select(x, prune(seed=1), 16, 3, None))


@given(st.integers(1, 64), st.data())
def test_uniform_equals_twin(length, data):
    count = data.draw(st.integers(0, length))
    got = SELECTORS["uniform"](torch.empty(2, length, 1), prune(), count, 0, None)
    want = reference.uniform_positions(length, count)
    np.testing.assert_array_equal(got.numpy(), np.stack([want, want]))


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("count", [-1, 5])
def test_refuses_count(name, count):
    with pytest.raises(ValueError, match="k is"):
        SELECTORS[name](torch.zeros(1, 4, 2), prune(), count, 0, None)


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("count", [0, 4, 16])
def test_traces(traced_names, name, count):
    names = traced_names(lambda x: SELECTORS[name](x, prune(), count, 1, (4, 4)), tokens(2, 2, 16, 4))
    if traced_names.device == "cuda":
        assert "sort" not in names
    if count in (0, 16):
        assert "_fft_r2c" not in names


def test_compiles(compiled):
    x = tokens(3, 2, 16, 4)

    def every(x):
        return [select(x, prune(), 4, 1, (4, 4)) for select in SELECTORS.values()]

    for got, want in zip(compiled(every)(x), every(x), strict=True):
        assert torch.equal(got, want)
