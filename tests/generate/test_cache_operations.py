"""Operations on a cache with dropped rows: what is known of each row goes with it, or a name says why not.

The batch has a row with an image and one without, which lost left padding in its place. Each row equals the
oracle of that row alone.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from tests.support.cases import slow_unless
from tests.support.models import PAD, inputs, tiny_llava
from tests.support.oracle import oracle_continue, oracle_forward, oracle_greedy
from tests.support.over_oracle import OracleCache, over_oracle

SCHEDULE = Schedule(
    merge=(Merge("width", keep=0.5, layer=0),),
    prune=(Prune(keep=0.5, layer=1), Prune(keep=0.25, layer=2)),
)
NEW_TOKENS = 3
ROOM = 48
TURN = torch.tensor([[7, 9, 11], [8, 10, 12]])


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    made = tiny_llava(decoder_layers=3, encoder_layers=2, grid=4)
    luvc_fx.compile(made, SCHEDULE, inner="eager", strict=True)
    with torch.no_grad():
        yield made
    luvc_fx.restore(made)


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny_llava(decoder_layers=3, encoder_layers=2, grid=4)


def empty(kind: type[Any], model: Any) -> Any:
    config = model.config.get_text_config()
    return kind(config=config, max_cache_len=ROOM) if kind is StaticCache else kind(config=config)


def batch(model: Any) -> dict[str, Tensor]:
    """A row with an image, and one of text that is padded to its length."""
    prompt = inputs(model)
    ids, mask = prompt["input_ids"].repeat(2, 1), prompt["attention_mask"].repeat(2, 1)
    text = ids[1] != model.config.image_token_id
    padding = int((~text).sum())
    ids[1] = torch.cat([torch.full((padding,), PAD), ids[1][text] + 1])
    mask[1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": prompt["pixel_values"]}


def alone(prompt: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    ids = prompt["input_ids"][row][prompt["attention_mask"][row].bool()][None]
    return {"input_ids": ids, **({"pixel_values": prompt["pixel_values"]} if row == 0 else {})}


class Conversation:
    """The first turn of a batch over a cache, and the oracle's states of its rows."""

    def __init__(self, model: Any, stock: Any, kind: type[Any]) -> None:
        prompt = batch(model)
        self.cache = empty(kind, model)
        self.said = model.generate(
            **prompt, past_key_values=self.cache, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        self.mask = torch.nn.functional.pad(prompt["attention_mask"], (0, NEW_TOKENS), value=1)
        self.states = []
        for row in range(2):
            first = oracle_forward(stock, SCHEDULE, **alone(prompt, row))
            answer = oracle_greedy(stock, first, NEW_TOKENS)
            assert torch.equal(self.said[row : row + 1, -NEW_TOKENS:], answer)
            self.states.append(first.state)

    def ask(self, rows: list[int]) -> dict[str, Tensor]:
        """The prompt of a second turn of a batch of these rows, with some new text each."""
        ids = torch.cat([self.said, TURN], dim=1)[rows]
        return {"input_ids": ids, "attention_mask": torch.nn.functional.pad(self.mask, (0, 3), value=1)[rows]}

    def wanted(self, stock: Any, rows: list[int]) -> Tensor:
        """The oracle's logits behind it ``[len(rows), vocabulary]``."""
        asked = torch.cat([self.said[:, -1:], TURN], dim=1)
        logits = [oracle_continue(stock, self.states[row].clone(), asked[row][None])[0, -1] for row in rows]
        return torch.stack(logits)


@pytest.fixture(scope="module")
def conversations(model: Any, stock: Any) -> dict[type[Any], Conversation]:
    return {kind: Conversation(model, stock, kind) for kind in (DynamicCache, StaticCache)}


def next_logits(model: Any, cache: Any, prompt: dict[str, Tensor]) -> Tensor:
    out = model.generate(
        **prompt,
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.logits[0]


def reordered(*rows: int) -> Callable[[Any], Any]:
    def operate(cache: Any) -> Any:
        cache.reorder_cache(torch.tensor(rows))
        return cache

    return operate


def selected(rows: Any) -> Callable[[Any], Any]:
    def operate(cache: Any) -> Any:
        cache.batch_select_indices(rows)
        return cache

    return operate


def repeated(then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def operate(cache: Any) -> Any:
        cache.batch_repeat_interleave(2)
        return then(cache)

    return operate


def saved(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def as_it_is(cache: Any) -> Any:
    return cache


OPERATIONS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "copied": (as_it_is, [0, 1]),  # as each of these caches is
    "swapped": (reordered(1, 0), [1, 0]),
    "one twice": (reordered(1, 1), [1, 1]),
    "pickled": (lambda cache: pickle.loads(pickle.dumps(cache)), [0, 1]),
    "saved": (saved, [0, 1]),
    "swapped and saved": (lambda cache: saved(reordered(1, 0)(cache)), [1, 0]),
    "selected": (selected(torch.tensor([1])), [1]),
    "selected by a mask": (selected(torch.tensor([False, True])), [1]),
    "the one with an image": (selected([0]), [0]),
    "selected from the end": (selected([-1, 0]), [1, 0]),
    "repeated": (repeated(as_it_is), [0, 0, 1, 1]),
    "beams": (repeated(reordered(3, 2, 1, 0)), [1, 1, 0, 0]),
    "contrastive search": (repeated(selected(torch.tensor([3, 0]))), [1, 0]),
}
OF_STATIC_CACHES = ("copied", "swapped", "one twice", "pickled", "saved", "swapped and saved")


@pytest.mark.parametrize(
    ("kind", "name"),
    slow_unless(
        [(DynamicCache, name) for name in OPERATIONS] + [(StaticCache, name) for name in OF_STATIC_CACHES],
        [
            *((DynamicCache, name) for name in ("copied", "swapped", "selected", "contrastive search")),
            (StaticCache, "swapped and saved"),
        ],
    ),
)
def test_what_is_known_of_a_row_goes_with_it(
    model: Any, stock: Any, conversations: Any, kind: type[Any], name: str
) -> None:
    talk = conversations[kind]
    operate, rows = OPERATIONS[name]
    cache = operate(copy.deepcopy(talk.cache))
    got = next_logits(model, cache, talk.ask(rows))
    torch.testing.assert_close(got, talk.wanted(stock, rows), atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["batch_select_indices", "batch_repeat_interleave"])
def test_what_static_caches_have_not_is_the_stock_error(
    model: Any, stock: Any, conversations: Any, operation: str
) -> None:
    talk = conversations[StaticCache]
    cache, own = copy.deepcopy(talk.cache), empty(StaticCache, stock)
    stock(**batch(stock), past_key_values=own)
    errors = []
    for one in (own, cache):
        with pytest.raises(AttributeError) as raised:
            getattr(one, operation)(1)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    got = next_logits(model, cache, talk.ask([0, 1]))
    torch.testing.assert_close(got, talk.wanted(stock, [0, 1]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", slow_unless([DynamicCache, StaticCache], [DynamicCache]))
def test_beams_of_a_later_turn(model: Any, stock: Any, conversations: Any, kind: type[Any]) -> None:
    """Each step reorders the cache, in which the rows of both prompts move among themselves only."""
    talk = conversations[kind]
    options = {"num_beams": 2, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    cache = reordered(0, 0, 1, 1)(copy.deepcopy(talk.cache))
    prompt = talk.ask([0, 1])
    said = model.generate(**prompt, past_key_values=cache, **options)[:, -NEW_TOKENS:]
    for row in range(2):
        ids = prompt["input_ids"][row][prompt["attention_mask"][row].bool()][None]
        own = OracleCache()
        own.state, own.rows = talk.states[row].clone(), ids.shape[1] - TURN.shape[1] - 1
        own.take([0, 0])
        with over_oracle(stock, SCHEDULE):
            wanted = stock.generate(input_ids=ids, past_key_values=own, **options)
        assert torch.equal(said[row], wanted[0, -NEW_TOKENS:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_prefix_is_used_again(model: Any, stock: Any, kind: type[Any]) -> None:
    """As in transformers' documentation: the cache of a prompt, copied for each question behind it."""
    prompt = inputs(model)
    first = oracle_forward(stock, SCHEDULE, **prompt)
    prefix = model(**prompt, past_key_values=empty(kind, model)).past_key_values
    for question in TURN:
        ids = torch.cat([prompt["input_ids"], question[None]], dim=1)
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got = next_logits(model, copy.deepcopy(prefix), asked)
        wanted = oracle_continue(stock, first.state.clone(), question[None])[:, -1]
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    assert int(prefix.get_seq_length()) == prompt["input_ids"].shape[1]


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_that_was_reset_is_a_stock_cache(
    model: Any, stock: Any, conversations: Any, kind: type[Any]
) -> None:
    talk = conversations[kind]
    cache = copy.deepcopy(talk.cache)
    cache.reset()
    assert type(cache) is kind
    assert int(cache.get_seq_length()) == 0
    text = talk.ask([0, 1])["input_ids"][:, -8:]
    over_reset = stock(input_ids=text, past_key_values=cache).logits
    assert torch.equal(over_reset, stock(input_ids=text, past_key_values=empty(kind, model)).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_that_was_reset_holds_another_conversation(
    model: Any, conversations: Any, kind: type[Any]
) -> None:
    talk = conversations[kind]
    cache = copy.deepcopy(talk.cache)
    cache.reset()
    said = model.generate(**batch(model), past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(said, talk.said)


def test_what_would_lose_rows_is_refused_by_name(model: Any, conversations: Any) -> None:
    talk = conversations[DynamicCache]
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        copy.deepcopy(talk.cache).crop(-1)
    with pytest.raises(NotImplementedError, match=r"made anew from its keys and values; copy it"):
        DynamicCache(talk.cache)
    by_hand = copy.deepcopy(talk.cache)
    for layer in by_hand.layers:
        layer.keys, layer.values = layer.keys[1:], layer.values[1:]
    with pytest.raises(NotImplementedError, match=r"1 rows over a shortened cache of 2, .*reorder_cache"):
        next_logits(model, by_hand, talk.ask([1]))
