"""Build the wheel and the source distribution of the files that git tracks."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

# Not needed to build, and 45 MB of them.
_LEFT_OUT = "examples/research/models/"


@dataclass(frozen=True, slots=True)
class Distributions:
    """What was built: both from the checkout, and a second wheel from the source distribution."""

    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


def tracked() -> list[str]:
    """Paths of the files and links that git tracks and that are there, relative to the checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def packaged() -> set[str]:
    """Where tracked files have to be in the wheel: all under ``luvc_fx``, passes as ``luvc_fx/passes``."""
    names = {name for name in tracked() if (ROOT / name).is_file()}
    passes = {f"luvc_fx/{name}" for name in names if name.startswith("passes/")}
    return passes | {name for name in names if name.startswith("luvc_fx/")}


def build(folder: Path) -> Distributions:
    """Build in `folder` from a copy of the tracked files, so that nothing else of the checkout leaks in.

    The running environment's setuptools does it, without a network.
    """
    source, first, second = folder / "source", folder / "dist", folder / "again"
    for name in tracked():
        if not name.startswith(_LEFT_OUT):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    sdist = _sdist(source, first)
    return Distributions(_wheel(source, first), sdist, _wheel(sdist, second))


def contents(wheel: Path) -> dict[str, bytes]:
    """Each file of the wheel, by its path."""
    with zipfile.ZipFile(wheel) as file:
        return {entry.filename: file.read(entry) for entry in file.infolist() if not entry.is_dir()}


def _sdist(source: Path, out: Path) -> Path:
    out.mkdir()
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.tar.gz"))


def _wheel(source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl"))
