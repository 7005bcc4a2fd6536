"""How far a schedule takes a model from what it says with all its visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import luvc_fx
from luvc_fx import _compat
from luvc_fx.encoders import placeholders
from luvc_fx.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Said:
    """What the model generates for one sample.

    Attributes:
        tokens: int64 ``[steps]``.
        logits: float32 ``[steps, vocabulary]``, those that chose them.
    """

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Heard:
    """One schedule on some samples.

    Attributes:
        kl: mean over the samples of KL(all tokens || schedule) in nats: of a sample the mean over its steps
            up to the first token that differs, behind which the two have different texts in front of them.
        changed: share of the samples whose greedy answer is another.
        tokens: visual tokens entering each decoder layer, in the last sample.
    """

    kl: float
    changed: float
    tokens: list[int]


@torch.inference_mode()
def say(model: Any, samples: Sequence[Mapping[str, Any]], steps: int) -> list[Said]:
    """Greedy answers of at most `steps` tokens."""
    found = []
    for sample in samples:
        output = model.generate(
            **sample,
            max_new_tokens=steps,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        start = sample["input_ids"].shape[1]
        found.append(Said(output.sequences[0, start:], torch.cat(output.logits).float()))
    return found


def hear(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    wanted: Sequence[Said],
    schedule: Schedule,
    steps: int,
    inner: str,
) -> Heard:
    """Compare `schedule` with what the model says without it; the model is restored.

    Raises:
        luvc_fx.NotRewritten: something of the schedule that the graphs cannot follow.
    """
    _compat.forget_shapes()
    with luvc_fx.applied(model, schedule, inner=inner, strict=True):
        got = say(model, samples, steps)
        tokens = luvc_fx.report_of(model).tokens_per_layer()
    kls, changed = zip(*(_compare(a, b) for a, b in zip(wanted, got, strict=True)), strict=True)
    return Heard(sum(kls) / len(kls), sum(changed) / len(changed), tokens)


def _compare(wanted: Said, got: Said) -> tuple[float, bool]:
    """KL, and whether the answers differ. One that ends earlier differs in its last token."""
    steps = min(len(wanted.tokens), len(got.tokens))
    differs = wanted.tokens[:steps] != got.tokens[:steps]
    same_past = differs.cumsum(0) - differs.long() == 0
    log_p = wanted.logits[:steps].log_softmax(-1)
    log_q = got.logits[:steps].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl[same_past].mean().item(), bool(differs.any())


def sizes(model: Any, sample: Mapping[str, Any]) -> tuple[int, int]:
    """Visual tokens and rows of text of a sample.

    Raises:
        ValueError: a sample that is not one prompt with visual tokens.
    """
    ids = sample.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        what = "nothing" if ids is None else f"{type(ids).__name__} {list(getattr(ids, 'shape', []))}"
        raise ValueError(f"a sample's input_ids are {what}; allowed: a tensor [1, rows], one prompt a sample")
    visual = int(placeholders(model, ids).sum())
    if not visual:
        raise ValueError("a sample has no visual tokens; allowed: prompts with an image or a video")
    return visual, ids.shape[1] - visual
