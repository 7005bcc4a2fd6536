"""spectral_energy: against a plain Fourier sum, and by what must hold whatever the values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.ops import reference, spectral_energy
from luvc_fx.schedule import ENERGIES


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
)
def test_equals_twin(seed, batch, length, channels, cutoff, energy):
    x = tokens(seed, batch, length, channels)
    got = spectral_energy(x, cutoff, energy)
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


@pytest.mark.parametrize("energy", ENERGIES)
def test_traces(traced_names, energy):
    names = traced_names(lambda v: spectral_energy(v, 0.25, energy), tokens(5, 2, 16, 4).bfloat16())
    assert "_fft_r2c" in names and "_fft_c2r" in names


def test_compiles(compiled):
    x = tokens(6, 2, 21, 8)
    got = compiled(lambda v: spectral_energy(v, 0.25, "residual"))(x)
    torch.testing.assert_close(got, spectral_energy(x, 0.25, "residual"))
