"""Generation over every cache, attention, padding and turn: token for token the eager oracle's.

A case is a conversation: the prompt with its images, `NEW_TOKENS` greedy tokens, a second turn of text over
the same cache, and as many tokens again. `test_later_images` has a third turn with an image of its own.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.generate.cache import PrunedCache, PrunedStaticCache
from luvc_fx.report import Report
from tests.support.cases import slow_unless
from tests.support.family_matrix import FAMILIES, Batch, first_input, prompt_of
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_continue, oracle_forward, oracle_greedy
from tests.support.oracle.decode import OracleState
from tests.support.oracle.positions import generate_positions

FAMILY = ("llava", "internvl", "qwen2")
ATTENTION = ("sdpa", "eager")
NEW_TOKENS = 32
TURN = [7, 9, 11]
ROOM = 160

SCHEDULES = {
    "cascade": Schedule(
        merge=(Merge("width", keep=0.5, layer=0), Merge("height", keep=0.75, layer=1)),
        prune=(Prune(keep=0.5, layer=1), Prune(keep=0.25, layer=2)),
    ),
    "merged": Schedule(merge=Merge("width", keep=0.5, layer=0)),
    "none at the last": Schedule(prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1))),
}
ROWS = {"a row": None, "two rows, left padding": "two rows, left padding"}


def conversation(family: str, rows: str | None) -> Batch:
    return prompt_of(family, rows or first_input(family))


def static_cache(model: Any) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=ROOM)


def dynamic_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())


CACHES = {"dynamic": dynamic_cache, "static": static_cache}


def positions(batch: Batch) -> dict[str, Tensor]:
    """What `generate` counts from the mask; M-RoPE's own positions are those of the forward."""
    own = any(name in batch for name in ("image_grid_thw", "video_grid_thw"))
    return {} if own else {"position_ids": generate_positions(batch["attention_mask"])}


def oracle_turns(model: Any, schedule: Schedule, batch: Batch) -> tuple[Tensor, Tensor, OracleState]:
    """The answers to both turns, and what is held after the second."""
    first = oracle_forward(model, schedule, **{**batch, **positions(batch)})
    answer = oracle_greedy(model, first, NEW_TOKENS)
    turn = torch.cat([answer[:, -1:], torch.tensor([TURN]).expand(len(answer), -1)], dim=1)
    logits, second = oracle_continue(model, first.state, turn), []
    for step in range(NEW_TOKENS):
        second.append(logits[:, -1].argmax(-1))
        if step + 1 < NEW_TOKENS:
            logits = oracle_continue(model, first.state, second[-1][:, None])
    return answer, torch.stack(second, dim=1), first.state


def spoken(model: Any, batch: Batch, cache: Any) -> Tensor:
    told = model.generate(**batch, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    return told[:, batch["input_ids"].shape[1] :]


def second_turn(batch: Batch, answer: Tensor) -> Batch:
    """The whole conversation so far and one turn more, without images."""
    turn = torch.cat([answer, torch.tensor([TURN]).expand(len(answer), -1)], dim=1)
    ids = torch.cat([batch["input_ids"], turn], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(turn)], dim=1),
    }


def kinds(report: Report) -> list[str]:
    return [graph.kind for graph in report.graphs]


def cases() -> list[Any]:
    row, two = ROWS
    # Each property once; the slow rest crosses them.
    once = [
        ("llava", "static", "eager", two),
        ("internvl", "static", "sdpa", row),
        ("qwen2", "dynamic", "sdpa", two),
    ]
    every = itertools.product(FAMILY, CACHES, ATTENTION, ROWS, SCHEDULES)
    return slow_unless(every, [(*case, "cascade") for case in once])


