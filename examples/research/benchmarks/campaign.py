"""The measurements that need a GPU, the most important first, each written as it finishes.

``python -m examples.research.benchmarks.campaign`` runs the rows below one after the other, each in a
process of its own, and writes results/gpu-NAME.json for each. A row that fails is written too, with its
error, and the next one follows. A row whose file is there without an error is left out, so that a second
call goes on where the first ended. Nothing starts after ``--minutes``, and what runs then is ended.

``--small`` runs every row with few layers and tokens, on a CPU as well, into a folder of its own (``--out``):
it shows that the script works, and its numbers say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.research.paths import ROOT

RESULTS = Path(__file__).parent / "results"
CAMPAIGN, REALISATIONS = (f"examples.research.benchmarks.{name}" for name in ("campaign", "realisations"))
"""Modules, which every row runs from the checkout's root."""
GPU = "gpu-"
"""What the names of these rows' files begin with."""
_PASSED = re.compile(r"\b[1-9]\d* passed\b")
"""In the last lines of pytest; it ends well where everything is skipped, too."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the campaign.

    Attributes:
        shape: of the model, as `luvc-fx bench` has it; None: `script` runs instead.
        options: further ones of `luvc_fx.apps.bench.Options`, without the schedule's default.
        frames: of a video; 0: one image.
        minutes: it may take, were there no other rows.
        script: arguments of a Python process in the checkout's root; ``{out}`` is the folder of results.
        held: its minutes are kept free for it by the rows before.
    """

    name: str
    shape: str | None = None
    frames: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    minutes: float = 5.0
    script: tuple[str, ...] = ()
    held: bool = False


def to_2048() -> Any:
    """8,192 tokens merge to 4,096 in the encoder and are pruned to 2,048 early: the paper's headline."""
    from luvc_fx import Merge, Prune, Schedule

    return Schedule(
        merge=Merge(axis="width", keep=0.5, depth=0.5), prune=Prune(keep=0.5, depth=0.0625, coverage="block")
    )


ROWS = (
    # On an H100 with a cold compile cache 216 s ended it while its second arm was compiled.
    Row("llava-ov-7b-video", "llava-ov-7b", 32, {"new_tokens": 2}, minutes=9),
    Row(
        "internvl2.5-8b-video-to-2048",
        "internvl2.5-8b",
        32,
        {"new_tokens": 1, "schedule": to_2048, "rounds": 5},
    ),
    Row("qwen2-vl-7b-video", "qwen2-vl-7b", 32, {"new_tokens": 1, "rounds": 5}),
    Row("llava-ov-0.5b-image-all-arms", "llava-ov-0.5b", 0, {"arms": "all", "new_tokens": 2}, minutes=6),
    Row("llava-ov-7b-video-cuda-graphs", "llava-ov-7b", 32, {"mode": "reduce-overhead", "new_tokens": 2}),
    Row("realisations", minutes=4, script=("-m", REALISATIONS, "--write", "--dim", "3584", "--out", "{out}")),
    Row("qwen2-vl-2b-video", "qwen2-vl-2b", 32, {"new_tokens": 1, "rounds": 5}, minutes=3),
    Row("internvl2.5-2b-video", "internvl2.5-2b", 32, {"new_tokens": 1, "rounds": 5}, minutes=3),
    Row(
        "llava-ov-7b-image-long-answer",
        "llava-ov-7b",
        0,
        {"text": 512, "new_tokens": 128, "rounds": 3},
        minutes=4,
    ),
    Row(
        "llava-ov-0.5b-image-largest-batch",
        "llava-ov-0.5b",
        0,
        {"batch": None, "new_tokens": 1, "rounds": 3},
        minutes=3,
    ),
    Row("gpu-tests", minutes=3, script=("-m", "pytest", "-q", "-m", "gpu", "tests"), held=True),
)


# --------------------------------------------------------------------------------------------- one row


def measured(row: Row, small: bool) -> dict[str, Any]:
    """What `luvc-fx bench --json` gives for the row."""
    import torch

    from luvc_fx.apps.bench import run

    options = options_of(row, small, torch.cuda.is_available())
    return run(options, lambda text: print(f"... {text}", flush=True)).to_dict()


