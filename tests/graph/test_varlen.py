"""Packed encoders whose attention takes its segments as a tensor, as flash attention does."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule
from luvc_fx.report import Reason
from tests.support.cases import slow_unless
from tests.support.models_qwen import qwen_inputs, tiny_qwen2_5_vl, tiny_qwen2_vl
from tests.support.replay import assert_close

NAME = "flash_of_these_tests"
"""Any name with "flash" in it makes transformers pass segments as a tensor."""
PRUNE = Schedule(prune=Prune(keep=0.5, layer=1))
MERGE = Schedule(merge=Merge("width", keep=0.5, layer=0), prune=PRUNE.prune)

_LIBRARY = torch.library.Library("luvc_fx_tests", "FRAGMENT")
_LIBRARY.define("varlen(Tensor q, Tensor k, Tensor v, Tensor ends, SymInt longest, float scale) -> Tensor")


def _varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float) -> Tensor:
    """As flash attention: q, k, v are [1, heads, P, d]; P is cut at `ends`, no piece above `longest`."""
    out = torch.empty_like(v)
    for start, end in itertools.pairwise(ends.tolist()):
        if end - start > longest:
            raise ValueError(f"a segment of {end - start} rows, of at most {longest}")
        part = (slice(None), slice(None), slice(start, end))
        out[part] = ((q[part] @ k[part].transpose(-1, -2)) * scale).softmax(-1) @ v[part]
    return out


_LIBRARY.impl("varlen", _varlen, "CompositeExplicitAutograd")
torch.library.register_fake("luvc_fx_tests::varlen", lambda q, k, v, *_: torch.empty_like(v), lib=_LIBRARY)


def varlen_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    out = torch.ops.luvc_fx_tests.varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling)
    return out.transpose(1, 2).contiguous(), None


def packed(model: Any, attention: str) -> Any:
    """`model` with this attention in its vision encoder."""
    luvc_fx.prepare(model).model.visual.config._attn_implementation = attention
    return model


SIZE = {"decoder_layers": 3, "encoder_layers": 2}
MAKERS = (tiny_qwen2_vl, tiny_qwen2_5_vl)


@pytest.fixture(params=slow_unless(MAKERS, [tiny_qwen2_5_vl]), ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """The same weights with segments as a tensor and with SDPA."""
    AttentionInterface.register(NAME, varlen_attention)
    yield packed(request.param(**SIZE), NAME), packed(request.param(**SIZE), "sdpa")
    AttentionInterface._global_mapping.pop(NAME)


ROWS = [[2, ("image", 8, 4), 1, ("image", 4, 12), 3]]
OTHER = [[2, ("image", 4, 4), 1, ("image", 8, 8), 3]]


@torch.no_grad()
def test_segments_as_a_tensor_are_one_vision_graph(pair: tuple[Any, Any]) -> None:
    """Tokens are pruned as ever; the answers are those of the same weights with SDPA."""
    varlen, twin = pair
    with (
        luvc_fx.applied(varlen, PRUNE, inner="eager", strict=True),
        luvc_fx.applied(twin, PRUNE, inner="eager"),
    ):
        report = luvc_fx.report_of(varlen)
        for number, rows in enumerate([ROWS, OTHER, ROWS]):
            batch = qwen_inputs(varlen, rows, seed=number)
            got = varlen(**batch)
            assert_close(got.logits, twin(**batch).logits, 2e-5, "logits")
            if number == 0:
                assert [graph.kind for graph in report.graphs] == ["vision", "prefill"]
                said = [m.generate(**batch, max_new_tokens=4, do_sample=False) for m in (varlen, twin)]
                assert torch.equal(*said)
        kinds = [graph.kind for graph in report.graphs]
    assert kinds.count("vision") == 2, "one for each pair of grids"
    assert set(kinds) == {"vision", "prefill", "decode"}, "nothing fell into pieces"


@torch.no_grad()
def test_its_merges_are_refused_with_a_mend(pair: tuple[Any, Any]) -> None:
    """Segments would have to shrink with the tokens, and no attention is in sight that we know."""
    varlen, twin = pair
    batch = qwen_inputs(varlen, ROWS)
    with (
        luvc_fx.applied(varlen, MERGE, inner="eager"),
        pytest.warns(LuvcWarning, match="load the model with attn_implementation='sdpa'"),
    ):
        out = varlen(**batch)
        report = luvc_fx.report_of(varlen)
    assert [r.reason for graph in report.graphs for r in graph.refusals] == [Reason.NO_ATTENTION]
    with luvc_fx.applied(twin, PRUNE, inner="eager"):
        assert_close(out.logits, twin(**batch).logits, 2e-5, "logits")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="flash_attention_2 needs a CUDA device and the package flash-attn",
)
@pytest.mark.parametrize("make", MAKERS)
@torch.no_grad()
def test_flash_attention_2(make: Any) -> None:
    """The real one: as many graphs, and the answers of SDPA in half precision."""
    models = [make(**SIZE).to("cuda", torch.bfloat16) for _ in range(2)]
    flash, twin = (packed(m, name) for m, name in zip(models, ("flash_attention_2", "sdpa"), strict=True))
    given = {k: v.to("cuda") for k, v in qwen_inputs(flash, ROWS).items()}
    given["pixel_values"] = given["pixel_values"].to(torch.bfloat16)
    schedule = Schedule(prune=Prune(keep=0.5, layer=1, selector="uniform"))
    with luvc_fx.applied(flash, schedule, strict=True), luvc_fx.applied(twin, schedule, strict=True):
        assert_close(flash(**given).logits.float(), twin(**given).logits.float(), 0.05, "logits")
        kinds = [graph.kind for graph in luvc_fx.report_of(flash).graphs]
    assert kinds == ["vision", "prefill"]
