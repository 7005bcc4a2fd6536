"""What an installed wheel holds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.paths import DEMO_MODEL, ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of the source as it is; built from a copy, so that no stale build/ folder leaks in."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("luvc_fx", "passes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("luvc_fx-*.whl")))


def test_every_source_file_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "luvc_fx").rglob("*.py")}
    expected |= {f"luvc_fx/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "passes").rglob("*.py")}
    expected |= {"luvc_fx/py.typed"}
    expected |= {f"luvc_fx/apps/demo_model/{p.name}" for p in DEMO_MODEL.iterdir()}
    assert expected <= set(wheel.namelist())


def test_the_wheel_installs_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"luvc_fx"}


def test_the_wheel_names_its_command_and_licence(wheel: zipfile.ZipFile) -> None:
    info = next(name for name in wheel.namelist() if name.endswith("/METADATA")).rpartition("/")[0]
    entry_points = wheel.read(f"{info}/entry_points.txt")
    assert b"luvc-fx = luvc_fx.cli.main:main" in entry_points
    assert b"[torch_dynamo_backends]\nluvc_fx = luvc_fx.dynamo.by_name:luvc_fx" in entry_points
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    assert b"License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA")


def test_the_demo_model_is_small_and_holds_no_pickle(wheel: zipfile.ZipFile) -> None:
    files = [entry for entry in wheel.infolist() if entry.filename.startswith("luvc_fx/apps/demo_model/")]
    assert sum(entry.file_size for entry in files) < 20e6
    suffixes = {Path(entry.filename).suffix for entry in files}
    assert suffixes <= {".json", ".jinja", ".safetensors", ".png", ".md"}


def test_constraints_fit_the_declared_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[_normal(pin.name)] = str(pin.specifier).removeprefix("==")
    for text in [*project["dependencies"], *extras["hf"], *extras["cli"], *extras["test"]]:
        wanted = Requirement(text)
        if wanted.name != "luvc-fx":
            assert wanted.specifier.contains(pins[_normal(wanted.name)]), text


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
