"""orthogonal_merge with `pairing` and `feature`: against its twin, and by what must hold."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.ops import orthogonal_merge
from luvc_fx.schedule import AXES, PAIRINGS
from tests.unit.ops.test_oim import assert_same, grid, random_grid, twin


def keys_of(seed, x, features):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*x.shape[:3], features, generator=generator)


@st.composite
def axis_aligned(draw):
    """Tokens and keys along the axes of their space: cosines of -1, 0 and 1, so every tie is exact."""
    batch, height, width = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 7))
    axis = draw(st.sampled_from(AXES))
    length = draw(st.integers(1, width if axis == "width" else height))
    count = batch * height * width
    parts = []
    for _ in range(2):
        along = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
        scale = draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count))
        one = torch.eye(3)[torch.tensor(along)] * torch.tensor(scale).float().unsqueeze(1)
        parts.append(one.reshape(batch, height, width, 3))
    tensors = grid(parts[0])
    return *tensors, axis, length, parts[1]


@given(axis_aligned(), st.booleans())
def test_shared_equals_twin_on_ties(case, keyed):
    *case, feature = case
    axis, length = case[3:]
    # One round: the means of a second one are not exact.
    length = max(length, -(-case[0].shape[2 if axis == "width" else 1] // 2))
    feature = feature if keyed else None
    got = orthogonal_merge(*case[:3], axis, length, "shared", feature)
    want = twin(
        *case[:3], axis, length, pairing="shared", feature=None if feature is None else feature.numpy()
    )
    assert len(got) == len(want) == (4 if keyed else 3)
    assert_same(got[1:3], want[1:3])
    for a, b in zip((got[0], *got[3:]), (want[0], *want[3:]), strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "shape, axis, length", [((2, 16, 12, 8), "width", 5), ((1, 27, 27, 4), "height", 20)]
)
@pytest.mark.parametrize("pairing, keyed", list(product(PAIRINGS, [False, True])))
def test_pairing_and_keys_equal_twin(shape, axis, length, pairing, keyed):
    tensors = random_grid(11, *shape)
    feature = keys_of(12, tensors[0], 6) if keyed else None
    got = orthogonal_merge(*tensors, axis, length, pairing, feature)
    want = twin(*tensors, axis, length, pairing=pairing, feature=None if feature is None else feature.numpy())
    assert_same(got[1:3], want[1:3])
    for a, b in zip((got[0], *got[3:]), (want[0], *want[3:]), strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-5, atol=1e-5)


@given(
    st.integers(0, 2**31),
    st.sampled_from(AXES),
    st.sampled_from(PAIRINGS),
    st.booleans(),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.data(),
)
def test_mass_and_rectangle_with_every_option(seed, axis, pairing, keyed, shape, data):
    tensors = random_grid(seed, *shape, 3)
    feature = keys_of(seed, tensors[0], 5) if keyed else None
    length = data.draw(st.integers(1, shape[2] if axis == "width" else shape[1]))
    merged, sizes, slots, *features = orthogonal_merge(*tensors, axis, length, pairing, feature)
    rectangle = (shape[0], shape[1], length) if axis == "width" else (shape[0], length, shape[2])
    along = 2 if axis == "width" else 1
    assert merged.shape[:3] == sizes.shape == slots.shape == rectangle
    assert (slots.diff(dim=along) > 0).all()
    torch.testing.assert_close(sizes.sum(along), tensors[1].sum(along), rtol=0, atol=0)
    for before, after in zip((tensors[0], *([feature] if keyed else [])), (merged, *features), strict=True):
        mass = (before.double() * tensors[1].double().unsqueeze(-1)).sum(along)
        merged_mass = (after.double() * sizes.double().unsqueeze(-1)).sum(along)
        torch.testing.assert_close(merged_mass, mass, rtol=1e-5, atol=1e-5)


@given(
    st.integers(0, 2**31),
    st.sampled_from(AXES),
    st.booleans(),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.data(),
)
def test_shared_merges_the_same_places_in_all_lines(seed, axis, keyed, shape, data):
    x, _, slots = random_grid(seed, *shape, 3)
    feature = keys_of(seed, x, 5) if keyed else None
    length = data.draw(st.integers(1, shape[2] if axis == "width" else shape[1]))
    _, sizes, slots, *_ = orthogonal_merge(*grid(x), axis, length, "shared", feature)
    width = shape[2]
    places = slots % width if axis == "width" else slots // width
    lines = 1 if axis == "width" else 2
    assert (places == places.narrow(lines, 0, 1)).all()
    assert (sizes == sizes.narrow(lines, 0, 1)).all()


def test_shared_chooses_on_the_mean_of_the_lines():
    # The first line alone would merge 0 with 1, the others 2 with 3; so does their mean.
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    first = torch.stack([one, one, one, other])
    rest = torch.stack([one, other, one, one])
    x = torch.stack([first, rest, rest]).unsqueeze(0)
    # With the next token: line 0 has cosines 1, 1, 0 and the others 0, 0, 1; the means are 1/3, 1/3, 2/3.
    by_line = orthogonal_merge(*grid(x), "width", 3)[2]
    shared = orthogonal_merge(*grid(x), "width", 3, "shared")[2]
    assert by_line.tolist() == [[[1, 2, 3], [4, 5, 7], [8, 9, 11]]]
    assert shared.tolist() == [[[0, 1, 3], [4, 5, 7], [8, 9, 11]]]


def test_shared_takes_no_account_of_sizes():
    x, _, slots = random_grid(13, 2, 5, 8, 4)
    sizes = torch.ones(2, 5, 8)
    sizes[:, 0] = 1000.0
    got = orthogonal_merge(x, sizes, slots, "width", 5, "shared")[2]
    assert torch.equal(got, orthogonal_merge(*grid(x), "width", 5, "shared")[2])


def test_one_line_shares_with_itself():
    tensors = random_grid(14, 3, 1, 9, 4)
    for a, b in zip(
        orthogonal_merge(*tensors, "width", 4),
        orthogonal_merge(*tensors, "width", 4, "shared"),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_cosine_that_is_not_a_number_counts_as_below_all_in_the_mean():
    x = torch.ones(1, 2, 4, 2)
    x[0, 0, 0] = float("nan")  # the mean of places 0 and 1 is -0.5, that of 2 and 3 is 1
    slots = orthogonal_merge(*grid(x), "width", 3, "shared")[2]
    assert slots.tolist() == [[[0, 1, 3], [4, 5, 7]]]


@given(st.integers(0, 2**31), st.sampled_from(AXES), st.sampled_from(PAIRINGS))
def test_keys_decide_and_hidden_states_do_not(seed, axis, pairing):
    tensors = random_grid(seed, 2, 6, 6, 4)
    keys = keys_of(seed + 1, tensors[0], 5)
    _, sizes, slots, merged = orthogonal_merge(*tensors, axis, 3, pairing, keys)
    other = orthogonal_merge(-3 * tensors[0].flip(3) + 1, *tensors[1:], axis, 3, pairing, keys)
    assert torch.equal(other[1], sizes) and torch.equal(other[2], slots) and torch.equal(other[3], merged)
    # Merged as the tokens are: keys that are compared are themselves what a plain merge would make of them.
    alone = orthogonal_merge(keys, *tensors[1:], axis, 3, pairing)
    for a, b in zip((merged, sizes, slots), alone, strict=True):
        assert torch.equal(a, b)


def test_further_rounds_compare_merged_keys():
    # 0 and 1 merge first; their mean key then lies closest to that of 2 and 3.
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.9, 0.5], [0.8, 0.6]]).reshape(1, 1, 4, 2)
    x = torch.randn(1, 1, 4, 3)
    merged, sizes, slots, features = orthogonal_merge(*grid(x), "width", 1, "line", keys)
    torch.testing.assert_close(features.flatten(), keys.reshape(4, 2).mean(0))
    torch.testing.assert_close(merged.flatten(), x.reshape(4, 3).mean(0))
    assert sizes.tolist() == [[[4.0]]] and slots.tolist() == [[[3]]]


def test_full_length_gives_the_feature_back():
    tensors, keys = random_grid(15, 1, 2, 3, 4), torch.randn(1, 2, 3, 5)
    got = orthogonal_merge(*tensors, "width", 3, "shared", keys)
    assert all(a is b for a, b in zip(got, (*tensors, keys), strict=True))


def test_keys_may_have_another_dtype():
    tensors, keys = random_grid(16, 1, 4, 6, 4, torch.bfloat16), torch.randn(1, 4, 6, 5)
    got = orthogonal_merge(*tensors, "width", 4, "line", keys)
    assert got[0].dtype == torch.bfloat16 and got[3].dtype == torch.float32


def test_refuses_pairing_and_feature():
    tensors = random_grid(17, 1, 3, 4, 2)
    with pytest.raises(ValueError, match=r"pairing is 'column'; allowed: 'line', 'shared'"):
        orthogonal_merge(*tensors, "width", 2, "column")
    for wrong in (torch.zeros(1, 3, 5, 2), torch.zeros(1, 3, 4), torch.zeros(2, 3, 4, 2)):
        with pytest.raises(ValueError, match=r"feature has shape .*; allowed: \[1, 3, 4\] and channels"):
            orthogonal_merge(*tensors, "width", 2, "line", wrong)


@pytest.mark.parametrize("axis, pairing, keyed", list(product(AXES, PAIRINGS, [False, True])))
def test_gradients(axis, pairing, keyed):
    x, sizes, slots = random_grid(18, 2, 4, 5, 3)
    inputs = [x.double().requires_grad_()]
    if keyed:
        inputs.append(keys_of(19, x, 2).double().requires_grad_())

    def merged(x, feature=None):
        out = orthogonal_merge(x, sizes, slots, axis, 2, pairing, feature)
        return out[0], *out[3:]

    torch.autograd.gradcheck(merged, inputs)


@pytest.mark.parametrize("axis, keyed", list(product(AXES, [False, True])))
def test_shared_traces_without_sort_or_scatter(traced_names, axis, keyed):
    tensors = random_grid(20, 2, 9, 9, 4, torch.bfloat16)
    feature = keys_of(21, tensors[0], 6).bfloat16() if keyed else None
    names = traced_names(
        lambda *t: orthogonal_merge(*t[:3], axis, 4, "shared", *t[3:]),
        *tensors,
        *([feature] if keyed else []),
    )
    assert not names & {"sort", "topk", "argsort", "scatter", "scatter_reduce", "index_put"}


@pytest.mark.slow
def test_shared_with_keys_compiles(compiled):
    tensors = random_grid(22, 2, 6, 7, 8)
    keys = keys_of(23, tensors[0], 4)
    want = orthogonal_merge(*tensors, "width", 3, "shared", keys)
    got = compiled(lambda *t: orthogonal_merge(*t[:3], "width", 3, "shared", t[3]))(*tensors, keys)
    torch.testing.assert_close(got, want)
