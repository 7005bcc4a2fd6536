"""A task for lmms-eval that needs no network: questions about drawn scenes, for the model of luvc_fx.

`python -m examples.research.lmms_eval.local_task OUT` writes it; the harness
finds it with `--include_path OUT`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

YAML = """task: luvc_scenes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function local_task.visuals
doc_to_text: !function local_task.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
process_results: !function local_task.score
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def visuals(doc: dict[str, Any]) -> list[Image.Image]:
    """The image of one question."""
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question, as the model was trained on it."""
    return str(doc["question"])


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the word."""
    return {"exact_match": float(results[0].strip() == doc["answer"])}


def write(out: Path, scenes: int, per_scene: int) -> int:
    """The task's YAML, its functions, questions and images; returns the number of questions."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from examples.research.tinyvlm.questions import export

    out = out.resolve()
    count = export(out, "dev", scenes, per_scene)
    lines = (out / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    docs = [json.loads(line) for line in lines]
    docs = [{**doc, "image": str(out / doc["image"])} for doc in docs]
    (out / "questions.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (out / "luvc_scenes.yaml").write_text(YAML.format(questions=out / "questions.jsonl"), encoding="utf-8")
    if Path(__file__).resolve() != out / "local_task.py":
        shutil.copy(__file__, out / "local_task.py")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--per-scene", type=int, default=4)
    given = parser.parse_args()
    print(f"{write(given.out, given.scenes, given.per_scene)} questions in {given.out}")


if __name__ == "__main__":
    main()
