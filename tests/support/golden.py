"""What `luvc-fx` commands printed as JSON in an earlier version, to be compared with what they print now.

`python -m tests.support.golden PROGRAM [CASE ...]` records with the `luvc-fx` at the path PROGRAM. The
files were recorded at commit 089f2fc, before the package was divided into rooms.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.paths import DEMO_MODEL, ROOT
from tests.support.server import running

GOLDEN = ROOT / "tests" / "apps" / "golden"

EAGER = ("--inner", "eager")
IMAGES = tuple(str(DEMO_MODEL / name) for name in ("chart.png", "objects.png"))
QUESTION = ("--question", "which bar is tallest ?")

CASES: Mapping[str, tuple[str, ...]] = {
    "demo": ("demo", *EAGER, "--runs", "1"),
    "demo-options": (
        "demo",
        *EAGER,
        "--runs",
        "2",
        "--image",
        IMAGES[0],
        *QUESTION,
        "--schedule",
        "own.json",
    ),
    "inspect": ("inspect", str(DEMO_MODEL)),
    "inspect-video": ("inspect", str(DEMO_MODEL), "--schedule", "video", "--image", IMAGES[1]),
    "inspect-document": (
        *("inspect", str(DEMO_MODEL), "--schedule", "document"),
        *("--image", IMAGES[0], "--image", IMAGES[1], "--prompt", "which bar is tallest ?"),
    ),
    "inspect-small": ("inspect", "small", "--schedule", "own.json"),
    "eval": (
        *("eval", "--model", "small", "--questions", "questions.jsonl", "--out", "out", *EAGER),
        *("--methods", "spectrum,random,fastv,last", "--budgets", "0.5", "--schedule", "own.json:norm"),
        *("--batch", "4", "--max-new-tokens", "1", "--wrong-image"),
    ),
    "bench": (
        *("bench", "--shape", "llava-ov-0.5b", "--frames", "1", "--text", "8", "--layers", "3"),
        *("--rounds", "1", "--new-tokens", "1", "--quick"),
    ),
}
"""Arguments by case, for a command that runs in a folder with the files of `prepare`."""

SERVE = "serve"
"""The report of a running server."""

VARYING = {
    # times
    *("milliseconds", "compile_seconds", "compile_s", "cached", "prefill_ms", "prefill_spread_ms"),
    *("prefill_speedup", "seconds_per_question", "median_ms", "spread_ms", "cpu_ms", "speedup", "interval"),
    *("cpu_speedup", "realised", "load", "first_s", "inductor_s", "luvc_s", "luvc_share"),
    # machines, versions, and what else the process has compiled
    *("hardware", "versions", "attention", "compile_id", "recompile_reason"),
}
"""Keys whose values differ between runs or machines."""


def prepare(folder: Path) -> None:
    """Write what the commands read: a schedule, the shipped model's first layers, and questions."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    merges = (Merge("width", keep=0.5, layer=0), Merge("height", length=12, layer=1))
    prunes = (Prune(keep=0.5, layer=1, absorb=True), Prune(tokens=5, layer=-1, selector="uniform"))
    (folder / "own.json").write_text(Schedule(merge=merges, prune=prunes).to_json(), encoding="utf-8")
    model = LlavaForConditionalGeneration.from_pretrained(DEMO_MODEL, local_files_only=True)
    for layers, config in (
        (model.model.language_model.layers, model.config.text_config),
        (model.model.vision_tower.encoder.layers, model.config.vision_config),
    ):
        del layers[3:]
        config.num_hidden_layers = 3
    model.save_pretrained(folder / "small")
    AutoProcessor.from_pretrained(DEMO_MODEL, local_files_only=True).save_pretrained(folder / "small")
    lines = [
        {
            "image": str(DEMO_MODEL / scene["image"]),
            "question": question["text"],
            "answer": question["answer"],
            "task": question["task"],
        }
        for scene in json.loads((DEMO_MODEL / "examples.json").read_text(encoding="utf-8"))
        for question in scene["questions"][:4]
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")


def lasting(data: Any) -> Any:
    """`data` without the keys in `VARYING`; floats are rounded, and of absolute paths the name is left."""
    if isinstance(data, dict):
        return {key: lasting(value) for key, value in data.items() if key not in VARYING}
    if isinstance(data, list):
        return [lasting(value) for value in data]
    if isinstance(data, str) and data.startswith("/"):
        return Path(data).name
    return round(data, 6) if isinstance(data, float) else data


def alike(data: Any, recorded: Any) -> Any:
    """`data` without keys that `recorded` does not have: what came later is no difference."""
    if isinstance(data, dict) and isinstance(recorded, dict):
        return {key: alike(value, recorded[key]) for key, value in data.items() if key in recorded}
    if isinstance(data, list) and isinstance(recorded, list) and len(data) == len(recorded):
        return [alike(*pair) for pair in zip(data, recorded, strict=True)]
    return data


def check(case: str, printed: Any) -> None:
    """Fail where `printed`, the JSON of a case, is not what was recorded."""
    recorded = lasting(json.loads((GOLDEN / f"{case}.json").read_text(encoding="utf-8")))
    assert alike(lasting(printed), recorded) == recorded


def write(case: str, printed: Any) -> None:
    """Record the JSON of a case."""
    GOLDEN.mkdir(exist_ok=True)
    text = json.dumps(lasting(printed), indent=1) + "\n"
    (GOLDEN / f"{case}.json").write_text(text, encoding="utf-8")


def main(program: str, *cases: str) -> None:
    """Record these cases, or all."""
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for case in cases or (*CASES, SERVE):
            if case == SERVE:
                with running([program], Path(name) / "stderr") as server:
                    write(case, server.report())
                continue
            command = [program, *CASES[case], "--json"]
            done = subprocess.run(command, cwd=name, stdout=subprocess.PIPE, text=True, check=True)
            write(case, json.loads(done.stdout))


if __name__ == "__main__":
    main(*sys.argv[1:])
