"""FastV in the compiled path against transformers' own attention weights; diversity against loops."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

import luvc_fx
from luvc_fx import Prune, Schedule
from luvc_fx.anatomy.attention import attentions
from luvc_fx.graph.nodes import live_nodes, op_name
from luvc_fx.passes.support.last_query import last_query
from luvc_fx.report import Insertion, Reason, Refused
from luvc_fx.selectors import Site
from luvc_fx.selectors.distinct import Distinct
from luvc_fx.selectors.diversity import Diversity
from luvc_fx.selectors.spectrum import Spectrum
from tests.support.family_matrix import FAMILIES, prompt_of
from tests.support.models import inputs, tiny_llava
from tests.support.replay import capture

FASTV = Schedule(prune=Prune(keep=0.5, layer=2, selector="fastv", coverage="global"))


# ------------------------------------------------------------------------------------ the one row


def expected(
    q: Tensor, k: Tensor, seen: list[list[bool]], added: Tensor | None, scale: float
) -> numpy.ndarray:
    """``[batch, rows]``, head by head and key by key."""
    batch, heads, _, _ = q.shape
    share = heads // k.shape[1]
    out = numpy.zeros((batch, k.shape[2]))
    for row in range(batch):
        for head in range(heads):
            scores = [
                float(q[row, head, -1] @ k[row, head // share, key]) * scale
                + (0.0 if added is None else float(added[row, 0, -1, key]))
                for key in range(k.shape[2])
            ]
            scores = [score if seen[row][key] else -math.inf for key, score in enumerate(scores)]
            weights = numpy.exp(numpy.array(scores) - max(scores))
            out[row] += weights / weights.sum() / heads
    return out


CASES = ["no mask", "bool mask", "added mask", "own scale", "written out", "over a cache"]


@pytest.mark.parametrize("case", CASES)
def test_the_row_of_the_last_query(case: str) -> None:
    torch.manual_seed(1)
    rows, past = 7, 4 if case == "over a cache" else 0
    q, k = torch.randn(2, 4, rows, 8), torch.randn(2, 2, rows + past, 8)
    seen, added, scale = [[True] * (rows + past) for _ in range(2)], None, 8**-0.5
    given: dict[str, Tensor] = {"q": q, "k": k}
    if case == "bool mask":
        given["mask"] = torch.ones(2, 1, rows, rows, dtype=torch.bool).tril()
        given["mask"][1, :, :, :2] = False
        seen[1][:2] = [False, False]
    elif case in ("added mask", "written out"):
        given["mask"] = added = torch.randn(2, 1, rows, rows)
    elif case == "own scale":
        scale = 0.3
    elif case == "over a cache":
        given["mask"] = torch.tensor([0, 2])
        seen[1][:2] = [False, False]

    def call(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        keys = k.repeat_interleave(2, 1)
        if case == "written out":
            return ((q @ keys.transpose(2, 3)) * 8**-0.5 + mask).softmax(-1) @ keys
        if case == "over a cache":
            mask = torch.ops.luvc_fx.cache_mask(mask, q.shape[2])
        return attend(q, keys, keys, attn_mask=mask, scale=0.3 if case == "own scale" else None)

    graph = capture(call, run=False, **given).gm.graph
    (found,) = attentions(graph, live_nodes(graph))
    nodes, paid = last_query(found)
    assert len(nodes) == (2 if case in ("no mask", "own scale") else 3)
    places = torch.tensor([[2, 3, 5], [3, 4, 6]])
    looked_at = [q, k.repeat_interleave(2, 1), *([given["mask"]] if len(nodes) == 3 else [])]
    got = paid(places, *looked_at)
    want = numpy.take_along_axis(expected(q, k, seen, added, scale), places.numpy() + past, 1)
    numpy.testing.assert_allclose(got.numpy(), want, atol=1e-6)
    if case != "written out":  # heads that share keys need no copies of them
        assert torch.allclose(paid(places, q, k, *looked_at[2:]), got, atol=1e-6)


def test_a_scale_that_is_no_constant_is_refused() -> None:
    def call(q: Tensor, factor: Tensor) -> Tensor:
        return ((q @ q.transpose(2, 3)) * factor).softmax(-1) @ q

    graph = capture(call, q=torch.ones(1, 2, 3, 4), factor=torch.tensor(0.5)).gm.graph
    assert attentions(graph, live_nodes(graph)) == []

    def by_length(q: Tensor) -> Tensor:
        return attend(q, q, q, scale=1 / q.shape[2])

    graph = capture(by_length, dynamic=True, run=False, q=torch.ones(1, 2, 3, 4)).gm.graph
    (found,) = attentions(graph, live_nodes(graph))
    with pytest.raises(Refused, match="scaled by something that is no constant"):
        last_query(found)


# --------------------------------------------------------------------------------------- in a model


def ranked(model: Any, batch: dict[str, Tensor], layer: int, keep: int) -> list[list[int]]:
    """Rows of the visual tokens to which the last token pays most in `layer`, by the model's own weights."""
    weights = model(**batch, output_attentions=True).attentions[layer][:, :, -1].mean(1)
    visual = batch["input_ids"] == model.config.image_token_id
    found = []
    for row in range(len(weights)):
        places = visual[row].nonzero()[:, 0].tolist()
        best = sorted(places, key=lambda place: -float(weights[row, place]))[:keep]
        found.append(sorted(best))
    return found


