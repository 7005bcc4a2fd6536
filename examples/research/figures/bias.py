"""SPU robustness: how much of a token's score is its place in the row, beside FastV's attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from examples.research.figures.figure_kit import SPLIT, Bench, Numbers, listed
from examples.research.tinyvlm.scenes import SIZE
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.apps.evaluation.prompts import collate
from luvc_fx.apps.evaluation.questions import read_frames
from luvc_fx.apps.evaluation.statistics import ratio_interval
from luvc_fx.apps.local_model import load
from luvc_fx.generate.families import placeholders
from luvc_fx.ops import spectral_energy

NAME, TITLE = "bias", "Spectral energy and attention against the token index"
LAYERS = (1, 2, 4, 8, 12)
"""Decoder layers before which tokens are scored."""

DRAWN = (2, 8)
SCORES = ("residual", "lowpass", "attention")
CUTOFF = 0.25
TOKENS = 256
COLOURS = {"residual": "C0", "lowpass": "C2", "attention": "C3"}
Scores = NDArray[np.float64]


@torch.inference_mode()
def scores_of(bench: Bench) -> dict[int, dict[str, Scores]]:
    """By layer and score ``[images, tokens]``, each of the stock model with all its tokens.

    Energies are of the rows that enter the layer, attention is the last query's in the layer before, mean
    over heads, as FastV reads it.
    """
    model = load(MODEL_DIR)[0].float()  # one of its own, as attention that can be read is written out
    model.set_attn_implementation("eager")
    prompts = bench.prompts
    found: dict[int, dict[str, list[Scores]]] = {n: {name: [] for name in SCORES} for n in LAYERS}
    for question in bench.scenes:
        row = prompts.prompt(question)
        inputs = collate([row], 1, prompts.padding, model.device, model.dtype)
        out = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
        visual = placeholders(model, inputs["input_ids"])[0]
        for layer in LAYERS:
            x = out.hidden_states[layer][:, visual]
            for energy in ("residual", "lowpass"):
                found[layer][energy].append(spectral_energy(x, CUTOFF, energy)[0].double().numpy())
            paid = out.attentions[layer - 1][0, :, -1, visual].mean(0)
            found[layer]["attention"].append(paid.double().numpy())
    return {layer: {name: np.stack(s) for name, s in of.items()} for layer, of in found.items()}


def contrast(bench: Bench) -> Scores:
    """Variance of the pixels of each patch, ``[images, tokens]``: a score that sees nothing but content."""
    images = [np.asarray(read_frames(question)[0], dtype=np.float64).mean(2) for question in bench.scenes]
    side = round(TOKENS**0.5)
    patches = np.stack(images).reshape(len(images), side, SIZE // side, side, SIZE // side)
    return patches.var((2, 4)).reshape(len(images), TOKENS)


def ranks(scores: Scores) -> Scores:
    """Ranks in each image, from -1 for the lowest to 1 for the highest: ``[images, tokens]``."""
    order = scores.argsort(1, kind="stable").argsort(1)
    return 2.0 * order / (scores.shape[1] - 1) - 1.0


def explained(scores: Scores) -> float:
    """Share of the variance of the ranks that the token index alone explains.

    Corrected for what chance explains, one part in the number of images; so 0 for scores that know nothing
    of the index, but for noise, and 1 for the same ranking in every image.
    """
    ranked = ranks(scores)
    share = float(ranked.mean(0).var() / ranked.var())
    return (share - 1 / len(scores)) / (1 - 1 / len(scores))


def slope(scores: Scores) -> tuple[float, tuple[float, float] | None]:
    """Spearman's rho of score and token index, mean over images, with its 95 % interval over images."""
    ranked = ranks(scores)
    index = np.linspace(-1.0, 1.0, scores.shape[1])
    each = (ranked * index).mean(1) / index.var()
    return float(each.mean()), ratio_interval(each, np.ones(len(each)))


def _bias(scores: Scores) -> Numbers:
    rho, interval = slope(scores)
    return {"explained": explained(scores), "rho": rho, "rho_interval": interval}


def data(bench: Bench) -> Numbers:
    """Mean curves and the two numbers at each layer, and these of the pixels' contrast."""
    found: dict[str, Numbers] = {}
    for layer, by_name in scores_of(bench).items():
        found[str(layer)] = {}
        for name, scores in by_name.items():
            relative = scores / scores.mean(1, keepdims=True)
            found[str(layer)][name] = {"curve": relative.mean(0).round(5).tolist(), **_bias(scores)}
    pixels = _bias(contrast(bench))
    return {"images": len(bench.scenes), "cutoff": CUTOFF, "pixels": pixels, "layers": found}


