"""Stock `generate` over the oracle: its choice of tokens, its beams and its turns, with LUVC's logits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from luvc_fx.schedule import Schedule
from tests.support.oracle import OracleState, oracle_continue, oracle_forward


class OracleCache(DynamicCache):
    """What stands for a conversation of the oracle; made empty, it is passed to `generate`.

    Attributes:
        state: of the oracle; None before the prompt.
        rows: of the conversation so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state: OracleState | None = None
        self.rows = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.take(beam_idx)

    def take(self, rows: Any) -> None:
        """Let the batch be these rows of it."""
        state = self.state
        assert state is not None
        for layer in state.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        state.valid = [valid[rows] for valid in state.valid]
        state.next_position = state.next_position[rows]


@contextlib.contextmanager
def over_oracle(model: Any, schedule: Schedule, **vision: Tensor) -> Iterator[Any]:
    """The forward of `model` is the oracle's, over an `OracleCache`, and else its own.

    Args:
        vision: what the prompt has beside its text; in a batch of beams each image is there for each beam.
    """
    own = model.forward

    @functools.wraps(own)
    def forward(input_ids: Tensor, past_key_values: Any = None, **given: Any) -> Any:
        cache = past_key_values
        if not isinstance(cache, OracleCache):
            return own(input_ids=input_ids, past_key_values=cache, **given)
        if cache.state is None:
            images = {
                name: value.repeat_interleave(input_ids.shape[0] // value.shape[0], 0)
                for name, value in vision.items()
            }
            text = {name: given.get(name) for name in ("attention_mask", "position_ids")}
            result = oracle_forward(model, schedule, input_ids=input_ids, **text, **images)
            cache.state, logits = result.state, result.logits
        else:
            logits = oracle_continue(model, cache.state, input_ids)
        cache.rows += input_ids.shape[1]
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    model.forward = forward
    try:
        yield model
    finally:
        del model.forward