def options_of(row: Row, small: bool, cuda: bool) -> Any:
    """The row as `luvc_fx.apps.bench.Options`; `small`: cut down to what a CPU does in a minute or two."""
    from luvc_fx.apps.bench import Options
    from luvc_fx.apps.bench.arms import ALL, QUICK
    from luvc_fx.apps.bench.shapes import Visual

    assert row.shape is not None
    given = dict(row.options)
    names = ALL if given.pop("arms", None) == "all" else QUICK
    if "schedule" in given:
        given["schedule"] = given["schedule"]()
    visual = Visual(row.frames, video=True) if row.frames else Visual()
    options = Options(row.shape, visual=visual, names=names, **given)
    if not small:
        return options
    less = dataclasses.replace(visual, count=min(2, visual.count), side=112)
    batch = options.batch if options.batch or cuda else 2
    return dataclasses.replace(
        options,
        visual=less,
        text=8,
        rounds=2,
        layers=3,
        new_tokens=1,
        batch=batch,
        mode=options.mode if cuda else None,
    )


# -------------------------------------------------------------------------------------------- all rows


def campaign(
    rows: tuple[Row, ...], out: Path, minutes: float, small: bool, say: Callable[[str], None]
) -> int:
    """Run what has no result yet; how many rows failed or were not begun."""
    end = time.monotonic() + 60 * minutes
    missing = 0
    for number, row in enumerate(rows):
        path = out / f"{GPU}{row.name}.json"
        if _is_there(path):
            say(f"{row.name}: is there")
            continue
        held = sum(60 * later.minutes for later in rows[number + 1 :] if later.held)
        left = end - held - time.monotonic()
        if left <= 0:
            say(f"{row.name}: no time left")
            missing += 1
            continue
        started = time.monotonic()
        found = _in_a_process(row, path, left if small else min(left, 60 * row.minutes), small)
        took = time.monotonic() - started
        _write(path, json.dumps({"row": row.name, "seconds": took, **found}, indent=1) + "\n")
        missing += "error" in found
        say(f"{row.name}: {found.get('error') or 'done'} ({took:.0f} s)")
    return missing


def _write(path: Path, text: str) -> None:
    """The whole file or nothing: half of one could not be read by the next call."""
    made = path.with_suffix(".part")
    made.write_text(text, encoding="utf-8")
    os.replace(made, path)


def _is_there(path: Path) -> bool:
    return path.exists() and "error" not in json.loads(path.read_text(encoding="utf-8"))


def _in_a_process(row: Row, path: Path, seconds: float, small: bool) -> dict[str, Any]:
    """The row's result, or ``error`` with the end of what it printed; it and its children end in time."""
    made = path.with_suffix(".part")
    if row.shape is None:
        command = [sys.executable, *(part.format(out=path.parent) for part in row.script)]
        if small and REALISATIONS in row.script:
            command += ["--largest", "256", "--images", "1", "--runs", "1"]
    else:
        command = [sys.executable, "-m", CAMPAIGN, "--row", row.name, "--out", str(made)]
        command += ["--small"] if small else []
    log = path.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also when somebody interrupts the campaign
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    printed = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-20:]
    log.unlink()
    if code != 0:
        why = f"ended after {seconds:.0f} s" if code is None else f"exit code {code}"
        made.unlink(missing_ok=True)
        return {"error": why, "printed": printed}
    if row.shape is None:
        if "pytest" in row.script and not small and not any(map(_PASSED.search, printed)):
            return {"error": "no test passed", "printed": printed}
        return {"printed": printed}
    result: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))
    made.unlink()
    return result


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> int:
    """The campaign, or one row of it in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="for everything")
    parser.add_argument("--small", action="store_true", help="few layers and tokens")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these rows")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder of the results; results/ if it is not --small")
    given = parser.parse_args()
    known = {row.name: row for row in ROWS}
    unknown = sorted({*(given.only or ()), *filter(None, [given.row])} - set(known))
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; there are {', '.join(known)}")
    if given.small and given.out is None:
        parser.error("--small needs --out: its numbers are no results")
    if not given.small and not _has_gpu():
        parser.error("there is no CUDA device; --small --out FOLDER tries the script without one")
    if given.row:
        text = json.dumps(measured(known[given.row], given.small))
        given.out.write_text(text, encoding="utf-8")
        return 0
    rows = tuple(row for row in ROWS if not given.only or row.name in given.only)
    out = (given.out or RESULTS).resolve()
    out.mkdir(parents=True, exist_ok=True)
    missing = campaign(rows, out, given.minutes, given.small, lambda text: print(text, flush=True))
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