def draw(numbers: Numbers) -> Any:
    """Curves on the left, the numbers by layer on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.add_gridspec(len(DRAWN), 5)
    for row, layer in enumerate(DRAWN):
        axes = figure.add_subplot(grid[row, :3])
        for name in SCORES:
            curve = numbers["layers"][str(layer)][name]["curve"]
            axes.plot(curve, color=COLOURS[name], linewidth=1.2, label=_label(name))
        axes.axhline(1.0, color="0.6", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_yticks((0.2, 0.5, 1, 2), ("0.2", "0.5", "1", "2"))
        axes.minorticks_off()
        axes.set_ylabel(f"before layer {layer}: score over the image's mean")
        axes.set_xticks(range(0, 257, 32))
        axes.grid(alpha=0.3)
    axes.set_xlabel("index of the visual token (16 are a row of the image)")
    figure.axes[0].legend(fontsize=9)
    share, rho = figure.add_subplot(grid[0, 3:]), figure.add_subplot(grid[1, 3:])
    for name in SCORES:
        of = [numbers["layers"][layer][name] for layer in numbers["layers"]]
        layers = [int(layer) for layer in numbers["layers"]]
        share.plot(layers, [100 * one["explained"] for one in of], "o-", color=COLOURS[name])
        spans = [one["rho_interval"] or (one["rho"], one["rho"]) for one in of]
        below = [max(0.0, one["rho"] - low) for one, (low, _) in zip(of, spans, strict=True)]
        above = [max(0.0, high - one["rho"]) for one, (_, high) in zip(of, spans, strict=True)]
        middle = [one["rho"] for one in of]
        rho.errorbar(layers, middle, yerr=[below, above], fmt="o-", color=COLOURS[name], capsize=3)
    dashes = {"color": "0.5", "linestyle": "--", "linewidth": 1.2}
    share.axhline(100 * numbers["pixels"]["explained"], label="contrast of the pixels", **dashes)
    rho.axhline(numbers["pixels"]["rho"], **dashes)
    share.legend(fontsize=9)
    share.set_ylabel("variance of the ranks that\nthe index explains, %")
    share.set_ylim(0, None)
    rho.set_ylabel("Spearman's rho, score and index")
    rho.axhline(0.0, color="0.6", linewidth=0.8)
    rho.set_xlabel("scored before decoder layer")
    for axes in (share, rho):
        axes.grid(alpha=0.3)
        axes.set_xticks(layers)
    return figure


def _label(name: str) -> str:
    return "attention of the last query (FastV)" if name == "attention" else f"{name} energy (SPU)"


def caption(numbers: Numbers) -> str:
    """The two numbers, layer by layer, and which score is the least biased."""
    layers = numbers["layers"]

    def all_of(key: str, form: str, times: float = 1.0) -> str:
        return "; ".join(
            f"{name} {', '.join(format(times * layers[n][name][key], form) for n in layers)}"
            for name in SCORES
        )

    pixels = numbers["pixels"]
    below = listed([f"{name} before {_times(layers, name)}" for name in SCORES[:2]])
    least = {n: min(SCORES, key=lambda name: layers[n][name]["explained"]) for n in layers}
    flattest = {n: min(SCORES, key=lambda name: abs(layers[n][name]["rho"])) for n in layers}
    return (
        f"Scores of all 256 visual tokens of the unpruned model on {numbers['images']} images of the {SPLIT} "
        f"split, one question each, cutoff {numbers['cutoff']}. Left: mean over images of a score over that "
        "image's mean. Right: position bias as two numbers, on ranks within each image, as ranks are what "
        f"prunes. Before layers {listed(list(layers))}, the share of the variance of the ranks that the "
        "token index alone explains, in percent (0: none, 100: the same ranking in every image): "
        f"{all_of('explained', '.0f', 100)}. Spearman's rho of score and index, mean over images (above 0: "
        f"the end of the row, which is the bottom of the image, is preferred): {all_of('rho', '+.2f')}. The "
        f"index explains least of {_winners(least)}; rho is nearest to 0 for {_winners(flattest)}. Of a "
        f"spectrum it explains less than of attention with {below}. What these images have in common is in "
        "these numbers, too (objects do not touch the border, charts stand on a base line): of the contrast "
        "of each patch's pixels, which no place in a row touches, the index explains "
        f"{100 * pixels['explained']:.0f} (dashed), with a rho of {pixels['rho']:+.2f}."
    )


def _times(layers: dict[str, Numbers], name: str) -> str:
    """Before how many layers the index explains less of this score than of attention."""
    less = sum(of[name]["explained"] < of["attention"]["explained"] for of in layers.values())
    return f"{less} of these {len(layers)} layers"


def _winners(by_layer: dict[str, str]) -> str:
    names = {name: [n for n, best in by_layer.items() if best == name] for name in SCORES}
    return listed([f"{name} (before {listed(layers)})" for name, layers in names.items() if layers])