@pytest.mark.parametrize(
    ("family", "rows"),
    [("llava", "two rows, left padding"), ("internvl", "an image in tiles"), ("qwen2", "an image")],
)
@torch.no_grad()
def test_fastv_keeps_what_transformers_says(family: str, rows: str) -> None:
    stock = FAMILIES[family].make(**FAMILIES[family].size, attn="eager")
    model = FAMILIES[family].make(**FAMILIES[family].size)
    batch = prompt_of(family, rows)
    visual = batch["input_ids"] == model.config.image_token_id
    keep = int(visual[0].sum()) // 2
    with luvc_fx.applied(model, FASTV, inner="eager", strict=True):
        out = model(**batch)
        (prefill,) = luvc_fx.report_of(model).of_kind("prefill")
    wanted = ranked(stock, batch, 1, keep)
    for row, index in enumerate(out.row_index.tolist()):
        assert [place for place in index if visual[row, place]] == wanted[row]
        assert [place for place in index if not visual[row, place]] == (~visual[row]).nonzero()[:, 0].tolist()
    assert prefill.inserted == [Insertion("prune", 2, "fastv", 2 * keep, keep)]


@torch.no_grad()
def test_the_layer_that_is_looked_at_stays_fused() -> None:
    model = tiny_llava(decoder_layers=3, encoder_layers=1, grid=4)
    graphs: list[Any] = []

    def keep(gm: Any, example_inputs: Any) -> Any:
        graphs.append(gm.graph)
        return gm.forward

    with luvc_fx.applied(model, FASTV, inner=keep, strict=True):
        model(**inputs(model))
    calls = [n for n in graphs[-1].nodes if op_name(n) == "scaled_dot_product_attention"]
    assert len(calls) == 3


@torch.no_grad()
def test_before_the_first_layer_there_is_nothing_to_look_at() -> None:
    model = tiny_llava(decoder_layers=2, encoder_layers=1, grid=4)
    schedule = Schedule(prune=Prune(keep=0.5, layer=0, selector="fastv"))
    with luvc_fx.applied(model, schedule, inner="eager", on_no_match="ignore"):
        out = model(**inputs(model))
        (prefill,) = luvc_fx.report_of(model).of_kind("prefill")
    assert [refusal.reason for refusal in prefill.refusals] == [Reason.SCHEDULE]
    assert "from layer 1" in prefill.refusals[0].text
    assert out.logits.shape[1] == inputs(model)["input_ids"].shape[1]


# ---------------------------------------------------------------------------------------- diversity


@pytest.mark.parametrize(("tokens", "count"), [(9, 4), (16, 9), (7, 1), (12, 11)])
def test_diversity_token_by_token(tokens: int, count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 5)
    got = Diversity()(x, count, Site(0, 2))
    pivots = math.isqrt(count)
    places = [(2 * number + 1) * tokens // (2 * pivots) for number in range(pivots)]
    for row in range(2):
        for token in range(tokens):
            likeness = [float(torch.cosine_similarity(x[row, token], x[row, p], dim=0)) for p in places]
            want = 2.0 if token in places else -max(likeness)
            assert float(got[row, token]) == pytest.approx(want, abs=1e-6)
    assert len(set(places)) == pivots, "pivots are tokens of their own"


def test_distinct_is_the_residual_that_no_pivot_says() -> None:
    """Of two tokens with one energy the one that is like a pivot loses; a pivot wins over both."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 8)
    energy = Spectrum()(x, 4, Site(0, 2))
    factor = Distinct()(x, 4, Site(0, 2)) / energy
    pivots = [4, 12]  # of 16 tokens two: the root of 4, evenly spaced
    unit = torch.nn.functional.normalize(x[0], dim=-1)
    for token in range(16):
        cosine = float((unit[pivots] @ unit[token]).max())
        assert float(factor[0, token]) == pytest.approx(3.0 if token in pivots else 1 - cosine, abs=1e-5)
