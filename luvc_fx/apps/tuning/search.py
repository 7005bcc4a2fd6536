"""`luvc_fx.tune`: draw schedules of the right cost, and keep the better half until one is left."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from luvc_fx.apps.tuning.candidates import at_random, drawn
from luvc_fx.apps.tuning.divergence import Answer, greedy_answers, halves, measure_divergence, sizes
from luvc_fx.apps.tuning.flops import DecoderCost
from luvc_fx.methods.checks import check_module, check_whole, is_number, refuse
from luvc_fx.report import NotRewritten
from luvc_fx.schedule import KINDS, Schedule

PRESETS = {name: Schedule.preset(name) for name in KINDS}

LADDER = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0)
"""Speed-ups that a search for the fastest harmless schedule goes through."""

LEAST_SAMPLES = 8

TOLERANCE = 0.99
"""Merges and counts round: so much of the speed-up asked for is enough."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One schedule, with its measured speed-up and divergence.

    Attributes:
        speedup: FLOPs of the decoder's prefills of these samples with all tokens over those with the
            schedule, from the rows that really entered its layers.
        kl, changed: of `luvc_fx.apps.tuning.divergence.Divergence`.
        samples: on how many.
    """

    schedule: Schedule
    speedup: float
    kl: float
    changed: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "schedule": json.loads(self.schedule.to_json())}


@dataclass(frozen=True, slots=True)
class Tuned:
    """The result of a search.

    Attributes:
        schedule: the best one; the empty schedule where even the smallest speed-up costs too much.
        held_out: the best one on samples about images that took no part in the search; None for the empty
            schedule.
        compared: on the same samples the presets, and the best schedule with tokens at random.
        trials: everything that was tried, in order, on samples of the search.
        left_out: schedules that the model's graphs cannot follow, and why.
    """

    schedule: Schedule
    held_out: Trial | None
    compared: dict[str, Trial]
    trials: tuple[Trial, ...]
    left_out: tuple[tuple[Schedule, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "schedule": json.loads(self.schedule.to_json()),
            "held_out": None if self.held_out is None else self.held_out.to_dict(),
            "compared": {name: trial.to_dict() for name, trial in self.compared.items()},
            "trials": [trial.to_dict() for trial in self.trials],
            "left_out": [{"schedule": json.loads(s.to_json()), "why": why} for s, why in self.left_out],
        }

    def __str__(self) -> str:
        rows = {**({} if self.held_out is None else {"tuned": self.held_out}), **self.compared}
        lines = [f"{len(self.trials)} trials, {len(self.left_out)} schedules left out"]
        lines += [
            f"{name}: {trial.speedup:.2f}x fewer FLOPs in the prefill, KL {trial.kl:.4f}, "
            f"{trial.changed:.1%} of {trial.samples} answers changed"
            for name, trial in rows.items()
        ]
        return "\n".join(lines)


def tune(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    target_speedup: float | None = None,
    max_loss: float | None = None,
    candidates: int = 16,
    new_tokens: int = 8,
    inner: str = "eager",
    seed: int = 0,
    say_so: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Find a schedule for `model` on samples of your own, which need no answers.

    Candidates are cascades whose FLOPs, counted from the model's sizes, promise the speed-up. All are
    tried on a few samples, the better half of them on twice as many, and so on until one is left
    (successive halving, Jamieson and Talwalkar, arXiv 1502.07943). The better one is that with the smaller
    KL from the model with all its tokens. The samples of every other image are held out.

    Args:
        model: a model of transformers, as for `luvc_fx.compile`; it is as before in the end.
        samples: at least 8 about two images or more, each what the processor returns for one prompt, on the
            model's device.
        target_speedup: of the decoder's prefill, in FLOPs: the best schedule that is at least as fast.
        max_loss: share of the greedy answers that may change: the fastest schedule that keeps to it on the
            samples of the search. Give either this or `target_speedup`.
        candidates: schedules to begin with, for each speed-up.
        new_tokens: of an answer, at most.
        inner: as of `luvc_fx.compile`; how fast it is plays no part in the search.
        say_so: called with one line about each step.

    Raises:
        ValueError: an argument or a sample that is not allowed, or no candidate that the graphs can follow.

    >>> tuned = luvc_fx.tune(model, samples, target_speedup=2.0)  # doctest: +SKIP
    >>> luvc_fx.compile(model, tuned.schedule)  # doctest: +SKIP
    """
    if (target_speedup is None) == (max_loss is None):
        raise ValueError("allowed: either target_speedup or max_loss, and not both")
    if target_speedup is not None and not (is_number(target_speedup) and target_speedup > 1.0):
        refuse("", "target_speedup", target_speedup, "above 1")
    if max_loss is not None and not (is_number(max_loss) and 0.0 <= max_loss < 1.0):
        refuse("", "max_loss", max_loss, "at least 0 and below 1")
    check_whole("", "candidates", candidates, 1)
    check_whole("", "new_tokens", new_tokens, 1)
    check_whole("", "seed", seed, 0)
    check_module(model)
    if not isinstance(samples, Sequence) or not all(isinstance(sample, Mapping) for sample in samples):
        refuse("", "samples", samples, "a list of what the processor returns for a prompt")
    if len(samples) < LEAST_SAMPLES:
        raise ValueError(f"there are {len(samples)} samples; allowed: at least {LEAST_SAMPLES}")
    search = _Search(model, samples, candidates, new_tokens, inner, seed, say_so)
    if target_speedup is not None:
        best = search.best(target_speedup)
        if best is None:
            raise ValueError(f"no candidate promises {target_speedup}x and suits the model{search.why()}")
        return search.tuned(best.schedule, search.held_out(best.schedule))
    assert max_loss is not None
    fastest: Schedule | None = None
    for rung in LADDER:
        best = search.best(rung)
        if best is None:
            continue  # no candidate promises just that
        if best.changed > max_loss:
            break
        fastest = best.schedule
    return search.tuned(*((Schedule(), None) if fastest is None else (fastest, search.held_out(fastest))))


