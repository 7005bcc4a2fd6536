"""What a prefill of the decoder costs, from the sizes of a model: for schedules that nobody has traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DecoderCost:
    """Costs of the decoder layers of one model.

    Attributes:
        weights: numbers in the matrices of each decoder layer.
        width: heads times the size of a head, in the queries.
    """

    weights: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, model: Any) -> DecoderCost:
        """Read off the parameters and the text config.

        Raises:
            ValueError: a model whose decoder has no list of layers.
        """
        decoder = model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if layers is None:
            raise ValueError(f"model is a {type(model).__name__}, whose decoder has no `layers`")
        config = model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weights = tuple(sum(p.numel() for p in layer.parameters() if p.ndim == 2) for layer in layers)
        return cls(weights, config.num_attention_heads * size)

    def flops(self, rows: Sequence[int]) -> int:
        """Of a prefill with `rows` rows entering each layer, counted as the report counts.

        A matrix of n numbers is 2 n for each row, attention two products over all rows (whatever its mask).
        """
        return sum(
            2 * count * weights + 4 * count * count * self.width
            for count, weights in zip(rows, self.weights, strict=True)
        )

    def speedup(self, whole: int, rows: Sequence[int]) -> float:
        """How many times fewer FLOPs a prefill takes with `rows` entering the layers in place of `whole`."""
        return self.flops([whole] * len(self.weights)) / self.flops(rows)
