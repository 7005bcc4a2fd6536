"""Decoders that call FlashAttention: pruned layers call it on fewer rows, and answer as the oracle does."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import transformers
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule, _compat
from luvc_fx.generate.limits import has_windows
from luvc_fx.report import Reason
from tests.support import stand_in_flash
from tests.support.cases import slow_unless
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_forward, oracle_greedy
from tests.support.replay import assert_close

SCHEDULE = Schedule(
    merge=Merge("width", keep=0.5, layer=0), prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1))
)
SIZE: dict[str, Any] = {"decoder_layers": 3, "encoder_layers": 2, "grid": 4}


def flashing(**size: Any) -> Any:
    """A tiny LLaVA whose decoder calls flash-attn; its attention is switched after it was made."""
    model = tiny_llava(**{**SIZE, **size})
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    return model


def oracle_of(model: Any, schedule: Schedule, batch: dict[str, Any]) -> Any:
    """What the same weights give with SDPA."""
    config = model.config.get_text_config()
    config._attn_implementation = "sdpa"
    want = oracle_forward(model, schedule, **batch)
    return want, lambda: setattr(config, "_attn_implementation", "flash_attention_2")


class Seen:
    """An inner compiler that notes the calls of flash-attn: queries and keys, a row of the batch each."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, int, int]]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found = []
        for node in gm.graph.nodes:
            name = getattr(node.target, "__name__", "")
            if "_flash_attn" in name:
                rows = [n.meta["example_value"].shape[0] for n in node.args[:2]]
                found.append((name, *rows))
        if found:
            self.calls.append(found)
        return gm.forward


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_flash.install(monkeypatch)


ROWS: dict[str, dict[str, Any]] = {
    "a row": {},
    "left padding": {"batch": 2, "padding": (0, 3)},
}


@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_pruned_layers_call_it_on_fewer_rows(rows: str) -> None:
    model, seen = flashing(), Seen()
    batch = inputs(model, **ROWS[rows])
    want, switch = oracle_of(model, SCHEDULE, batch)
    answer = oracle_greedy(model, want, 6)
    want, _ = oracle_of(model, SCHEDULE, batch)
    switch()
    with luvc_fx.applied(model, SCHEDULE, inner=seen, strict=True):
        out = model(**batch)
        padding = (batch["attention_mask"] == 0).sum(1, keepdim=True)
        real = torch.arange(want.logits.shape[1]) >= padding
        assert_close(out.logits[real], want.logits[real], 2e-5, "logits")
        told = model.generate(**batch, max_new_tokens=6, do_sample=False)
        report = luvc_fx.report_of(model)
    assert torch.equal(told[:, batch["input_ids"].shape[1] :], answer)
    prefill = report.of_kind("prefill")[0]
    count = len(batch["input_ids"])
    assert seen.calls[0] == [("_flash_attn_varlen_forward", count * n, count * n) for n in want.kv_lengths]
    assert len(set(want.kv_lengths)) == 3
    held = [layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers]
    assert prefill.kv_bytes_after == held
    assert 0 < prefill.flops_after < prefill.flops_before
    assert [g.kind for g in report.graphs].count("prefill") <= 2
    assert {g.kind for g in report.graphs} == {"vision", "prefill", "decode"}, "nothing fell into pieces"


@pytest.mark.slow
@torch.no_grad()
def test_a_second_turn_sees_what_is_left_of_the_first() -> None:
    """Several queries over caches of several lengths: the last query lies beside the last key."""
    model = flashing()
    batch = inputs(model)
    turn = torch.tensor([[5, 6, 7]])
    schedule = Schedule(prune=SCHEDULE.prune)
    logits = []
    for name in ("sdpa", "flash_attention_2"):
        model.config.get_text_config()._attn_implementation = name
        with luvc_fx.applied(model, schedule, inner="eager", strict=True):
            cache = DynamicCache(config=model.config.get_text_config())
            model(**batch, past_key_values=cache)
            logits.append(model(input_ids=turn, past_key_values=cache).logits)
    assert_close(logits[1], logits[0], 2e-5, "logits")


@pytest.mark.slow
@torch.no_grad()
def test_fastv_looks_at_the_last_query() -> None:
    """As with SDPA, which is held against transformers' own weights elsewhere."""
    schedule = Schedule(prune=Prune(tokens=5, layer=1, selector="fastv"))
    model, rows = flashing(), []
    batch = inputs(model, batch=2, padding=(0, 3))
    for name in ("sdpa", "flash_attention_2"):
        model.config.get_text_config()._attn_implementation = name
        with luvc_fx.applied(model, schedule, inner="eager", strict=True):
            rows.append(model(**batch).row_index)
    assert torch.equal(rows[1], rows[0])
    assert rows[0].shape[1] < batch["input_ids"].shape[1]


