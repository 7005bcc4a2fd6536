"""How far a schedule moves a model's answers from those with all visual tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.generate.families import placeholders
from luvc_fx.generate.frontdoor import applied
from luvc_fx.report import unwrapped
from luvc_fx.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Answer:
    """The greedy answer to one sample.

    Attributes:
        tokens: int64 ``[steps]``.
        logits: float32 ``[steps, vocabulary]``, those that chose them.
        rows: rows of the prompt that entered each decoder layer, as its cache holds them.
    """

    tokens: Tensor
    logits: Tensor
    rows: list[int]


@dataclass(frozen=True, slots=True)
class Divergence:
    """How much the answers to some samples change under one schedule.

    Attributes:
        kl: mean over the samples of KL(all tokens || schedule) in nats: of a sample the mean over its steps
            up to the first token that differs, behind which the two have different texts in front of them.
        changed: share of the samples whose greedy answer is another.
        rows: of each sample, `Answer.rows`.
    """

    kl: float
    changed: float
    rows: list[list[int]]


@torch.inference_mode()
def greedy_answers(model: Any, samples: Sequence[Mapping[str, Any]], steps: int) -> list[Answer]:
    """Greedy answers of at most `steps` tokens.

    Raises:
        luvc_fx.NotRewritten: of a model under a strict schedule, what its graphs cannot follow.
    """
    answers = []
    for sample in samples:
        with unwrapped():
            output = model.generate(
                **sample,
                max_new_tokens=steps,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = output.sequences[0, sample["input_ids"].shape[1] :]
        held = [layer.keys.shape[-2] for layer in _compat.cache_of(output).layers]
        # The last token was chosen and not run.
        rows = [count - (len(tokens) - 1) for count in held]
        answers.append(Answer(tokens, torch.cat(output.logits).float(), rows))
    return answers


def measure_divergence(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    wanted: Sequence[Answer],
    schedule: Schedule,
    steps: int,
    inner: str,
) -> Divergence:
    """Compare `schedule` with what the model says without it; the model is restored.

    Raises:
        luvc_fx.NotRewritten: something of the schedule that the graphs cannot follow.
    """
    _compat.forget_shapes()
    with applied(model, schedule, inner=inner, strict=True):
        got = greedy_answers(model, samples, steps)
    kls, changed = zip(*(compare(a, b) for a, b in zip(wanted, got, strict=True)), strict=True)
    return Divergence(sum(kls) / len(kls), sum(changed) / len(changed), [said.rows for said in got])


def compare(wanted: Answer, got: Answer) -> tuple[float, bool]:
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


def halves(samples: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Numbers of the samples to search on, and of those held out: no image is in both.

    Raises:
        ValueError: all samples are about one image.
    """
    groups: dict[bytes, list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(_pixels_of(sample), []).append(number)
    parts = list(groups.values())
    if len(parts) < 2:
        raise ValueError("all samples are about one image; allowed: two images and more")
    searched, held_out = ([n for group in parts[first::2] for n in group] for first in (0, 1))
    return searched, held_out


def _pixels_of(sample: Mapping[str, Any]) -> bytes:
    """A hash of all floating tensors: equal for equal images."""
    hasher = hashlib.sha256()
    for name, value in sorted(sample.items()):
        if isinstance(value, Tensor) and value.is_floating_point():
            hasher.update(value.float().cpu().numpy().tobytes())
            hasher.update(name.encode())
    return hasher.digest()
