"""Write questions about held-out scenes or videos for `luvc-fx eval`, and their images.

python -m examples.research.tinyvlm.questions OUT --split dev --scenes 400
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from examples.research.tinyvlm.scenes import SPLITS, TASKS, sample
from examples.research.tinyvlm.videos import film


def export(
    out: Path,
    split: str,
    scenes: int,
    per_scene: int | None = None,
    first: int = 0,
    kind: str | None = None,
    frames: int = 0,
    as_images: bool = False,
) -> int:
    """Scenes `first`, `first` + 1, ... of `split` to `out`/questions.jsonl and a PNG each.

    Args:
        per_scene: at most so many questions about one scene; None: all.
        kind: of scene; None: as they come.
        frames: videos of so many frames in place of scenes, an NPZ each.
        as_images: which a model is to see as images, one after another.

    Returns:
        The number of questions.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(first, first + scenes):
        stem = f"{split}-{'video' if frames else kind or 'mixed'}-{number:05d}"
        if frames:
            asked = film(split, number, frames)
            media = {"image" if as_images else "video": f"{stem}.npz"}
            shown = np.stack([np.asarray(image) for image, _ in asked.frames])
            np.savez_compressed(out / f"{stem}.npz", frames=shown)
        else:
            asked = sample(split, number, kind)
            media = {"image": f"{stem}.png"}
            asked.image.save(out / media["image"])
        lines += [
            {
                **media,
                "question": question.text,
                "answer": question.answer,
                "task": question.task,
                "scene": stem,
                "split": split,
            }
            for question in asked.questions[:per_scene]
        ]
    (out / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for questions.jsonl and the images")
    parser.add_argument("--split", choices=SPLITS, default="dev")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--per-scene", type=int, help="at most so many questions about one scene")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene")
    parser.add_argument("--kind", choices=tuple(TASKS), help="only scenes of this kind")
    parser.add_argument("--frames", type=int, default=0, help="videos of so many frames, 4 or more")
    parser.add_argument("--as-images", action="store_true", help="frames for models that know no videos")
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if name != "out"}
    count = export(args.out, **given)
    print(f"{count} questions about {args.scenes} scenes in {args.out}/questions.jsonl")


if __name__ == "__main__":
    main()