@torch.no_grad()
def test_without_a_mask_under_the_backend() -> None:
    """The whole model in one graph: plain calls, each on the rows of its layer."""
    model, seen = flashing(), Seen()
    batch = {k: v for k, v in inputs(model, batch=2).items() if k != "attention_mask"}
    want, switch = oracle_of(model, SCHEDULE, batch)
    switch()
    backend = luvc_fx.backend(SCHEDULE, inner=seen, strict=True)
    out = torch.compile(luvc_fx.prepare(model), backend=backend)(**batch)
    assert_close(out.logits, want.logits, 2e-5, "logits")
    (calls,) = seen.calls
    assert {name for name, *_ in calls} == {"_flash_attn_forward"}
    assert out.past_key_values.layers[-1].keys.shape[-2] == want.kv_lengths[-1]


LIMITS: dict[str, tuple[Reason, dict[str, Any], str]] = {
    "static": (Reason.CACHE, {"cache_implementation": "static"}, "a static cache under FlashAttention"),
    "holes": (Reason.INPUTS, {}, "more than left padding"),
}


@pytest.mark.parametrize("name", slow_unless(LIMITS, ["holes"]))
@torch.no_grad()
def test_what_it_cannot_do_has_a_reason(name: str) -> None:
    reason, options, text = LIMITS[name]
    model = flashing()
    batch = inputs(model, batch=2, padding=(0, 3))
    if name == "holes":
        batch["attention_mask"][0, -2] = 0
    with luvc_fx.applied(model, SCHEDULE, inner="eager"), pytest.warns(LuvcWarning, match=text):
        model.generate(**batch, max_new_tokens=2, do_sample=False, **options)
        assert reason in [refusal.reason for refusal in luvc_fx.report_of(model).refusals]


UNFOLLOWED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a later version": ("flash_attention_3", {}, "'flash_attention_3' is not a call of the package"),
    "no package": ("flash_attention_2", {}, "'flash_attention_2' is not a call of the package"),
    "a window": ("flash_attention_2", {"sliding_window": 4}, "sliding windows under FlashAttention"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNFOLLOWED)
@torch.no_grad()
def test_calls_that_cannot_be_followed_run_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, settings, text = UNFOLLOWED[name]
    stand_in_flash.install(monkeypatch, attention)
    if name == "no package":
        monkeypatch.setattr("luvc_fx._compat.transformers._has_flash_attn", lambda: False)
    model = flashing()
    config = model.config.get_text_config()
    config._attn_implementation = attention
    for key, given in settings.items():
        setattr(config, key, given)
    batch = inputs(model)
    stock = model(**batch, use_cache=False).logits
    answer = model.generate(**batch, max_new_tokens=2, do_sample=False)
    with luvc_fx.applied(model, SCHEDULE, inner="eager"), pytest.warns(LuvcWarning, match=text):
        assert_close(model(**batch, use_cache=False).logits, stock, 2e-5, "logits")
        assert torch.equal(model.generate(**batch, max_new_tokens=2, do_sample=False), answer)
        assert luvc_fx.report_of(model).refusals[0].reason is Reason.NO_ATTENTION


def test_a_window_that_is_not_used_is_none() -> None:
    config = flashing().config.get_text_config()
    assert not has_windows(config)
    config.sliding_window = 4
    assert has_windows(config)
    config.use_sliding_window = False
    assert not has_windows(config)
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    assert has_windows(config)


@pytest.mark.parametrize("reads", [True, False])
@torch.no_grad()
def test_the_position_of_one_query_is_not_read(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 reads it in every layer, unless a step says its segments."""
    monkeypatch.setattr(_compat, "reads_one_position", lambda: reads)
    model, seen = flashing(), Seen()
    batch = inputs(model)
    cache = DynamicCache(config=model.config.get_text_config())
    with luvc_fx.applied(model, Schedule(prune=SCHEDULE.prune), inner=seen, strict=True):
        model(**batch, past_key_values=cache)
        seen.calls.clear()
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    (calls,) = seen.calls
    assert {name for name, *_ in calls} == {"_flash_attn_varlen_forward" if reads else "_flash_attn_forward"}


def test_whether_transformers_reads_it() -> None:
    """5.23 looks at the shape first."""
    known = {"5.17": True, "5.23": False}.get(transformers.__version__[:4])
    if known is None:
        pytest.skip("nobody looked at this version")
    assert _compat.reads_one_position() == known


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_PACKAGE = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="flash_attention_2 needs a CUDA device and the package flash-attn",
)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "attn", [pytest.param("sdpa", marks=NO_GPU), pytest.param("flash_attention_2", marks=NO_PACKAGE)]
)
@torch.no_grad()
def test_on_a_gpu(attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real kernels, in half precision; SDPA may use no other than its flash kernel."""
    monkeypatch.undo()  # the stand-in
    schedule = Schedule(prune=Prune(keep=0.5, layer=1, selector="uniform"))
    model = tiny_llava(**SIZE).to("cuda", torch.bfloat16)
    batch = {k: v.to("cuda") for k, v in inputs(model).items()}
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    want = oracle_forward(model, schedule, **batch).logits
    model.config.get_text_config()._attn_implementation = attn
    with luvc_fx.applied(model, schedule, strict=True), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert_close(model(**batch).logits.float(), want.float(), 0.05, "logits")
        assert [graph.kind for graph in luvc_fx.report_of(model).graphs] == ["vision", "prefill"]
