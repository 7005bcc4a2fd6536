"""Accuracy with a token budget, next to no budget and to controls with the same counts and layers.

Every arm answers the same questions through `luvc_fx.compile` and `generate`. The inner compiler is
"eager": the rewritten graph is the one that Inductor would get, and accuracy needs no speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from evaluate import answers
from scenes import sample
from transformers import AutoProcessor, LlavaForConditionalGeneration

import luvc_fx
from luvc_fx import Schedule
from luvc_fx.demo import MODEL_DIR
from luvc_fx.inputs import read_schedule


@dataclass(frozen=True)
class Arm:
    """One schedule's answers: `right[i]` says whether question i was answered exactly.

    `tokens` are the visual tokens that enter each decoder layer, `budget` their mean over `visual`.
    """

    name: str
    right: np.ndarray
    tokens: list[int]
    budget: float

    @property
    def accuracy(self) -> float:
        """Share of the questions that were answered exactly."""
        return float(self.right.mean())


def with_selector(schedule: Schedule, selector: str, seed: int = 0) -> Schedule:
    """`schedule` with the same merges, layers and counts, but tokens picked by `selector`."""
    prune = tuple(dataclasses.replace(p, selector=selector, seed=seed) for p in schedule.prune)
    return dataclasses.replace(schedule, prune=prune)


def questions(split: str, count: int) -> list[tuple[object, str, str]]:
    """The first `count` (image, question, answer) of `split`, in the order of the scenes' seeds."""
    out: list[tuple[object, str, str]] = []
    seed = 0
    while len(out) < count:
        scene = sample(split, seed)
        out += [(scene.image, question.text, question.answer) for question in scene.questions]
        seed += 1
    return out[:count]


@torch.inference_mode()
def compare(
    model: LlavaForConditionalGeneration,
    processor: object,
    schedules: dict[str, Schedule],
    asked: list[tuple[object, str, str]],
    batch: int = 25,
) -> list[Arm]:
    """One `Arm` for each schedule, all on the same questions; `model` is restored after each.

    Raises:
        luvc_fx.NotRewritten: a schedule that the graphs cannot follow.
    """
    arms = []
    visual = model.config.image_seq_length
    for name, schedule in schedules.items():
        torch._dynamo.reset()
        with luvc_fx.applied(model, schedule, inner="eager", strict=True):
            said = answers(model, processor, [(image, text) for image, text, _ in asked], batch)
            report = luvc_fx.report_of(model)
        right = np.array([a == answer for a, (_, _, answer) in zip(said, asked, strict=True)])
        arms.append(Arm(name, right, report.tokens_per_layer(), report.budget(visual)))
    return arms


def table(arms: list[Arm]) -> str:
    """Markdown: accuracy, what is kept of the first arm's, and questions won and lost against it."""
    base = arms[0]
    lines = [
        "| arm | budget | accuracy | of unpruned | won | lost |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm in arms:
        won, lost = int((arm.right & ~base.right).sum()), int((~arm.right & base.right).sum())
        lines.append(
            f"| {arm.name} | {arm.budget:.3f} | {100 * arm.accuracy:.1f} % "
            f"| {100 * arm.accuracy / base.accuracy:.1f} % | {won} | {lost} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--schedule", action="append", help="a preset or a JSON file; may be repeated")
    parser.add_argument("--split", default="test")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--out", type=Path, help="folder for BUDGET.md and budget.json")
    args = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    schedules = {"unpruned": Schedule()}
    for name in args.schedule or ["image"]:
        schedule = read_schedule(name)
        title = Path(name).stem
        schedules[title] = schedule
        schedules[f"{title}, random"] = with_selector(schedule, "random")
        schedules[f"{title}, uniform"] = with_selector(schedule, "uniform")
    asked = questions(args.split, args.questions)
    arms = compare(model, AutoProcessor.from_pretrained(args.model), schedules, asked)
    facts = {
        "date": datetime.date.today().isoformat(),
        "questions": f"{len(asked)}, split {args.split}, by scene seed from 0",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    text = "# Accuracy with a token budget\n\n"
    text += "".join(f"- {name}: {value}\n" for name, value in facts.items())
    text += "\n" + table(arms)
    print(text)
    if args.out:
        (args.out / "BUDGET.md").write_text(text)
        rows = [{"arm": a.name, "budget": a.budget, "accuracy": a.accuracy, "tokens": a.tokens} for a in arms]
        schedules_json = {name: json.loads(s.to_json()) for name, s in schedules.items()}
        content = {"facts": facts, "arms": rows, "schedules": schedules_json}
        (args.out / "budget.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
