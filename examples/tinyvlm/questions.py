"""Write questions about held-out scenes for `luvc-fx eval`: one JSON object a line, and the images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from scenes import SPLITS, sample


def export(out: Path, split: str, scenes: int, per_scene: int | None = None, first: int = 0) -> int:
    """Scenes `first`, `first` + 1, ... of `split` to `out`/questions.jsonl and a PNG each.

    Args:
        per_scene: at most so many questions about one scene; None: all.

    Returns:
        The number of questions.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(first, first + scenes):
        scene = sample(split, number)
        name = f"{split}-{number:05d}.png"
        scene.image.save(out / name)
        lines += [
            {
                "image": name,
                "question": question.text,
                "answer": question.answer,
                "task": question.task,
                "scene": f"{split}-{number}",
                "split": split,
            }
            for question in scene.questions[:per_scene]
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
    args = parser.parse_args()
    count = export(args.out, args.split, args.scenes, args.per_scene, args.first)
    print(f"{count} questions about {args.scenes} scenes in {args.out}/questions.jsonl")


if __name__ == "__main__":
    main()
