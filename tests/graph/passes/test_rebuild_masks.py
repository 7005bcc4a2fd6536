"""Each layer's mask fits its own cache: causal, without the row's leading padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

import luvc_fx
from luvc_fx.graph import markers
from luvc_fx.report import Reason, Refused
from luvc_fx.schedule import Schedule
from tests.support.replay import Captured, capture, examples, quietly


def decode(q: Tensor, first: Tensor, second: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers over caches of their own length, under one mask as transformers hands it out."""
    mask = torch.ops.luvc_fx.cache_mask(padding, q.shape[2])
    one = attend(q, first, first, attn_mask=mask)
    return one, attend(one, second, second, attn_mask=mask)


def real_mask(padding: Tensor, queries: int, keys: int) -> Tensor:
    """Row by row, in plain Python."""
    rows = [
        [[row <= key <= keys - queries + query for key in range(keys)] for query in range(queries)]
        for row in padding.tolist()
    ]
    return torch.tensor(rows).reshape(len(padding), 1, queries, keys)


def caches(queries: int, lengths: tuple[int, int], padding: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = len(padding)

    def random(length: int) -> Tensor:
        return torch.randn(rows, 2, length, 4, generator=generator)

    return {
        "q": random(queries),
        "first": random(lengths[0]),
        "second": random(lengths[1]),
        "padding": torch.tensor(padding),
    }


def check(captured: Captured, given: dict[str, Tensor], backend: luvc_fx.LuvcBackend) -> None:
    got, gm, report = captured.rewritten(backend)
    assert report.masks_rebuilt == 2
    assert report.rewritten
    assert report.kind == "decode"
    assert not any(markers.is_call(n, markers.CACHE_MASK) for n in gm.graph.nodes)
    queries = given["q"].shape[2]
    masks = [real_mask(given["padding"], queries, given[n].shape[2]) for n in ("first", "second")]
    one = attend(given["q"], given["first"], given["first"], attn_mask=masks[0])
    two = attend(one, given["second"], given["second"], attn_mask=masks[1])
    torch.testing.assert_close(got[0], one)
    torch.testing.assert_close(got[1], two)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("queries", [1, 3], ids=["one token", "three tokens"])
def test_each_layer_gets_its_own_mask(queries: int, dynamic: bool) -> None:
    given_ = caches(queries, (9, 6), [0, 2])
    captured = capture(decode, dynamic, run=False, **given_)
    check(captured, given_, luvc_fx.backend(Schedule(), inner="eager", strict=True))


@settings(max_examples=examples(8))
@given(
    st.integers(1, 3),
    st.tuples(st.integers(5, 9), st.integers(5, 9)),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
)
def test_any_lengths_and_padding(queries: int, lengths: tuple[int, int], padding: list[int]) -> None:
    given_ = caches(queries, lengths, padding)
    check(capture(decode, run=False, **given_), given_, quietly("image"))


@pytest.mark.parametrize("queries", [1, 3])
def test_the_queries_of_the_call_itself_count(queries: int) -> None:
    """Another attention, of an encoder say, may come first."""

    def call(first: Tensor, q: Tensor, k: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ops.luvc_fx.cache_mask(padding, q.shape[2])
        return attend(first, k, k), attend(q, k, k, attn_mask=mask)

    given_ = caches(queries, (9, 6), [0])
    q, k = given_["q"], given_["first"]
    none = torch.zeros(0, dtype=torch.int64)
    captured = capture(call, run=False, first=torch.randn(1, 2, 4 - queries, 4), q=q, k=k, padding=none)
    got, gm, report = captured.rewritten(quietly(Schedule()))
    assert report.masks_rebuilt == 1
    torch.testing.assert_close(got[1], attend(q, k, k, attn_mask=real_mask(torch.tensor([0]), queries, 9)))
    masked = [n for n in gm.graph.nodes if n.kwargs.get("attn_mask") is not None]
    assert len(masked) == (queries > 1)


def test_layers_of_one_length_share_a_mask() -> None:
    given_ = caches(1, (7, 7), [1, 0])
    captured = capture(decode, run=False, **given_)
    _, shared, _ = captured.rewritten(quietly(Schedule()))
    _, apart, _ = capture(decode, run=False, **caches(1, (7, 8), [1, 0])).rewritten(quietly(Schedule()))
    assert len(shared.graph.nodes) < len(apart.graph.nodes)
    masks = {n.kwargs["attn_mask"] for n in shared.graph.nodes if "attn_mask" in n.kwargs}
    assert len(masks) == 1


def test_the_stand_in_alone_does_not_run() -> None:
    """A graph whose masks were not rebuilt would be wrong, so it stops."""
    captured = capture(decode, run=False, **caches(3, (9, 6), [0, 2]))
    with pytest.raises(RuntimeError, match="not compiled by luvc_fx"):
        captured.plain()


def test_a_mask_that_is_read_outside_of_attention_is_an_error() -> None:
    """Leaving the stand-in in place would be a wrong answer, so there is no going on without it."""

    def call(q: Tensor, k: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ops.luvc_fx.cache_mask(padding, q.shape[2])
        return attend(q, k, k, attn_mask=mask), mask

    given_ = caches(1, (9, 6), [0, 2])
    captured = capture(call, run=False, q=given_["q"], k=given_["first"], padding=given_["padding"])
    with pytest.raises(Refused) as caught:
        captured.rewritten(quietly(Schedule()))
    assert caught.value.refusal.reason is Reason.CACHE


def test_other_masks_are_left_alone() -> None:
    def call(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return attend(q, k, k, attn_mask=mask)

    given_ = caches(2, (9, 6), [0, 2])
    mask = real_mask(given_["padding"], 2, 9)
    captured = capture(call, q=given_["q"], k=given_["first"], mask=mask)
    got, _, report = captured.rewritten(luvc_fx.backend(Schedule(), inner="eager", strict=True))
    assert (report.masks_rebuilt, report.rewritten) == (0, False)
    assert torch.equal(got[0], captured.plain()[0])
