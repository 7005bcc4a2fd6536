"""A task for lmms-eval that needs no network: questions about drawn scenes, for the model of luvc_fx.

python -m examples.research.lmms_eval.local_task OUT    # the harness finds it by --include_path OUT
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from examples.research.tinyvlm.questions import export

FUNCTIONS = Path(__file__).with_name("scene_functions.py")
YAML = """task: luvc_scenes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function scene_functions.visuals
doc_to_text: !function scene_functions.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
process_results: !function scene_functions.score
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def write(out: Path, scenes: int, per_scene: int) -> int:
    """The task's YAML, its functions, questions and images; returns the number of questions."""
    out = out.resolve()
    count = export(out, "dev", scenes, per_scene)
    lines = (out / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    docs = [json.loads(line) for line in lines]
    docs = [{**doc, "image": str(out / doc["image"])} for doc in docs]
    (out / "questions.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (out / "luvc_scenes.yaml").write_text(YAML.format(questions=out / "questions.jsonl"), encoding="utf-8")
    shutil.copy(FUNCTIONS, out)
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
