"""The selectors: one signature, valid positions whatever the values, and the twins' choices."""

from __future__ import annotations

import dataclasses
import inspect
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.ops import reference, select_blocks, select_global, spectral_energy
from luvc_fx.schedule import COVERAGES, ENERGIES, NORMALIZATIONS, Prune
from luvc_fx.selectors import SELECTORS, SHIPPED, Selector, Site, choose

OURS = SHIPPED
VALUES = st.integers(-2, 2).map(float) | st.sampled_from([float("nan"), float("inf"), 1e38])
SITE = Site(layer=0, layers=4)


def prune(**options):
    return Prune(keep=0.5, layer=0, **options)


def told(site, x):
    """`site` with something that was paid and some keys, for the selectors that want to know."""
    return dataclasses.replace(
        site, last_query_attention=x.sum(-1), mean_query_attention=x.sum(-1).abs(), keys=x
    )


def tokens(seed, batch, length, channels):
    return torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", OURS)
def test_ours_have_the_one_signature(name):
    wanted = list(inspect.signature(Selector.__call__).parameters)[1:]
    assert list(inspect.signature(SELECTORS.get(name)).parameters) == wanted == ["x", "count", "site"]


@given(
    st.data(),
    st.sampled_from(OURS),
    st.sampled_from(ENERGIES),
    st.sampled_from(COVERAGES),
    st.sampled_from(NORMALIZATIONS),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_positions_are_valid_whatever_the_values(
    data, name, energy, coverage, normalize, per_image, batch, height, width, images
):
    length = images * height * width
    count = data.draw(st.integers(0, length))
    flat = data.draw(st.lists(VALUES, min_size=batch * length, max_size=batch * length))
    x = torch.tensor(flat).reshape(batch, length, 1)
    options = {"energy": energy, "normalize": normalize, "per_image": per_image}
    own = SELECTORS.get(name).parameters()
    options = {option: value for option, value in options.items() if option in own}
    item = prune(selector=name, coverage=coverage, **options)
    site = data.draw(st.sampled_from([Site(3, 4), Site(3, 4, (height, width), images)]))
    got = choose(x, item, count, told(site, x))
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
    got = choose(x, item, count, Site(0, 4, grid))
    want = reference.positions(reference.spectral_energy(x.numpy(), 0.4, energy), count, coverage, grid)
    np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("coverage", COVERAGES)
def test_spectrum_by_image_equals_twin(normalize, per_image, coverage):
    x = tokens(4, 2, 48, 5) + torch.arange(48)[None, :, None] // 16  # three images of other brightness
    item = prune(normalize=normalize, per_image=per_image, coverage=coverage, energy="lowpass")
    scores = reference.spectral_energy(x.numpy(), 0.25, "lowpass", normalize, 3 if per_image else 1)
    got = choose(x, item, 12, Site(0, 4, (4, 4), 3))
    np.testing.assert_array_equal(got.numpy(), reference.positions(scores, 12, coverage, (4, 4)))


def test_per_image_plays_no_part_where_the_images_are_not_whole():
    x = tokens(5, 1, 20, 4)
    assert torch.equal(
        choose(x, prune(per_image=True), 7, Site(2, 4)), choose(x, prune(per_image=False), 7, Site(2, 4))
    )


def test_spectrum_is_energy_then_selection():
    x = tokens(1, 2, 16, 4).bfloat16()
    scores = spectral_energy(x, 0.25, "residual")
    site = Site(0, 4, (4, 4))
    assert torch.equal(choose(x, prune(), 4, site), select_blocks(scores, 4, (4, 4)))
    assert torch.equal(choose(x, prune(coverage="global"), 4, site), select_global(scores, 4))


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 30), st.sampled_from(COVERAGES), st.data())
def test_norm_equals_twin(seed, batch, length, coverage, data):
    x = tokens(seed, batch, length, 3)
    count = data.draw(st.integers(0, length))
    got = choose(x, prune(selector="norm", coverage=coverage), count, SITE)
    want = reference.positions(reference.norm_scores(x.numpy()), count, coverage, None)
    np.testing.assert_array_equal(got.numpy(), want)


def test_norm_is_summed_in_float32():
    x = torch.full((1, 4, 300), 1.0).bfloat16()
    x[0, 2, 0] = 1.25  # lost in a sum of 300 that is rounded to bfloat16
    assert choose(x, prune(selector="norm", coverage="global"), 1, SITE).tolist() == [[2]]


@given(st.integers(1, 64), st.data(), st.integers(0, 2**63), st.integers(0, 100))
def test_random_equals_twin(length, data, seed, layer):
    count = data.draw(st.integers(0, length))
    got = choose(torch.empty(2, length, 1), prune(selector="random", seed=seed), count, Site(layer, 101))
    want = reference.random_positions(length, count, seed, layer)
    np.testing.assert_array_equal(got.numpy(), np.stack([want, want]))


