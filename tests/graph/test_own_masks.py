"""Models that make their masks before their decoder has a cache: PaliGemma, and so Gemma 3 and Molmo2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import (
    DynamicCache,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

import luvc_fx
from luvc_fx import Merge, Schedule
from tests.support.models import IMAGE, PAD, inputs, ready
from tests.support.replay import assert_close

SCHEDULE = Schedule(merge=Merge("width", keep=0.5, layer=0))


@pytest.fixture(scope="module")
def model() -> Any:
    """A random PaliGemma of 16 patches."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )
    text = GemmaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=48, hidden_size=48
    )
    return ready(PaliGemmaForConditionalGeneration(config), 0)


def asked(model: Any, masked: bool) -> dict[str, Any]:
    batch = inputs(model)
    return batch if masked else {k: v for k, v in batch.items() if k != "attention_mask"}


MASKED = pytest.mark.parametrize("masked", [True, False], ids=["a full mask", "no mask"])


@MASKED
@torch.no_grad()
def test_gaps_of_a_merge_are_no_packed_rows(model: Any, masked: bool) -> None:
    """Over a cache of the caller's, transformers reads no packed rows into the positions."""
    batch = asked(model, masked)
    stock = model(**batch).logits
    cache = DynamicCache(config=model.config.get_text_config())
    with luvc_fx.applied(model, SCHEDULE, inner="eager", strict=True):
        want = model(**batch, past_key_values=cache).logits
        got = model(**batch).logits
    assert want.shape[1] == batch["input_ids"].shape[1] - 8
    assert_close(got, want, 1e-5, "logits")
    # While 5.17 is traced, it makes a causal mask where the stock model lets all rows see each other.
    if not transformers.__version__.startswith("5.17"):
        with luvc_fx.applied(model, Schedule(), inner="eager", strict=True):
            assert_close(model(**batch).logits, stock, 1e-5, "logits of all tokens")


@MASKED
@torch.no_grad()
def test_nor_without_any_cache(model: Any, masked: bool) -> None:
    """Here the rows say themselves which of them see each other: all but the last two."""
    batch = asked(model, masked)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    batch["token_type_ids"][:, -2:] = 1
    with luvc_fx.applied(model, SCHEDULE, inner="eager", strict=True):
        want = model(**batch).logits
        assert_close(model(**batch, use_cache=False).logits, want, 1e-5, "logits")
    assert want.shape[1] == batch["input_ids"].shape[1] - 8