@pytest.mark.parametrize(("family", "cache", "attn", "rows", "name"), cases())
@torch.no_grad()
def test_conversation(family: str, cache: str, attn: str, rows: str, name: str) -> None:
    model = FAMILIES[family].make(**FAMILIES[family].size, attn=attn)
    batch, schedule = conversation(family, ROWS[rows]), SCHEDULES[name]
    first, second, state = oracle_turns(model, schedule, batch)
    held = CACHES[cache](model)
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        answer = spoken(model, batch, held)
        assert torch.equal(answer, first)
        report = luvc_fx.report_of(model)
        decoded = kinds(report).count("decode")
        assert decoded == (1 if cache == "static" else 2), "the first cache, and any longer one"
        turn = second_turn(batch, answer)
        assert torch.equal(spoken(model, turn, held), second)
        assert kinds(report).count("decode") <= decoded + 2, "only the text of the turn itself is new"
    assert isinstance(held, PrunedStaticCache if cache == "static" else PrunedCache)
    assert int(held.get_seq_length()) == turn["input_ids"].shape[1] + NEW_TOKENS - 1
    lengths = [len(valid[0]) for valid in state.valid]
    assert [int(layer.get_seq_length()) for layer in held.layers] == lengths
    if cache == "static":
        spared = [ROOM - layer.keys.shape[-2] for layer in held.layers]
        assert spared == [int(held.get_seq_length()) - length for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_conversation_under_inductor(cache: str) -> None:
    model = FAMILIES["qwen2"].make(**FAMILIES["qwen2"].size)
    batch, schedule = conversation("qwen2", "two rows, left padding"), SCHEDULES["cascade"]
    first, second, _ = oracle_turns(model, schedule, batch)
    held = CACHES[cache](model)
    with luvc_fx.applied(model, schedule, strict=True):
        answer = spoken(model, batch, held)
        assert torch.equal(answer, first)
        assert torch.equal(spoken(model, second_turn(batch, answer), held), second)


@pytest.mark.parametrize(
    ("inner", "attn"), slow_unless(itertools.product(["eager", "inductor"], ATTENTION), [("eager", "eager")])
)
@torch.no_grad()
def test_static_cache_with_the_video_preset_against_no_cache(attn: str, inner: str) -> None:
    """Each step's logits are those of one pass over the whole conversation, without any cache."""
    model = tiny_llava(decoder_layers=6, encoder_layers=4, attn=attn)
    batch, schedule = inputs(model, batch=2, padding=(0, 3)), Schedule.of("video")
    with luvc_fx.applied(model, schedule, inner=inner, strict=True):
        out = model.generate(
            **batch,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            cache_implementation="static",
            return_dict_in_generate=True,
            output_logits=True,
        )
        (prefill,) = luvc_fx.report_of(model).of_kind("prefill")
    assert len(set(prefill.tokens_per_layer)) > 2, "layers of several lengths"
    said = out.sequences[:, batch["input_ids"].shape[1] : -1]
    ids = torch.cat([batch["input_ids"], said], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(said)], dim=1)
    whole = {**batch, "input_ids": ids, "attention_mask": mask, "position_ids": generate_positions(mask)}
    want = oracle_forward(model, schedule, **whole).logits[:, -NEW_TOKENS:]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "attn"),
    slow_unless(itertools.product(FAMILY, ATTENTION), [("qwen2", "sdpa")]),
)
@torch.no_grad()
def test_later_images(family: str, attn: str) -> None:
    """Three turns with an image each, the later ones over what is left of the earlier: logits and rows."""
    model = FAMILIES[family].make(**FAMILIES[family].size, attn=attn)
    batch, schedule = conversation(family, None), SCHEDULES["cascade"]
    want = oracle_forward(model, schedule, **batch)
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        out = model(**batch)
        for number in range(3):
            given = longer(batch, number)
            held = out.past_key_values.get_seq_length()
            start = want.state.next_position.view(1, -1, 1)
            places = positions_of(model, given) + (start if family == "qwen2" else start[0])
            want = oracle_forward(model, schedule, past=want.state, position_ids=places, **given)
            seen = torch.ones(1, held + given["input_ids"].shape[1], dtype=torch.int64)
            given = {**given, "attention_mask": seen, "position_ids": places}
            out = model(**given, past_key_values=out.past_key_values)
            torch.testing.assert_close(out.logits, want.logits, atol=1e-5, rtol=1e-5)
            assert torch.equal(out.row_index, want.rows)
            lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
            assert lengths == want.kv_lengths
        report = luvc_fx.report_of(model)
    assert [graph.tokens_per_layer for graph in report.of_kind("prefill")] == 3 * [want.tokens_per_layer]
    # Over nothing, over a cache, over any cache and text: the third later turn is no new graph.
    assert kinds(report).count("prefill") == 3


def longer(batch: Batch, more: int) -> Batch:
    front = torch.full((1, more), 5)
    made = {**batch, "input_ids": torch.cat([front, batch["input_ids"]], dim=1)}
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    if "mm_token_type_ids" in batch:
        made["mm_token_type_ids"] = torch.cat([torch.zeros_like(front), batch["mm_token_type_ids"]], dim=1)
    return made


def positions_of(model: Any, batch: Batch) -> Tensor:
    """Of the new rows, counted from 0."""
    if "image_grid_thw" not in batch:
        return torch.arange(batch["input_ids"].shape[1])[None]
    own: Tensor = model.model.get_rope_index(
        batch["input_ids"],
        image_grid_thw=batch["image_grid_thw"],
        mm_token_type_ids=batch["mm_token_type_ids"],
    )[0]
    return own
