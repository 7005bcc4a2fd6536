"""spectral_energy: against a plain Fourier sum, and by what must hold whatever the values.

The realizations of the filter itself are tested in test_lowpass.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.ops import reference, spectral_energy
from luvc_fx.schedule import ENERGIES, NORMALIZATIONS, REALIZATIONS


def tokens(seed, batch, length, channels):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, channels, generator=generator)


@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 5),
    st.floats(0.001, 1.0),
    st.sampled_from(ENERGIES),
    st.sampled_from(REALIZATIONS),
)
def test_equals_twin(seed, batch, length, channels, cutoff, energy, realization):
    x = tokens(seed, batch, length, channels)
    got = spectral_energy(x, cutoff, energy, realization=realization)
    assert got.dtype == torch.float32 and got.shape == (batch, length)
    # A ratio divides by the token's own energy, so its error is that of the low-pass over that.
    slack = 1e-5 * (1 + (1 / x.square().sum(-1)).max().item() if energy == "ratio" else 1)
    want = reference.spectral_energy(x.numpy(), cutoff, energy)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=slack * channels * 10)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("length", [1, 2, 27 * 27, 576])
def test_equals_twin_on_grids(length, energy):
    x = tokens(0, 1, length, 3)
    want = reference.spectral_energy(x.numpy(), 0.25, energy)
    np.testing.assert_allclose(spectral_energy(x, 0.25, energy).numpy(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("energy", ENERGIES)
def test_rows_do_not_see_each_other(energy):
    x = tokens(1, 3, 15, 4)
    whole = spectral_energy(x, 0.5, energy)
    for b in range(3):
        torch.testing.assert_close(spectral_energy(x[b : b + 1], 0.5, energy)[0], whole[b])


@pytest.mark.parametrize("length", [7, 8])
def test_constant_tokens_are_all_low_frequency(length):
    x = torch.full((1, length, 2), 3.0)
    torch.testing.assert_close(spectral_energy(x, 0.25, "lowpass"), torch.full((1, length), 18.0))
    torch.testing.assert_close(spectral_energy(x, 0.25, "ratio"), torch.ones(1, length))
    assert spectral_energy(x, 0.25, "residual").max() < 1e-6


def test_the_odd_one_out_has_the_largest_residual():
    x = torch.ones(1, 64, 4)
    x[0, 37] = -1.0
    assert spectral_energy(x, 0.25, "residual").argmax() == 37
    assert spectral_energy(x, 0.25, "lowpass").argmin() == 37


def test_the_smallest_cutoff_passes_the_mean():
    x = tokens(2, 2, 10, 3)
    want = x.mean(1, keepdim=True).square().sum(-1).expand(2, 10)
    torch.testing.assert_close(spectral_energy(x, 1e-9, "lowpass"), want)


def test_cutoff_is_rounded_half_up():
    x = tokens(3, 1, 8, 3)  # 5 bins: 0.5 of them is 2.5, which rounds to 3 bins as 0.6 does
    torch.testing.assert_close(spectral_energy(x, 0.5, "lowpass"), spectral_energy(x, 0.6, "lowpass"))


def test_zero_tokens_have_no_ratio():
    assert (spectral_energy(torch.zeros(1, 6, 2), 0.5, "ratio") == 0).all()


@pytest.mark.parametrize("energy", ENERGIES)
def test_bfloat16_is_computed_in_float32(energy):
    x = tokens(4, 2, 12, 8).bfloat16()
    got = spectral_energy(x, 0.3, energy)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, spectral_energy(x.float(), 0.3, energy), rtol=0, atol=0)


@pytest.mark.parametrize("cutoff", [0.0, -0.1, 1.1, float("nan")])
def test_refuses_cutoff(cutoff):
    with pytest.raises(ValueError, match="cutoff is"):
        spectral_energy(torch.ones(1, 4, 1), cutoff, "ratio")


def test_refuses_energy_and_no_tokens():
    with pytest.raises(ValueError, match=r"energy is 'high'.*'lowpass'"):
        spectral_energy(torch.ones(1, 4, 1), 0.5, "high")
    with pytest.raises(ValueError, match="0 tokens"):
        spectral_energy(torch.ones(1, 0, 1), 0.5, "ratio")


def slack_of(x):
    # A ratio divides by the token's own energy, which the mean may leave near 0.
    return 1e-5 * (1 + (1 / x.square().sum(-1)).max().item())


@given(
    st.integers(0, 2**31),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(2, 20),
    st.floats(0.001, 1.0),
    st.sampled_from(ENERGIES),
    st.sampled_from(NORMALIZATIONS),
)
def test_options_equal_twin(seed, batch, images, length, cutoff, energy, normalize):
    x = 3 + tokens(seed, batch, images * length, 6)
    options = {"normalize": normalize, "images": images}
    got = spectral_energy(x, cutoff, energy, **options)
    assert got.dtype == torch.float32 and got.shape == (batch, images * length)
    want = reference.spectral_energy(x.numpy(), cutoff, energy, **options)
    left = x - x.mean(1, keepdim=True) if images == 1 else x.unflatten(1, (images, length))
    left = left if images == 1 else (left - left.mean(2, keepdim=True)).flatten(1, 2)
    slack = slack_of(left if normalize == "mean" else x) if energy == "ratio" else 1e-4
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=slack)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("energy", ENERGIES)
def test_images_do_not_see_each_other(energy, normalize):
    x = tokens(7, 2, 45, 4)
    whole = spectral_energy(x, 0.4, energy, normalize=normalize, images=3)
    for first in (0, 15, 30):
        alone = spectral_energy(x[:, first : first + 15], 0.4, energy, normalize=normalize)
        torch.testing.assert_close(whole[:, first : first + 15], alone)
    assert not torch.allclose(whole, spectral_energy(x, 0.4, energy, normalize=normalize))


def test_mean_is_deaf_to_what_all_tokens_share_and_rms_to_their_length():
    x = tokens(8, 1, 24, 5)
    shared, length = 50 * torch.ones(5), torch.linspace(0.5, 9.0, 24)[None, :, None]
    for energy in ENERGIES:
        mean = spectral_energy(x, 0.3, energy, normalize="mean")
        torch.testing.assert_close(
            spectral_energy(x + shared, 0.3, energy, normalize="mean"), mean, rtol=1e-3, atol=1e-3
        )
        rms = spectral_energy(x, 0.3, energy, normalize="rms")
        torch.testing.assert_close(
            spectral_energy(x * length, 0.3, energy, normalize="rms"), rms, rtol=1e-3, atol=1e-3
        )
        plain = spectral_energy(x, 0.3, energy)
        if energy != "residual":  # what all share passes the filter, so it is in no residual
            assert not torch.allclose(spectral_energy(x + shared, 0.3, energy), plain, rtol=0.1)
        assert not torch.allclose(spectral_energy(x * length, 0.3, energy), plain, rtol=0.1)


@pytest.mark.parametrize("images", [0, -1, 3, 9])
def test_refuses_images(images):
    with pytest.raises(ValueError, match=r"images is .*; allowed: a divisor of 8"):
        spectral_energy(torch.ones(1, 8, 2), 0.5, "ratio", images=images)


def test_refuses_normalize():
    with pytest.raises(ValueError, match=r"normalize is 'l2'; allowed: 'none', 'mean', 'rms'"):
        spectral_energy(torch.ones(1, 8, 2), 0.5, "ratio", normalize="l2")


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("energy", ENERGIES)
def test_traces_without_complex_numbers(traced_names, energy, normalize):
    names = traced_names(
        lambda v: spectral_energy(v, 0.25, energy, normalize=normalize, images=2),
        tokens(5, 2, 16, 4).bfloat16(),
    )
    assert not [name for name in names if "fft" in name or "complex" in name]


def test_compiles(compiled):
    x = tokens(6, 2, 21, 8)

    def every(v):
        plain = spectral_energy(v, 0.25, "residual")
        return plain, spectral_energy(v, 0.25, "ratio", normalize="rms", images=3)

    for got, want in zip(compiled(every)(x), every(x), strict=True):
        torch.testing.assert_close(got, want)