def test_random_depends_on_seed_and_layer_only():
    def first(x=None, seed=1, layer=2, grid=None):
        x = torch.empty(1, 64, 1) if x is None else x
        return choose(x, prune(selector="random", seed=seed), 16, Site(layer, 4, grid))

    assert torch.equal(first(), first(torch.full((1, 64, 1), float("nan")), grid=(8, 8)))
    assert not torch.equal(first(), first(seed=2))
    assert not torch.equal(first(), first(layer=3))


@pytest.mark.parametrize("grid", [None, (8, 8)])
def test_random_block_keeps_the_best_hash_of_each_block(grid):
    x = torch.full((2, 64, 1), float("nan"))
    got = choose(x, prune(selector="random-block", seed=5), 16, Site(3, 4, grid))
    # How many are kept at random until this one is.
    ahead = [set(reference.random_positions(64, k, 5, 3).tolist()) for k in range(65)]
    rank = [next(k for k in range(65) if i in ahead[k]) for i in range(64)]
    for row in got.tolist():
        for kept in row:
            near = [
                i
                for i in range(64)
                if (
                    i // 4 == kept // 4
                    if grid is None
                    else (i // 16, i % 8 // 2) == (kept // 16, kept % 8 // 2)
                )
            ]
            assert len(near) == 4 and kept == min(near, key=rank.__getitem__)
    assert len(set(got[0].tolist())) == 16
    at_random = choose(x, prune(selector="random", seed=5), 16, Site(3, 4, grid))
    spread = choose(x, prune(selector="random-block", coverage="global", seed=5), 16, Site(3, 4, grid))
    assert torch.equal(at_random.sort().values, spread) and not torch.equal(spread, got)


@given(st.integers(0, 2**31), st.integers(2, 24), st.data())
def test_pact_equals_twin(seed, length, data):
    count = data.draw(st.integers(1, length - 1))
    x, keys = tokens(seed, 2, length, 3), tokens(seed + 1, 2, length, 4)
    attended = tokens(seed + 2, 2, length, 1).squeeze(-1).softmax(-1)
    site = dataclasses.replace(SITE, mean_query_attention=attended, keys=keys)
    got = choose(x, prune(selector="pact"), count, site)
    want = reference.pact_positions(x.numpy(), attended.numpy(), keys.numpy(), count)
    np.testing.assert_array_equal(got.numpy(), want)


def test_pact_keeps_one_of_each_cluster():
    """Three tight pairs of keys; what matters less is not clustered, however far it is."""
    angle = torch.tensor([0.0, 0.01, 2.0, 2.01, 4.0, 4.01, 0.5, 1.0, 3.0, 5.0, 5.5, 6.0])
    keys = torch.stack([angle.cos(), angle.sin()], -1)[None]
    attended = torch.tensor([[1.0] * 6 + [0.1] * 6])
    site = dataclasses.replace(SITE, mean_query_attention=attended, keys=keys)
    (kept,) = choose(torch.ones(1, 12, 2), prune(selector="pact"), 3, site).tolist()
    assert [token // 2 for token in kept] == [0, 1, 2]


def test_pact_needs_keys():
    with pytest.raises(ValueError, match="before decoder layer 0: its keys are not known"):
        choose(tokens(0, 1, 4, 2), prune(selector="pact"), 2, SITE)


@given(st.integers(1, 64), st.data())
def test_uniform_equals_twin(length, data):
    count = data.draw(st.integers(0, length))
    got = choose(torch.empty(2, length, 1), prune(selector="uniform"), count, SITE)
    want = reference.uniform_positions(length, count)
    np.testing.assert_array_equal(got.numpy(), np.stack([want, want]))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("count", [-1, 5])
def test_refuses_count(name, count):
    with pytest.raises(ValueError, match="k is"):
        choose(torch.zeros(1, 4, 2), prune(selector=name), count, SITE)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("count", [0, 4, 16])
def test_traces(traced_names, name, count):
    site = Site(1, 4, (4, 4))
    names = traced_names(lambda x: choose(x, prune(selector=name), count, told(site, x)), tokens(2, 2, 16, 4))
    assert "_assert_async" not in names, "what is ours needs no check at run time"
    if traced_names.device == "cuda":
        assert "sort" not in names
    if count in (0, 16):
        assert not names & {"bmm", "mm", "_fft_r2c"}


@pytest.mark.slow
def test_compiles(compiled):
    x = tokens(3, 2, 16, 4)
    site = Site(1, 4, (4, 4))

    def every(x):
        return [choose(x, prune(selector=name), 4, told(site, x)) for name in OURS]

    for got, want in zip(compiled(every)(x), every(x), strict=True):
        assert torch.equal(got, want)
