"""One command for the table: methods x budgets x task types x models, with intervals and controls.

Each model answers its sets of questions under every method (`luvc-fx eval`). Answers are kept in
``runs/evidence``, so the command can be stopped and started at will. Results without the answers go to
``results/``, with a table for each set; ``table.py`` puts those of all sets into the documentation.

    python -m examples.research.evidence.evidence --split tune --scenes 60   # a look, 60 scenes of each set
    python -m examples.research.evidence.evidence                            # the test split: hours on a CPU
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from examples.research.paths import RUNS, TRAINED
from examples.research.tinyvlm.questions import export
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.apps.evaluation.markdown import markdown
from luvc_fx.apps.evaluation.options import BUDGETS, Options
from luvc_fx.apps.evaluation.run import run

MODELS = {
    "llava": MODEL_DIR,
    "llava_seed1": TRAINED / "llava_seed1",
    "llava_seed2": TRAINED / "llava_seed2",
    "llava_depth8": TRAINED / "llava_depth8",
    "llava_depth24": TRAINED / "llava_depth24",
    "internvl": TRAINED / "internvl",
    "qwen2_vl": TRAINED / "qwen2_vl",
}
RESULTS = Path(__file__).parent / "results"
PRESETS = {"chart": "document", "cards": "document", "page": "document", "video": "video"}
"""By the kind of scene; `image` for others. Each is asked beside the same counts of random tokens."""


@dataclass(frozen=True)
class Set:
    """Questions of one task type for one model.

    Attributes:
        kind: of scene; ``video`` for films of `frames` frames, shown as images in a row.
        scenes: so many hold 2,500 questions and a few more.
        first: number of the first scene. The first 250 scenes of the split had been in tables of presets
            before the defaults were frozen: 132 of the 300 with objects are among them, and no others.
        methods: empty: all.
        batch: questions at once.
    """

    model: str
    kind: str
    scenes: int
    methods: tuple[str, ...] = ()
    first: int = 1000
    frames: int = 0
    batch: int = 50

    @property
    def name(self) -> str:
        """Of its folder and its result."""
        return f"{self.model}-{self.kind}{self.frames or ''}"


SOME = ("default", "random", "uniform", "diversity", "single-shot", "downsample")
FEW = ("default", "random", "uniform", "single-shot")
FEWEST = ("default", "random", "single-shot")
SETS = (
    Set("llava", "objects", 300, first=0),
    Set("internvl", "objects", 300, first=0),
    Set("qwen2_vl", "page", 580, first=0),
    Set("llava_seed1", "objects", 300, SOME, first=0),
    Set("llava_seed2", "objects", 300, FEWEST, first=0),
    Set("llava_depth8", "objects", 300, FEWEST, first=0),
    Set("llava_depth24", "objects", 300, FEWEST, first=0),
    Set("llava", "chart", 430, SOME),
    Set("llava", "cards", 500, SOME),
    Set("internvl", "chart", 430, SOME),
    Set("internvl", "page", 580, SOME, first=0),
    Set("internvl", "video", 205, SOME, first=0, frames=4, batch=25),
    Set("internvl", "video", 205, SOME, first=0, frames=16, batch=8),
    Set("qwen2_vl", "chart", 430, SOME),
    Set("qwen2_vl", "easy", 270, FEW, first=0),
)


def ask(chosen: Set, split: str, scenes: int, methods: tuple[str, ...], budgets: tuple[float, ...]) -> None:
    """Answers, result and table of one set."""
    work = RUNS / "evidence"
    folder = work / "questions" / f"{split}-{chosen.kind}{chosen.frames or ''}-{scenes}"
    if chosen.first:
        folder = folder.with_name(f"{folder.name}-from-{chosen.first}")
    if not (folder / "questions.jsonl").exists():
        if chosen.kind == "video":
            export(folder, split, scenes, first=chosen.first, frames=chosen.frames, as_images=True)
        else:
            export(folder, split, scenes, first=chosen.first, kind=chosen.kind)
    preset = PRESETS.get(chosen.kind, "image")
    options = Options(
        model=MODELS[chosen.model],
        questions=folder / "questions.jsonl",
        out=work / chosen.name,
        methods=methods or chosen.methods,
        budgets=budgets,
        schedules=(preset, f"{preset}:random"),
        split=split,
        batch=chosen.batch,
        wrong_image=True,
    )
    result = run(options, print, lambda title, done, total: None)
    out = RESULTS / split
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{chosen.name}.json").write_text(result.to_json() + "\n")
    (out / f"{chosen.name}.md").write_text(markdown(result))
    print((out / f"{chosen.name}.md").read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [chosen.name for chosen in SETS]
    parser.add_argument(
        "--only", nargs="*", choices=names, default=names, metavar="SET", help=", ".join(names)
    )
    parser.add_argument("--split", choices=("tune", "dev", "test"), default="test")
    parser.add_argument("--scenes", type=int, help="of each set; those that it asks for, without it")
    parser.add_argument("--methods", default="", help="with commas; those of each set, without it")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    args = parser.parse_args()
    methods = tuple(name for name in args.methods.split(",") if name)
    budgets = tuple(float(budget) for budget in args.budgets.split(","))
    for chosen in SETS:
        if chosen.name not in args.only:
            continue
        if not MODELS[chosen.model].exists():
            print(f"{chosen.name} is left out: there is no {MODELS[chosen.model]}")
            continue
        ask(chosen, args.split, args.scenes or chosen.scenes, methods, budgets)


if __name__ == "__main__":
    main()
