"""All figures from one command: pictures, numbers and captions.

    python -m examples.research.figures.figures                      # about half an hour of one core
    python -m examples.research.figures.figures --only bias --quick  # a look, in runs/figures/quick

Answers are kept in ``runs/figures``: a run that was stopped goes on where it was. Every number in a caption
is computed from ``figures.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from examples.research.figures import (
    architectures,
    bias,
    failures,
    integrity,
    latency,
    progressive,
    projector,
    sensitivity,
    smoothing,
)
from examples.research.figures.figure_kit import LEVEL, Bench, Numbers, Size
from examples.research.paths import RUNS, TRAINED
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.apps.environment import versions
from luvc_fx.apps.evaluation.keys import code_key, model_key

MODELS = {
    integrity: [MODEL_DIR],
    projector: [TRAINED / projector.FOLDER],
    bias: [MODEL_DIR],
    latency: [TRAINED / latency.FOLDER],
    sensitivity: [MODEL_DIR],
    architectures: [],  # of results that name theirs
    progressive: [TRAINED / folder for folder in progressive.DEPTHS.values()],
    failures: [MODEL_DIR],
    smoothing: [MODEL_DIR],
}
"""Each figure, in order, with the models that it asks."""

FIGURES = tuple(MODELS)
KEPT = RUNS / "figures"
QUICK = Size(questions=4, images=6)


def make(bench: Bench, out: Path, only: str | None = None, redraw: bool = False) -> None:
    """Compute, draw and describe into `out`; numbers of figures that are not made stay as they are.

    Args:
        only: the name of one figure; None: all.
        redraw: draw and describe what ``figures.json`` holds, and compute nothing.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "figures.json"
    kept: dict[str, Numbers] = json.loads(path.read_text()) if path.is_file() else {}
    for figure in FIGURES:
        if only not in (None, figure.NAME) or (redraw and figure.NAME not in kept):
            continue
        if not redraw:
            made = {
                "models": {model.name: model_key(model) for model in MODELS[figure]},
                "code": code_key(),
                "versions": versions(),
            }
            # As read from JSON, whether drawn now or later.
            kept[figure.NAME] = json.loads(json.dumps({"made_with": made, **figure.data(bench)}))
            lines = [f"{json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in kept.items()]
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        figure.draw(kept[figure.NAME]).savefig(out / f"{figure.NAME}.png", dpi=110)
    (out / "FIGURES.md").write_text(described(kept), encoding="utf-8")


def described(kept: dict[str, Numbers]) -> str:
    """Markdown: each figure with its caption."""
    parts = [
        "# Figures",
        "Made by `python -m examples.research.figures.figures`. Where no other model is named, they are of "
        "the shipped one (`luvc_fx/apps/demo_model`: LLaVA, CLIP with 16 x 16 tokens, a 1-D projector, 16 "
        "decoder layers). Every number comes from [figures.json](figures.json), which the command computes.",
        "Intervals are 95 %, by bootstrap over scenes. A difference in points has its p value behind it "
        f"where it is significant: p is below {LEVEL:g}, by exact sign flips over scenes with Holm's "
        "correction over all rows of one model that are compared with the same kind of other (single types "
        "are a family of their own). A difference without a p value may be chance.",
    ]
    for figure in FIGURES:
        if figure.NAME in kept:
            numbers = kept[figure.NAME]
            parts += [f"## {figure.TITLE}", f"![{figure.TITLE}]({figure.NAME}.png)", figure.caption(numbers)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[figure.NAME for figure in FIGURES])
    parser.add_argument("--quick", action="store_true", help="few questions, into runs/figures/quick")
    parser.add_argument("--redraw", action="store_true", help="from figures.json, without the model")
    args = parser.parse_args()
    size = QUICK if args.quick else Size()
    out = KEPT / "quick" if args.quick else Path(__file__).parent
    make(Bench(KEPT, size, _watch), out, args.only, args.redraw)
    print(f"figures and FIGURES.md are in {out}")


def _watch(title: str, done: int, total: int) -> None:
    if done in (0, total):
        print(f"{title}: {done} of {total}", file=sys.stderr)


if __name__ == "__main__":
    main()
