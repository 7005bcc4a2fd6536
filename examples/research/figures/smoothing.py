"""Over-smoothing: all attributes of a scene, and textures, against the cutoff of the low-pass."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import luvc_fx
from examples.research.figures.figure_kit import SEEDS, SPLIT, Bench, Numbers
from examples.research.tinyvlm.scenes import SIZE, sample
from luvc_fx.apps.evaluation.prompts import collate
from luvc_fx.apps.evaluation.questions import Question
from luvc_fx.apps.evaluation.result import UNPRUNED, Cell, with_seed
from luvc_fx.apps.evaluation.statistics import ratio_interval
from luvc_fx.generate.families import placeholders
from luvc_fx.schedule import Prune, Schedule
from luvc_fx.schedule.presets import PICK

NAME, TITLE = "smoothing", "All attributes of a scene, and textures, against the cutoff"
CUTOFFS = (0.03, 0.1, 0.25, 0.6, 1.0)
KEEP, LAYER = 0.25, 2
ATTRIBUTES = ("color", "shape", "position")
TEXTURES = ("brick", "grass", "gravel", "ihc", "page", "text")
"""Pictures of scikit-image, without their colour."""

BORDER = 0.6
"""Left of this share of a picture are crops to learn from, right of it those to be told."""

LEARNT, TOLD = 40, 40
"""Images of each texture."""

PATCH = SIZE // 2
RIDGE = 1.0
LABELS = {"all": "scenes, all right", "each": "answers right", "texture": "textures told"}
Shares = NDArray[np.float64]


def schedules() -> dict[str, Schedule]:
    """One prune each, by what passes the filter and by what does not, at every cutoff."""
    place = {"keep": KEEP, "layer": LAYER}
    found = {
        UNPRUNED: Schedule(),
        "random": Schedule(prune=Prune(**place, selector="random")),
        "preset": Schedule(prune=Prune(**place, **PICK)),
    }
    for cutoff in CUTOFFS:
        literal = Prune(**place, energy="lowpass", coverage="global", cutoff=cutoff)
        found[f"lowpass {cutoff:g}"] = Schedule(prune=literal)
    for cutoff in CUTOFFS[:-1]:  # a filter that lets everything through leaves no residual
        found[f"residual {cutoff:g}"] = Schedule(prune=Prune(**place, cutoff=cutoff))
    return found


def _each_seed(name: str, schedule: Schedule) -> list[Schedule]:
    return [with_seed(schedule, seed) for seed in range(SEEDS)] if name == "random" else [schedule]


# -------------------------------------------------------------------------------------- all attributes


def listed_questions(bench: Bench) -> list[Question]:
    """Every question about a colour, a shape or a place that the generator has about a scene."""
    found = []
    for number in range(bench.size.images):
        scene, stem = sample(SPLIT, number, "objects"), f"{SPLIT}-objects-{number:05d}"
        path = bench.folder / "images" / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene.image.save(path)
        found += [
            Question((path,), question.text, question.answer, question.task, stem, split=SPLIT)
            for question in scene.questions
            if question.task in ATTRIBUTES
        ]
    return found


def attributes_right(bench: Bench, questions: list[Question], schedule: Schedule) -> dict[str, Shares]:
    """``[scenes]``: 1 where all answers about a scene are right, and the share that is."""
    answers = bench.asker.answers(Cell(NAME, None, schedule), questions)
    by_scene: dict[str, list[bool]] = {}
    for question, text in zip(questions, answers, strict=True):
        by_scene.setdefault(question.scene, []).append(question.right(text))
    return {
        "all": np.array([all(right) for right in by_scene.values()], dtype=np.float64),
        "each": np.array([np.mean(right) for right in by_scene.values()]),
    }


# ------------------------------------------------------------------------------------------- textures


@cache
def _picture(name: str) -> Image.Image:
    return Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png").convert("L")


def textured(name: str, rng: np.random.Generator, told: bool) -> Image.Image:
    """A square of a texture, at the mean and contrast of all, on a smooth ground: RGB, ``SIZE`` wide."""
    picture = _picture(name)
    border = int(picture.width * BORDER)
    left, right = (border, picture.width) if told else (0, border)
    side = min(100, right - left, picture.height)
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(0, picture.height - side + 1))
    crop = np.asarray(
        picture.resize((PATCH, PATCH), Image.Resampling.BICUBIC, (x, y, x + side, y + side)), float
    )
    crop = 128 + 40 * (crop - crop.mean()) / (crop.std() + 1e-6)
    ramp = np.linspace(rng.uniform(40, 120), rng.uniform(130, 220), SIZE)
    ground = np.tile(ramp, (SIZE, 1)) if rng.random() < 0.5 else np.tile(ramp[:, None], (1, SIZE))
    at_x, at_y = rng.integers(0, SIZE - PATCH + 1, 2)
    ground[at_y : at_y + PATCH, at_x : at_x + PATCH] = crop
    return Image.fromarray(ground.clip(0, 255).astype(np.uint8)).convert("RGB")


@torch.inference_mode()
def left_over(bench: Bench, images: list[Image.Image], question: Question, schedule: Schedule) -> Shares:
    """``[images, width]``: mean of the visual rows that enter the last layer."""
    prompts, model = bench.prompts, bench.model
    row = collate([prompts.prompt(question)], 1, prompts.padding, model.device, model.dtype)
    pixels = bench.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    found = []
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        for part in pixels.split(40):
            inputs = {name: value.expand(len(part), *value.shape[1:]) for name, value in row.items()}
            out = model(**{**inputs, "pixel_values": part}, output_hidden_states=True, use_cache=False)
            found.append(_mean_of_visual(model, inputs["input_ids"], out))
    return torch.cat(found).double().numpy()


def _mean_of_visual(model: Any, ids: Tensor, out: Any) -> Tensor:
    visual = placeholders(model, ids)
    if getattr(out, "row_index", None) is not None:
        visual = visual.gather(1, out.row_index)
    states = out.hidden_states[-2].float()  # those that enter the last layer
    weights = visual.unsqueeze(-1).float()
    return (states * weights).sum(1) / weights.sum(1)


def told_right(learnt: Shares, told: Shares) -> Shares:
    """``[images]``: 1 where a ridge regression on `learnt` names the texture of `told`; both by texture."""
    labels = np.eye(len(TEXTURES))
    mean, scale = learnt.mean(0), learnt.std(0) + 1e-6
    x, y = (learnt - mean) / scale, labels.repeat(LEARNT, 0)
    gram = x.T @ x + RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (y - y.mean(0)))
    guesses = ((told - mean) / scale @ weights + y.mean(0)).argmax(1)
    return (guesses == np.arange(len(TEXTURES)).repeat(TOLD)).astype(np.float64)


def textures(bench: Bench) -> list[list[Image.Image]]:
    """To learn from, and to be told; by texture."""
    rng = np.random.default_rng(0)
    return [
        [textured(name, rng, told) for name in TEXTURES for _ in range(count)]
        for told, count in ((False, LEARNT), (True, TOLD))
    ]


# ---------------------------------------------------------------------------------------------- figure


def data(bench: Bench) -> Numbers:
    """Shares with their intervals, by schedule."""
    questions = listed_questions(bench)
    learnt, told = textures(bench)
    rows = {}
    for name, schedule in schedules().items():
        parts: dict[str, list[Shares]] = {key: [] for key in LABELS}
        for one in _each_seed(name, schedule):
            right = attributes_right(bench, questions, one)
            kept = [left_over(bench, images, bench.questions[0], one) for images in (learnt, told)]
            right["texture"] = told_right(*kept)
            for key, values in right.items():
                parts[key].append(values)
        means = {key: np.mean(values, axis=0) for key, values in parts.items()}
        rows[name] = {
            key: {"share": float(values.mean()), "interval": ratio_interval(values, np.ones(len(values)))}
            for key, values in means.items()
        }
    return {
        "rows": rows,
        "questions": len(questions),
        "scenes": bench.size.images,
        "textures": len(told),
    }


def draw(numbers: Numbers) -> Any:
    """A panel for each share."""
    from matplotlib.figure import Figure

    rows = numbers["rows"]
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(LABELS)), LABELS.items(), strict=True):
        for energy, colour in (("lowpass", "C3"), ("residual", "C0")):
            cutoffs = [c for c in CUTOFFS if f"{energy} {c:g}" in rows]
            of = [rows[f"{energy} {c:g}"][key] for c in cutoffs]
            values = [100 * one["share"] for one in of]
            arms = [_arms(one) for one in of]
            axes.errorbar(
                cutoffs,
                values,
                yerr=list(zip(*arms, strict=True)),
                color=colour,
                marker="o",
                capsize=3,
                label=energy,
            )
        for name, style in ((UNPRUNED, "--"), ("preset", "-."), ("random", ":")):
            axes.axhline(100 * rows[name][key]["share"], color="k", linestyle=style, linewidth=1, label=name)
        axes.set_xscale("log")
        axes.set_xticks(CUTOFFS, [f"{c:g}" for c in CUTOFFS])
        axes.minorticks_off()
        axes.set_ylim(0, 103)
        axes.set_title(label)
        axes.set_xlabel("cutoff sigma")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("%, with 95 % intervals")
    figure.axes[-1].axhline(100 / len(TEXTURES), color="0.6", linewidth=0.8, label="chance")
    figure.axes[-1].legend(fontsize=9)
    return figure


def _arms(one: Numbers) -> tuple[float, float]:
    low, high = one["interval"] or (one["share"], one["share"])
    return max(0.0, 100 * (one["share"] - low)), max(0.0, 100 * (high - one["share"]))


def caption(numbers: Numbers) -> str:
    """What is left under every schedule."""
    rows = numbers["rows"]

    def told(name: str) -> str:
        return " / ".join(f"{100 * rows[name][key]['share']:.1f}" for key in LABELS)

    def by_cutoff(energy: str) -> str:
        cutoffs = [c for c in CUTOFFS if f"{energy} {c:g}" in rows]
        return ", ".join(f"{c:g}: {told(f'{energy} {c:g}')}" for c in cutoffs)

    return (
        f"One prune to {100 * KEEP:g} % before layer {LAYER}. The model answers in a word or a few, so the "
        "list of all attributes is asked for one by one: every question of the generator about a colour, a "
        f"shape or a place, {numbers['questions']} about {numbers['scenes']} scenes of the {SPLIT} split; a "
        f"scene is right where all its answers are. Textures: {numbers['textures']} images with a square of "
        f"one of {len(TEXTURES)} grey textures of equal mean and contrast on a smooth ground; a ridge "
        "regression, fitted anew for each schedule on other parts of the same pictures, has to name it from "
        "the mean of the visual rows that enter the last layer, so it shows what is left in them, and not "
        "what the model can say (it has no words for textures). In %, scenes / answers / textures: unpruned "
        f"{told(UNPRUNED)}; random tokens (mean of {SEEDS} seeds) {told('random')}; the presets' pick "
        f"{told('preset')}. By the energy that passes, at cutoff {by_cutoff('lowpass')}. By the residual, of "
        f"each block, {by_cutoff('residual')}."
    )
