"""What versions of torch and transformers do with luvc_fx: an environment a row, and one selection of tests.

    make compat
    python -m tests.compat.check --row oldest newest --keep environments

Each row gets a virtual environment of its own, with its versions of torch and transformers and all else as in
constraints.txt, and runs the tests of selection.txt there. What they say goes into results.json, and from
there into the documentation. That installs torch once a row: gigabytes, of which the temporary folder must
hold one environment at a time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

ROWS: dict[str, tuple[str, str]] = {
    "oldest": ("2.11.0", "5.17.0"),
    "2.12 with 5.20": ("2.12.1", "5.20.2"),
    "constraints": ("2.13.0", "5.23.0"),
    "constraints with 5.24": ("2.13.0", "5.24.0"),
    "2.14 with 5.23": ("2.14.1", "5.23.0"),
    "newest": ("2.15.0", "5.24.0"),
}
"""Of each row the versions of torch and transformers. The oldest are the bounds of pyproject.toml."""

RESULTS = Path(__file__).with_name("results.json")
SELECTION = Path(__file__).with_name("selection.txt")

SECONDS = 3600
"""How long a test may take: a row says what works, whatever else the machine has to do meanwhile."""

CHOSEN_WITH_TORCH = {"torch", "triton", "setuptools"}
CHOSEN_WITH_TRANSFORMERS = {"transformers", "tokenizers", "huggingface_hub", "hf-xet", "safetensors"}
"""Pins of constraints.txt that are for its versions of torch and transformers only."""


def selected() -> list[str]:
    """The tests that run in each row, as pytest takes them."""
    lines = SELECTION.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def constraints(torch: str, transformers: str) -> str:
    """constraints.txt with other versions of those two, and without the pins that go with its own."""
    left_out = CHOSEN_WITH_TORCH | CHOSEN_WITH_TRANSFORMERS
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in left_out]
    return "\n".join([*kept, f"torch=={torch}", f"transformers=={transformers}", ""])


def installed(folder: Path, torch: str, transformers: str) -> Path:
    """Install the checkout and all that its tests need; the environment's Python. What is there is kept."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pins = folder / "constraints.txt"
    pins.write_text(constraints(torch, transformers), encoding="utf-8")
    command = [python, "-m", "pip", "install", "--quiet", "--constraint", pins, "--editable", f"{ROOT}[test]"]
    subprocess.run([str(part) for part in command], check=True, env=_environment())
    return python


def measured(python: Path, folder: Path) -> dict[str, Any]:
    """What the selection says in one environment.

    Raises:
        RuntimeError: the tests did not run.
    """
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    options = ["-m", "", "-p", "no:cacheprovider", f"--timeout={SECONDS}", f"--junitxml={report}"]
    started = time.monotonic()
    done = subprocess.run([python, "-m", "pytest", *options, *selected()], cwd=ROOT, env=_environment())
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}")
    return {**outcomes(report.read_text(encoding="utf-8")), "seconds": round(time.monotonic() - started)}


def outcomes(report: str) -> dict[str, Any]:
    """How many tests of a JUnit report passed and were skipped, and the names of those that failed."""
    cases = list(xml.fromstring(report).iter("testcase"))
    failed = [case for case in cases if any(case.find(kind) is not None for kind in ("failure", "error"))]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed),
    }


def versions(python: Path) -> dict[str, str]:
    """What is installed there; of torch without the name of its build, which is the machine's."""
    program = (
        "import json, platform, torch, transformers; print(json.dumps({'python': platform.python_version(), "
        "'torch': torch.__version__, 'transformers': transformers.__version__}))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return {name: version.partition("+")[0] for name, version in found.items()}


def record(row: str, result: dict[str, Any]) -> None:
    """Put the result of a row in its place in results.json; those of other rows stay."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known[row] = result
    kept = {name: known[name] for name in ROWS if name in known}
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _environment() -> dict[str, str]:
    """This process's, in which nothing of the checkout or of its own packages is found, and one thread."""
    rest = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    quick = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**quick, **rest}


def main() -> int:
    """Run the rows; the exit code says whether a test failed in one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", nargs="+", choices=ROWS, default=[*ROWS], help="only these")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep the environments there, or use them"
    )
    options = parser.parse_args()
    wrong = False
    for row in options.row:
        torch, transformers = ROWS[row]
        print(f"{row}: torch {torch}, transformers {transformers}", flush=True)
        home = options.keep or Path(tempfile.mkdtemp())
        folder = home / re.sub(r"\W+", "-", row)
        try:
            python = installed(folder, torch, transformers)
            result = versions(python) | measured(python, folder)
        finally:
            if options.keep is None:
                shutil.rmtree(home)
        record(row, result | {"date": datetime.date.today().isoformat()})
        for name in result["failed"]:
            print(f"FAILED in {row}: {name}", file=sys.stderr)
        wrong = wrong or bool(result["failed"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
