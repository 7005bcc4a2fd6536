"""The end of an answer at a text that the request names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList


class StopTexts(StoppingCriteria):
    """Ends a row once its new text holds one of `texts`.

    That of transformers looks for them in the vocabulary, which fails for tokenizers that cannot spell a text
    that it makes up, as those of whole words.

    Args:
        prompt: rows of the prompt, in which nothing is looked for.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt: int) -> None:
        self.tokenizer, self.texts, self.prompt = tokenizer, tuple(texts), prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        answers = self.tokenizer.batch_decode(input_ids[:, self.prompt :])
        done = [any(text in answer for text in self.texts) for answer in answers]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def stopping_at_texts(generate: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """`generate` that follows `stop_strings` of its generation config by `StopTexts`.

    The server's `generate` hands over a processor as its tokenizer, with which transformers fails.
    """

    def generate_to_stop(*args: Any, **kwargs: Any) -> Any:
        config: Any = kwargs.get("generation_config")
        texts = getattr(config, "stop_strings", None)
        if texts:
            config.stop_strings = None  # the server made this config for this one request
            rows = kwargs["input_ids"].shape[1]
            stop = StopTexts(tokenizer, [texts] if isinstance(texts, str) else texts, rows)
            kwargs["stopping_criteria"] = StoppingCriteriaList(
                [*(kwargs.get("stopping_criteria") or ()), stop]
            )
        return generate(*args, **kwargs)

    return generate_to_stop
