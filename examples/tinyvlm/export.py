"""Export a training checkpoint as a ``from_pretrained`` folder (fp16 safetensors) with examples."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from model import build_model, build_processor
from scenes import sample

EXAMPLES = {"objects": 14, "chart": 2}  # kind -> seed of the dev scene shipped as an example


def export(checkpoint: Path, out: Path) -> None:
    """Write weights, configs, tokenizer, processor and two example scenes to ``out``."""
    model = build_model()
    content = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(content["model"])
    model.half().save_pretrained(out)
    build_processor().save_pretrained(out)
    listed = []
    for kind, seed in EXAMPLES.items():
        scene = sample("dev", seed, kind)
        scene.image.save(out / f"{kind}.png", optimize=True)
        questions = [{"task": q.task, "text": q.text, "answer": q.answer} for q in scene.questions]
        listed.append({"image": f"{kind}.png", "kind": kind, "questions": questions})
    (out / "examples.json").write_text(json.dumps(listed, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/tinyvlm/checkpoint.pt"))
    parser.add_argument("--out", type=Path, default=Path("luvc_fx/demo_model"))
    args = parser.parse_args()
    export(args.checkpoint, args.out)


if __name__ == "__main__":
    main()
