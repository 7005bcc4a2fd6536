"""Export a training checkpoint as a ``from_pretrained`` folder (fp16 safetensors) with examples.

python -m examples.research.tinyvlm.export --checkpoint runs/tinyvlm/checkpoint.pt --out OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from examples.research.tinyvlm.families import family, with_depth
from examples.research.tinyvlm.scenes import sample

_DECODER = "language_model.layers."  # in the names of a decoder layer's parameters
EXAMPLES = {"objects": 14, "chart": 2}  # kind -> seed of the dev scene shipped as an example


def export(checkpoint: Path, out: Path, name: str = "llava", examples: bool = False) -> None:
    """Write weights, configs, tokenizer and processor to ``out``, and two scenes with ``examples``."""
    kind = family(name)
    content = torch.load(checkpoint, weights_only=True, map_location="cpu")
    depth = len({name.split(".layers.")[1].split(".")[0] for name in content["model"] if _DECODER in name})
    model = with_depth(kind.build(), depth)
    model.load_state_dict(content["model"])
    model.half().save_pretrained(out)
    kind.processor().save_pretrained(out)
    if not examples:
        return
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
    parser.add_argument("--out", type=Path, default=Path("luvc_fx/apps/demo_model"))
    parser.add_argument("--family", default="llava", help="llava, internvl or qwen2_vl")
    parser.add_argument("--examples", action="store_true", help="two scenes, as in the shipped folder")
    args = parser.parse_args()
    export(args.checkpoint, args.out, args.family, args.examples)


if __name__ == "__main__":
    main()