class _Search:
    def __init__(
        self,
        model: Any,
        samples: Sequence[Mapping[str, Any]],
        candidates: int,
        steps: int,
        inner: str,
        seed: int,
        say_so: Callable[[str], None],
    ) -> None:
        self.model, self.candidates, self.steps, self.inner, self.seed = model, candidates, steps, inner, seed
        self.say_so = say_so
        self.cost = DecoderCost.of(model)
        self.layers = len(self.cost.weights)
        counts = [sizes(model, sample) for sample in samples]
        self.visual = round(statistics.mean(visual for visual, _ in counts))
        self.text = round(statistics.mean(text for _, text in counts))
        numbers = dict(zip(("search", "held out"), halves(samples), strict=True))
        self.samples = {name: [samples[i] for i in part] for name, part in numbers.items()}
        say_so(f"asking the model itself {len(samples)} times")
        self.wanted: dict[str, list[Answer]] = {
            name: greedy_answers(model, part, steps) for name, part in self.samples.items()
        }
        self.trials: list[Trial] = []
        self.left_out: dict[Schedule, str] = {}

    def best(self, target: float) -> Trial | None:
        """The candidate with the smallest KL among those of at least that speed-up."""

        def promised(shares: list[float]) -> float:
            rows = [self.text + round(share * self.visual) for share in shares]
            return self.cost.speedup(self.text + self.visual, rows)

        alive = drawn(self.candidates, target, self.layers, promised, self.seed)
        most = len(self.samples["search"])
        rounds = max(1, (len(alive) - 1).bit_length())
        for after in reversed(range(rounds)):  # the last round is on all samples
            count = max(2, most >> after)
            self.say_so(f"{target:g}x: {len(alive)} schedules on {count} samples")
            tried = [trial for schedule in alive if (trial := self._try(schedule, "search", count))]
            self.trials += tried
            tried = sorted((t for t in tried if t.speedup >= target * TOLERANCE), key=lambda t: t.kl)
            alive = [trial.schedule for trial in tried[: (len(tried) + 1) // 2]]
        return tried[0] if tried else None

    def held_out(self, schedule: Schedule) -> Trial:
        """A schedule on the samples that took no part."""
        trial = self._try(schedule, "held out", len(self.samples["held out"]))
        assert trial is not None
        return trial

    def _try(self, schedule: Schedule, part: str, count: int) -> Trial | None:
        samples, wanted = self.samples[part][:count], self.wanted[part][:count]
        try:
            divergence = measure_divergence(self.model, samples, wanted, schedule, self.steps, self.inner)
        except (NotRewritten, ValueError) as error:
            self.left_out[schedule] = str(error)
            return None
        whole = sum(self.cost.flops(said.rows) for said in wanted)
        speedup = whole / sum(self.cost.flops(rows) for rows in divergence.rows)
        return Trial(schedule, speedup, divergence.kl, divergence.changed, len(samples))

    def why(self) -> str:
        """The first reason why a candidate was left out."""
        return f"; the first refusal: {next(iter(self.left_out.values()))}" if self.left_out else ""

    def tuned(self, schedule: Schedule, held_out: Trial | None) -> Tuned:
        """The result, with what it is compared with."""
        others = dict(PRESETS)
        if held_out is not None:
            others["tuned, at random"] = at_random(schedule)
        part = "held out"
        compared = {
            name: trial
            for name, other in others.items()
            if (trial := self._try(other, part, len(self.samples[part])))
        }
        return Tuned(schedule, held_out, compared, tuple(self.trials), tuple(self.left_out.items()))
