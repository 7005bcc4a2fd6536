"""select_global and select_blocks: against their twins on ties, NaN and uneven blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.ops import keep_blocks, keep_global, reference, select_blocks, select_global
from luvc_fx.ops.select import descending_rank, top_by_counting, top_by_sorting

ODD = st.sampled_from([0.0, -0.0, 1.0, 2.0, float("nan"), float("inf"), -float("inf")])
TIES = st.integers(0, 3).map(float)


@st.composite
def scores(draw, values=TIES | ODD):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    flat = draw(st.lists(values, min_size=batch * length, max_size=batch * length))
    return torch.tensor(flat).reshape(batch, length), draw(st.integers(0, length))


def assert_valid(index, length, k):
    assert index.dtype == torch.int64 and index.shape[1] == k
    assert ((index >= 0) & (index < length)).all()
    assert (index.diff(dim=1) > 0).all()


@given(scores())
def test_global_equals_twin(case):
    x, k = case
    got = select_global(x, k)
    assert_valid(got, x.shape[1], k)
    np.testing.assert_array_equal(got.numpy(), reference.select_global(x.numpy(), k))


@given(scores())
def test_counting_equals_sorting(case):
    x, k = case
    assert torch.equal(top_by_counting(x, k), top_by_sorting(x, k))


@given(scores())
def test_blocks_equal_twin(case):
    x, k = case
    got = select_blocks(x, k, None)
    assert_valid(got, x.shape[1], k)
    np.testing.assert_array_equal(got.numpy(), reference.select_blocks(x.numpy(), k, None))


@given(scores(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans())
def test_masks_mark_the_same_tokens(case, dtype, squares):
    x, k = case
    x = x.to(dtype)
    grid = None
    if squares:
        k, grid = 4, (4, 4)
        x = x.repeat(1, 16)[:, :16]
    for keep, select in (
        (lambda: keep_global(x, k), lambda: select_global(x, k)),
        (lambda: keep_blocks(x, k, grid), lambda: select_blocks(x, k, grid)),
    ):
        (mask, ahead), want = keep(), select()
        assert mask.dtype == torch.bool and mask.shape == x.shape
        assert torch.equal(mask.nonzero()[:, 1].reshape(len(x), k), want)
        assert torch.equal(ahead, mask.long().cumsum(1) - mask.long())


def test_scores_that_only_double_precision_tells_apart():
    x = torch.tensor([[1.0, 1.0 + 1e-12, 1.0, 1.0]], dtype=torch.float64)
    assert select_blocks(x, 2, None).tolist() == [[1, 2]]
    assert select_blocks(x.float(), 2, None).tolist() == [[0, 2]]


@given(st.data(), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 2))
def test_blocks_of_grids_equal_twin(data, batch, height, width, images):
    length = images * height * width
    flat = data.draw(st.lists(TIES | ODD, min_size=batch * length, max_size=batch * length))
    x = torch.tensor(flat).reshape(batch, length)
    for k in {length // 4, length // 2}:
        got = select_blocks(x, k, (height, width))
        assert_valid(got, length, k)
        want = reference.select_blocks(x.numpy(), k, (height, width))
        np.testing.assert_array_equal(got.numpy(), want)


@given(scores(), st.integers(1, 3))
def test_rows_do_not_see_each_other(case, copies):
    x, k = case
    x = x.repeat(copies, 1)
    for select in (select_global, lambda s, n: select_blocks(s, n, None)):
        whole = select(x, k)
        for b in range(len(x)):
            assert torch.equal(select(x[b : b + 1], k)[0], whole[b])


def test_ranks_are_a_permutation():
    x = torch.randint(0, 3, (2, 3, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(descending_rank(x).sort(-1).values, torch.arange(9).expand(2, 3, 9).int())


def test_equal_scores_keep_the_lower_index():
    x = torch.zeros(2, 9)
    assert select_global(x, 4).tolist() == [[0, 1, 2, 3]] * 2
    assert top_by_counting(x, 4).tolist() == [[0, 1, 2, 3]] * 2
    assert select_blocks(x, 4, None).tolist() == [[0, 3, 5, 7]] * 2  # blocks of 3, 2, 2, 2
    assert select_blocks(torch.zeros(1, 16), 4, (4, 4)).tolist() == [[0, 2, 8, 10]]


def test_square_winners_ascend_in_raster_order():
    x = torch.zeros(1, 8)
    x[0, 4] = 1.0  # the first square's winner lies on the second row, the second's on the first
    assert select_blocks(x, 2, (2, 4)).tolist() == [[2, 4]]


def test_nothing_but_nan():
    x = torch.full((1, 8), float("nan"))
    assert select_global(x, 3).tolist() == [[0, 1, 2]]
    assert top_by_counting(x, 3).tolist() == [[0, 1, 2]]
    assert select_blocks(x, 2, (2, 4)).tolist() == [[0, 2]]
    assert select_blocks(x, 3, None).tolist() == [[0, 3, 6]]


def test_integers_and_bfloat16():
    x = torch.tensor([[3, 2**32 - 1, 2**32 - 2, 0]])
    assert select_global(x, 2).tolist() == top_by_counting(x, 2).tolist() == [[1, 2]]
    x = torch.tensor([[3.0, 1.0, 2.0, 5.0]]).bfloat16()
    assert select_global(x, 2).tolist() == top_by_counting(x, 2).tolist() == [[0, 3]]
    assert select_blocks(x, 2, None).tolist() == [[0, 3]]


@pytest.mark.parametrize("k", [-1, 5])
def test_refuses_k(k):
    for select in (select_global, lambda s, n: select_blocks(s, n, None)):
        with pytest.raises(ValueError, match="k is"):
            select(torch.zeros(1, 4), k)


@pytest.mark.parametrize("grid", [(3, 2), (0, 4), (2, 4)])
def test_refuses_grid(grid):
    with pytest.raises(ValueError, match="grid is"):
        select_blocks(torch.zeros(1, 4), 1, grid)


def test_global_traces(traced_names):
    names = traced_names(lambda s: select_global(s, 5), torch.zeros(2, 16))
    assert ("sort" in names) == (traced_names.device == "cpu")


@pytest.mark.parametrize("grid", [None, (4, 4)])
@pytest.mark.parametrize("k", [0, 4, 5, 16])
def test_blocks_trace_without_sort(traced_names, grid, k):
    names = traced_names(lambda s: select_blocks(s, k, grid), torch.zeros(2, 16))
    assert not names & {"sort", "topk", "argsort", "argmax"}


@pytest.mark.slow
def test_compiles(compiled):
    x = torch.randint(0, 4, (2, 16), generator=torch.Generator().manual_seed(1)).float()
    x[0, 3] = float("nan")

    def every(s):
        squares = select_blocks(s, 4, (4, 4))
        return select_global(s, 5), top_by_counting(s, 5), select_blocks(s, 5, None), squares

    for got, want in zip(compiled(every)(x), every(x), strict=True):
        assert torch.equal(got, want)
