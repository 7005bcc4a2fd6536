"""The check before a release: wheel and source distribution, each installed afresh and put to work.

    make release-check

Both are built from the files that git tracks, and each goes with the pinned versions of constraints.txt into
a virtual environment of its own outside the checkout, where ``luvc-fx demo --json`` has to answer. That
installs torch twice: minutes, and a few gigabytes of the temporary folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import luvc_fx
from tests.release.build import build, contents, packaged
from tests.support.paths import ROOT


def installed(folder: Path, what: Path) -> Path:
    """Install `what` with its extra ``cli`` into a fresh virtual environment; its folder of commands."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    run([*command, f"{what}[cli]"], folder)
    return folder / "bin"


def demo(commands: Path, *options: str) -> dict[str, Any]:
    """What ``luvc-fx demo --json`` of that environment prints, started outside the checkout."""
    return json.loads(run([commands / "luvc-fx", "demo", "--json", *options], commands.parent))


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong with the demo's JSON; empty where the installed package does its job."""
    found = [f"no speed-up is given: {reason}" for reason in result["no_speedup_because"]]
    for arm in ("baseline", "luvc"):
        if result[arm]["answer"] != result["expected"]:
            found.append(f"{arm} answers {result[arm]['answer']!r}, not {result['expected']!r}")
    if result["versions"]["luvc-fx"] != luvc_fx.__version__:
        found.append(f"version {result['versions']['luvc-fx']}, not {luvc_fx.__version__}")
    if not result["budget"] < 1:
        found.append(f"a budget of {result['budget']}: no visual token was saved")
    return found


def run(command: list[Any], folder: Path) -> str:
    """What the command prints on stdout; its errors go where ours go."""
    # Neither the checkout nor the packages of this process may be found by it.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def main() -> int:
    """All of it; the exit code says whether anything was wrong."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    say = functools.partial(print, flush=True)
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = build(folder)
        files = contents(made.wheel)
        say(f"{made.wheel.name}: {len(files)} files, {made.wheel.stat().st_size / 1e6:.1f} MB")
        say(f"{made.sdist.name}: {made.sdist.stat().st_size / 1e6:.1f} MB")
        wrong += [f"not in the wheel: {path}" for path in sorted(packaged() - set(files))]
        if files != contents(made.wheel_of_sdist):
            wrong.append("the wheel made of the source distribution is another")
        for what in (made.wheel, made.sdist):
            started = time.monotonic()
            commands = installed(folder / f"venv-{what.suffix[1:]}", what)
            say(f"{what.name}: installed in {time.monotonic() - started:.0f} s")
            say(f"  {run([commands / 'luvc-fx', '--version'], folder).strip()}")
            result = demo(commands)
            arms = {arm: result[arm]["answer"] for arm in ("baseline", "luvc")}
            say(f"  {result['question']} {arms}, budget {result['budget']:.3f}, {result['versions']}")
            wrong += [f"{what.name}: {fault}" for fault in faults(result)]
    for fault in wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
