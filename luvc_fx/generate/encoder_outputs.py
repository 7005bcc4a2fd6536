"""What an encoder returns: which of it are the features, and a copy of it with others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

LateFeatures = dict[str, list[Tensor]]
"""Features that enter the decoder late, by the attribute of the encoder's output; each level ``[N, D]``."""

TOWER_STATES = ("last_hidden_state", "hidden_states", "attentions")
"""What a tower leaves beside its features: no forward asks for it, and it keeps layers that nothing needs."""


def features_of(output: Any) -> Any:
    """The features that stand for placeholders, or None where the output has none of a known form.

    ``[images, n, D]``, ``[N, D]``, or a sequence of ``[n, D]``. Dynamo traces this.
    """
    features = getattr(output, "pooler_output", None)
    if isinstance(features, Tensor):
        return features if features.dim() in (2, 3) else None
    if not isinstance(features, (list, tuple)) or len(features) == 0:
        return None
    return features if all(isinstance(part, Tensor) and part.dim() == 2 for part in features) else None


def parts_of(features: Any) -> list[Tensor]:
    """Features as a list of ``[n, D]``, one for each image where they tell."""
    return [features] if isinstance(features, Tensor) and features.dim() == 2 else list(features)


def flat_level(level: Any) -> Tensor:
    """One level of late features, a tensor or one tensor for each image, as ``[N, D]``."""
    return level.flatten(0, -2) if isinstance(level, Tensor) else torch.cat(list(level))


def _in_form(given: Any, levels: list[Tensor]) -> list[Any]:
    """Levels of late features in the form of those given: a tensor (5.17), or one for each image (5.23)."""
    return [new if isinstance(old, Tensor) else (new,) for old, new in zip(given, levels, strict=True)]


def with_features(output: Any, features: Any, late: LateFeatures) -> Any:
    """A copy of an encoder's output with these features, and without the states of the tower.

    Args:
        late: takes the place of what the output has by these names; others stay.
    """
    levels = {name: _in_form(getattr(output, name), found) for name, found in late.items()}
    if not isinstance(output, ModelOutput):
        return encoder_output(features, late)
    fields = {name: output[name] for name in output.keys() if name not in TOWER_STATES}  # noqa: SIM118
    return type(output)(**{**fields, "pooler_output": features, **levels})


def encoder_output(features: Any, late: LateFeatures | None = None) -> Any:
    """Features as an encoder of transformers returns them, and as `generate` passes them to `forward`.

    Args:
        features: ``[N, D]`` each, or ``[images, n, D]``.
        late: see `Family.late_features`.
    """
    output = BaseModelOutputWithPooling(pooler_output=features)
    for name, levels in (late or {}).items():
        setattr(output, name, [(level,) for level in levels])
    return output
