"""Exact-match accuracy per task on held-out scenes, next to the wrong-image control.

The control asks the same question about another test image of the same scene type, so it shows
how much of the accuracy comes from the words alone.

    python -m examples.research.tinyvlm.evaluate --checkpoint runs/tinyvlm/checkpoint.pt --out OUT
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from examples.research.tinyvlm.scenes import TASKS, Scene, sample


def prompt(processor: LlavaProcessor, question: str) -> str:
    """The one-turn prompt about one image, by the shipped chat template."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}])


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: list[tuple[Image.Image, str]],
    batch: int = 64,
) -> list[str]:
    """Generated answer text for every (image, question) pair, left-padded to one length for all."""
    images, texts = zip(*asked, strict=True)
    prompts = [prompt(processor, text) for text in texts]
    inputs = processor(images=list(images), text=prompts, return_tensors="pt", padding=True)
    out: list[str] = []
    for first in range(0, len(asked), batch):
        part = {name: value[first : first + batch] for name, value in inputs.items()}
        ids = model.generate(**part)[:, inputs["input_ids"].shape[1] :]
        out += [a.strip() for a in processor.batch_decode(ids, skip_special_tokens=True)]
    return out


def scene_set(split: str, count: int) -> list[tuple[Scene, Scene]]:
    """Scenes, each with the next scene of the same kind as its wrong image."""
    scenes = [sample(split, i) for i in range(count)]
    by_kind: dict[str, list[int]] = defaultdict(list)
    for i, scene in enumerate(scenes):
        by_kind[scene.kind].append(i)
    other = {i: ids[(k + 1) % len(ids)] for ids in by_kind.values() for k, i in enumerate(ids)}
    return [(scene, scenes[other[i]]) for i, scene in enumerate(scenes)]


def evaluate(model_path: Path, split: str, count: int, per_scene: int) -> dict[str, dict]:
    """task -> {n, accuracy, wrong_image} on up to ``per_scene`` questions of each scene."""
    model = LlavaForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_path)
    pairs = scene_set(split, count)
    rows = [(s, w, q) for s, w in pairs for q in s.questions[:per_scene]]
    right = answers(model, processor, [(s.image, q.text) for s, _, q in rows])
    wrong = answers(model, processor, [(w.image, q.text) for _, w, q in rows])
    table = {}
    for task in (t for tasks in TASKS.values() for t in tasks):
        of = [i for i, (_, _, q) in enumerate(rows) if q.task == task]
        truth = [rows[i][2].answer for i in of]
        table[task] = {
            "n": len(of),
            "accuracy": float(np.mean([right[i] == t for i, t in zip(of, truth, strict=True)])),
            "wrong_image": float(np.mean([wrong[i] == t for i, t in zip(of, truth, strict=True)])),
        }
    macro = {
        "n": len(rows),
        "accuracy": float(np.mean([v["accuracy"] for v in table.values()])),
        "wrong_image": float(np.mean([v["wrong_image"] for v in table.values()])),
    }
    return {**table, "macro": macro}


def report(table: dict[str, dict], facts: dict[str, str]) -> str:
    """Markdown of the table and of the facts about the run."""
    lines = ["# Tiny VLM: measured accuracy", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| task | questions | accuracy | wrong image |", "|---|---:|---:|---:|"]
    for task, row in table.items():
        name = f"**{task}**" if task == "macro" else task
        right, wrong = 100 * row["accuracy"], 100 * row["wrong_image"]
        lines.append(f"| {name} | {row['n']} | {right:.1f} % | {wrong:.1f} % |")
    lines += [
        "",
        "Exact match of the generated text, fp32, every question a separate prompt.  *Wrong image*",
        "asks the same question about another test image of the same scene type.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("luvc_fx/apps/demo_model"))
    parser.add_argument("--checkpoint", type=Path, help="adds its training counters to the report")
    parser.add_argument("--split", default="test")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--per-scene", type=int, default=8)
    parser.add_argument("--out", type=Path, help="folder for RESULTS.md and results.json")
    args = parser.parse_args()
    table = evaluate(args.model, args.split, args.scenes, args.per_scene)
    facts = {
        "date": datetime.date.today().isoformat(),
        "split": f"{args.split}, {args.scenes} scenes, {table['macro']['n']} questions",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    if args.checkpoint:
        state = torch.load(args.checkpoint, weights_only=True)["state"]
        facts["training"] = (
            f"{state['step']} steps, {state['images']} images, {state['seconds'] / 60:.0f} minutes"
        )
    text = report(table, facts)
    print(text)
    if args.out:
        (args.out / "RESULTS.md").write_text(text)
        content = {"facts": facts, "tasks": table}
        (args.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
