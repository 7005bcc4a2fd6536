"""orthogonal_merge: against its NumPy twin, and by what must hold whatever the values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.ops import orthogonal_merge, reference
from luvc_fx.schedule import AXES


def grid(x, sizes=None):
    batch, height, width = x.shape[:3]
    if sizes is None:
        sizes = torch.ones(batch, height, width)
    slots = torch.arange(height * width).reshape(1, height, width).expand(batch, -1, -1)
    return x, sizes, slots.contiguous()


def random_grid(seed, batch, height, width, channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, height, width, channels, generator=generator).to(dtype)
    sizes = torch.randint(1, 5, (batch, height, width), generator=generator).float()
    return grid(x, sizes)


FEW = st.integers(-2, 2)  # many ties, and zero tokens


@st.composite
def cases(draw, values=FEW):
    """A grid of at most two channels: a sum has one order, and NumPy agrees to the last bit."""
    batch, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 9))
    channels = draw(st.integers(1, 2))
    axis = draw(st.sampled_from(AXES))
    length = draw(st.integers(1, width if axis == "width" else height))
    count = batch * height * width
    x = draw(st.lists(values, min_size=count * channels, max_size=count * channels))
    sizes = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    tensors = grid(
        torch.tensor(x, dtype=torch.float32).reshape(batch, height, width, channels),
        torch.tensor(sizes, dtype=torch.float32).reshape(batch, height, width),
    )
    return *tensors, axis, length


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.numpy(), b)


def twin(x, sizes, slots, axis, length, **options):
    return reference.orthogonal_merge(x.numpy(), sizes.numpy(), slots.numpy(), axis, length, **options)


@given(cases())
def test_equals_twin_on_ties(case):
    assert_same(orthogonal_merge(*case), twin(*case))


@given(cases(st.sampled_from([0.0, 1.0, -3.0, float("nan"), float("inf"), -float("inf"), 1e30])))
def test_equals_twin_on_values_that_are_not_finite(case):
    with np.errstate(all="ignore"):
        want = twin(*case)
    assert_same(orthogonal_merge(*case), want)


@pytest.mark.parametrize(
    "shape, axis, length",
    [
        ((1, 27, 27, 2), "width", 20),
        ((1, 27, 27, 2), "height", 5),
        ((2, 16, 16, 2), "width", 8),
        ((2, 5, 1, 2), "height", 1),
        ((2, 1, 5, 2), "width", 2),
    ],
)
def test_equals_twin_on_grids(shape, axis, length):
    tensors = random_grid(0, *shape)
    assert_same(orthogonal_merge(*tensors, axis, length), twin(*tensors, axis, length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", AXES)
def test_narrow_dtypes_round_once_a_round(dtype, axis):
    x, sizes, slots = random_grid(1, 2, 13, 11, 2, dtype)
    got = orthogonal_merge(x, sizes, slots, axis, 3)
    assert got[0].dtype == dtype

    def cast(token):
        return torch.from_numpy(token).to(dtype).float().numpy()

    want = twin(x.float(), sizes, slots, axis, 3, cast=cast)
    assert_same((got[0].float(), *got[1:]), want)


@given(cases())
def test_shape_mass_and_order(case):
    x, sizes, _, axis, length = case
    merged, merged_sizes, merged_slots = orthogonal_merge(*case)
    batch, height, width, channels = x.shape
    shape = (batch, height, length) if axis == "width" else (batch, length, width)
    assert merged.shape == (*shape, channels)
    assert merged_sizes.shape == merged_slots.shape == shape
    assert merged.is_contiguous() and merged_sizes.is_contiguous() and merged_slots.is_contiguous()
    assert merged_sizes.dtype == torch.float32 and merged_slots.dtype == torch.int64

    along = 2 if axis == "width" else 1
    torch.testing.assert_close(merged_sizes.sum(along), sizes.sum(along), rtol=0, atol=0)
    mass = (x.double() * sizes.double().unsqueeze(-1)).sum(along)
    merged_mass = (merged.double() * merged_sizes.double().unsqueeze(-1)).sum(along)
    torch.testing.assert_close(merged_mass, mass, rtol=1e-5, atol=1e-5)

    assert (merged_slots.diff(dim=along) > 0).all()
    lines = torch.arange(height)[:, None] if axis == "width" else torch.arange(width)[None, :]
    of_slot = merged_slots // width if axis == "width" else merged_slots % width
    assert (of_slot == lines).all()


@given(st.integers(0, 2**31), st.sampled_from(AXES), st.integers(1, 6))
def test_rows_and_lines_do_not_see_each_other(seed, axis, length):
    tensors = random_grid(seed, 3, 6, 6, 8)
    whole = orthogonal_merge(*tensors, axis, length)
    for b in range(3):
        alone = orthogonal_merge(*(t[b : b + 1] for t in tensors), axis, length)
        for a, w in zip(alone, whole, strict=True):
            torch.testing.assert_close(a[0], w[b], rtol=0, atol=0)

    x = tensors[0].clone()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    if axis == "width":
        x[:, 1:] = x[:, 1:].reshape(3, 30, 8)[:, order].reshape(3, 5, 6, 8)
    else:
        x[:, :, 1:] = x[:, :, 1:].reshape(3, 30, 8)[:, order].reshape(3, 6, 5, 8)
    other = orthogonal_merge(x, *tensors[1:], axis, length)
    for a, w in zip(other, whole, strict=True):
        a, w = (a[:, 0], w[:, 0]) if axis == "width" else (a[:, :, 0], w[:, :, 0])
        torch.testing.assert_close(a, w, rtol=0, atol=0)


def test_axes_are_each_other_transposed():
    tensors = random_grid(2, 2, 5, 9, 4)
    wide = orthogonal_merge(*tensors, "width", 4)
    tall = orthogonal_merge(*(t.transpose(1, 2) for t in tensors), "height", 4)
    for a, b in zip(wide, tall, strict=True):
        torch.testing.assert_close(a, b.transpose(1, 2), rtol=0, atol=0)


def test_constant_grid_merges_to_the_right_from_the_left():
    x, sizes, slots = grid(torch.full((1, 1, 7, 3), 2.0))
    x, sizes, slots = orthogonal_merge(x, sizes, slots, "width", 5)
    assert sizes.tolist() == [[[2, 2, 1, 1, 1]]]
    assert slots.tolist() == [[[1, 3, 4, 5, 6]]]
    assert (x == 2).all()


def test_one_odd_token_takes_both_neighbours():
    x = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 1, 3, 1)
    sizes = torch.tensor([[[1.0, 2.0, 3.0]]])
    # Three equal tokens, one merge: the first goes right; then two are left and the first goes
    # again.
    merged, merged_sizes, slots = orthogonal_merge(*grid(x, sizes), "width", 1)
    assert merged_sizes.tolist() == [[[6.0]]]
    assert slots.tolist() == [[[2]]]
    torch.testing.assert_close(merged.flatten(), torch.tensor([(1 + 4 + 18) / 6]))
    # Five tokens, two merges, both into place 3: a mean of three.
    x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 1], [1, 1]]).reshape(1, 1, 5, 2)
    _, merged_sizes, slots = orthogonal_merge(*grid(x), "width", 3)
    assert merged_sizes.tolist() == [[[1, 1, 3]]]
    assert slots.tolist() == [[[0, 1, 3]]]


def test_full_length_gives_the_arguments_back():
    tensors = random_grid(3, 1, 1, 4, 2)
    for axis, length in (("width", 4), ("height", 1)):
        assert all(a is b for a, b in zip(orthogonal_merge(*tensors, axis, length), tensors, strict=True))


def test_inputs_are_left_alone():
    tensors = random_grid(4, 1, 6, 6, 2)
    copies = [t.clone() for t in tensors]
    orthogonal_merge(*tensors, "height", 2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("axis, length", [("width", 2), ("height", 2), ("width", 1)])
def test_gradient(axis, length):
    x, sizes, slots = random_grid(5, 1, 3, 4, 3, torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: orthogonal_merge(v, sizes, slots, axis, length)[0], (x,))


def test_gradient_stays_finite_at_zero_tokens():
    x = torch.zeros(1, 1, 4, 3, requires_grad=True)
    orthogonal_merge(*grid(x), "width", 2)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.5))


@pytest.mark.parametrize("axis, length", [("depth", 1), ("width", 0), ("width", 5), ("height", 4)])
def test_refuses(axis, length):
    tensors = random_grid(6, 1, 3, 4, 2)
    with pytest.raises(ValueError, match="axis is" if axis == "depth" else "length is"):
        orthogonal_merge(*tensors, axis, length)


@pytest.mark.parametrize("axis", AXES)
def test_traces_without_sort_or_scatter(traced_names, axis):
    tensors = random_grid(7, 2, 9, 9, 4, torch.bfloat16)
    names = traced_names(lambda *t: orthogonal_merge(*t, axis, 4), *tensors)
    assert not names & {"sort", "topk", "argsort", "scatter", "scatter_reduce", "index_put"}


@pytest.mark.slow
def test_compiles(compiled):
    tensors = random_grid(8, 2, 6, 7, 8)
    want = orthogonal_merge(*tensors, "width", 3)
    got = compiled(lambda *t: orthogonal_merge(*t, "width", 3))(*tensors)
    torch.testing.assert_close(got, want)
