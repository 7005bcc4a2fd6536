"""mask_to_index, gather_rows and compact: against their twins, and with symbolic lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from luvc_fx.ops import compact, drop_tokens, gather_rows, mask_to_index, reference
from luvc_fx.ops.compact import drop_by_counting, index_by_counting


def mask_of(seed, batch, length, count):
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(batch, length, generator=generator).argsort(1).argsort(1)
    return ranks < count


@st.composite
def masks(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(0, 20))
    count = draw(st.integers(0, length))
    return mask_of(draw(st.integers(0, 2**31)), batch, length, count), count


@given(masks())
def test_index_equals_twin(case):
    mask, count = case
    got = mask_to_index(mask, count)
    assert got.dtype == torch.int64
    np.testing.assert_array_equal(got.numpy(), reference.mask_to_index(mask.numpy(), count))


@given(masks(), st.integers(0, 20))
def test_any_other_count_stays_in_range(case, count):
    mask, trues = case
    batch, length = mask.shape
    count = min(count, length)
    got = mask_to_index(mask, count)
    assert got.shape == (batch, count)
    assert ((got >= 0) & (got < length)).all()
    sure = min(count, trues)
    np.testing.assert_array_equal(got.numpy()[:, :sure], reference.mask_to_index(mask.numpy(), sure))


@given(masks(), st.integers(0, 20))
def test_counting_is_scattering(case, count):
    # The spelling of accelerators, where a CPU scatters; entries behind the last True may differ.
    mask, trues = case
    count = min(count, mask.shape[1])
    got, sure = index_by_counting(mask, count), min(count, trues)
    assert got.dtype == torch.int64 and got.shape == (len(mask), count)
    assert ((got >= 0) & (got < mask.shape[1])).all()
    assert torch.equal(got[:, :sure], mask_to_index(mask, sure))


@given(masks(), st.integers(0, 2**31), st.integers(0, 10))
def test_dropping_tokens(case, seed, others):
    keep, count = case
    batch, tokens = keep.shape
    length = tokens + others
    places = mask_of(seed, batch, length, tokens).nonzero()[:, 1].reshape(batch, tokens)
    want = []
    for row in range(batch):
        gone = {int(p) for p, stays in zip(places[row], keep[row], strict=True) if not stays}
        want.append([r for r in range(length) if r not in gone])
    ahead = keep.long().cumsum(1) - keep.long()
    rows = length - tokens + count
    want = torch.tensor(want, dtype=torch.int64).reshape(batch, rows)
    assert torch.equal(drop_tokens(places, keep, ahead, length, rows), want)
    assert torch.equal(drop_by_counting(places, keep, ahead, rows), want)


@given(
    masks(),
    st.lists(st.integers(1, 3), max_size=2),
    st.lists(st.integers(1, 3), max_size=2),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_gather_equals_twin(case, before, after, shared, dtype):
    mask, count = case
    batch, length = mask.shape
    index = mask_to_index(mask, count)
    shape = [1 if shared else batch, *before, length, *after]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 100, shape, generator=generator).to(dtype)
    got = gather_rows(x, index, 1 + len(before))
    assert got.dtype == dtype
    wide = x.float() if dtype == torch.bfloat16 else x
    want = reference.gather_rows(wide.numpy(), index.numpy(), 1 + len(before))
    np.testing.assert_array_equal(got.to(wide.dtype).numpy(), want)


@given(masks())
def test_gather_of_one_line_for_all_rows(case):
    mask, count = case
    index = mask_to_index(mask, count)
    x = torch.arange(mask.shape[1]) * 3
    got = gather_rows(x, index, 0)
    assert torch.equal(got, index * 3)
    np.testing.assert_array_equal(got.numpy(), reference.gather_rows(x.numpy(), index.numpy(), 0))


@given(masks())
def test_compact_is_boolean_indexing(case):
    mask, count = case
    x = torch.arange(mask.numel() * 2).reshape(*mask.shape, 2)
    got = compact(x, mask, count)
    assert torch.equal(got, x[mask].reshape(mask.shape[0], count, 2))
    np.testing.assert_array_equal(got.numpy(), reference.compact(x.numpy(), mask.numpy(), count))


def test_compact_passes_the_gradient():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    mask = mask_of(1, 2, 5, 3)
    compact(x, mask, 3).sum().backward()
    assert torch.equal(x.grad, mask.unsqueeze(-1).expand_as(x).double())


def test_gradients():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator).requires_grad_()
    shared = torch.randn(1, 2, 6, dtype=torch.float64, generator=generator).requires_grad_()
    mask = mask_of(6, 2, 6, 4)
    index = mask_to_index(mask, 4)
    torch.autograd.gradcheck(lambda v: compact(v, mask, 4), (x,))
    torch.autograd.gradcheck(lambda v: gather_rows(v, index, 1), (x,))
    torch.autograd.gradcheck(lambda v: gather_rows(v, index, 2), (shared,))


@pytest.mark.parametrize("count", [-1, 5])
def test_refuses_count(count):
    with pytest.raises(ValueError, match="count is"):
        mask_to_index(torch.ones(1, 4, dtype=torch.bool), count)


@pytest.mark.parametrize("shape, dim", [((2, 3), 0), ((2, 3), 2), ((2, 3), -1), ((3,), 1), ((), 0)])
def test_refuses_dim(shape, dim):
    with pytest.raises(ValueError, match="dim is"):
        gather_rows(torch.zeros(shape), torch.zeros(2, 1, dtype=torch.int64), dim)


def test_traces(traced_names):
    names = traced_names(
        lambda x, m: compact(x, m, 3), torch.zeros(2, 8, 4), torch.zeros(2, 8, dtype=torch.bool)
    )
    assert not names & {"sort", "topk", "argsort", "index"}


def test_the_scatter_carries_int32():
    graph = make_fx(lambda m: mask_to_index(m, 3), tracing_mode="fake")(mask_of(2, 2, 8, 3))
    scatter = next(n for n in graph.graph.nodes if n.target == torch.ops.aten.scatter.src)
    assert scatter.meta["val"].dtype == torch.int32


def test_batch_and_length_may_be_symbolic():
    def drop_three(x, mask):
        return compact(x, mask, x.shape[1] - 3)

    mask = mask_of(3, 2, 8, 5)
    graph = make_fx(drop_three, tracing_mode="symbolic")(torch.randn(2, 8, 4), mask)
    out = next(n for n in graph.graph.nodes if n.op == "output").args[0].meta["val"]
    assert isinstance(out.shape[0], torch.SymInt) and isinstance(out.shape[1], torch.SymInt)
    for batch, length in ((3, 11), (5, 6)):
        x, mask = torch.randn(batch, length, 4), mask_of(4, batch, length, length - 3)
        assert torch.equal(graph(x, mask), drop_three(x, mask))


@pytest.mark.slow
def test_compiles(compiled):
    mask, x = mask_of(5, 2, 9, 4), torch.randn(1, 9, 3)

    def both(x, m, line):
        return compact(x, m, 4), gather_rows(line, mask_to_index(m, 4), 0)

    line = torch.arange(9)
    for got, want in zip(compiled(both)(x, mask, line), both(x, mask, line), strict=True):
        assert torch.equal(got, want)
