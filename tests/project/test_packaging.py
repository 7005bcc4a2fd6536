"""What a release holds, and that it works where the checkout is not."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import luvc_fx
from luvc_fx.cli.main import main as cli
from tests.release.build import Distributions, build, contents, packaged
from tests.release.check import demo, faults, run
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    return build(tmp_path_factory.mktemp("distributions"))


@pytest.fixture(scope="module")
def files(made: Distributions) -> dict[str, bytes]:
    """The wheel's files, by path."""
    return contents(made.wheel)


@pytest.fixture(scope="module")
def information(files: dict[str, bytes]) -> str:
    """The folder of the wheel's metadata."""
    return next(name for name in files if name.endswith("/METADATA")).rpartition("/")[0]


def test_every_tracked_file_of_the_package_is_in_the_wheel(files: dict[str, bytes]) -> None:
    wanted = packaged()
    assert {"luvc_fx/py.typed", "luvc_fx/passes/prune_tokens.py"} < wanted
    assert sorted(wanted - set(files)) == []


def test_the_wheel_holds_the_package_and_nothing_else(files: dict[str, bytes], information: str) -> None:
    rest = {name for name in files if not name.startswith(f"{information}/")}
    assert sorted(rest - packaged()) == []


def test_passes_are_real_files_of_the_source_distribution(made: Distributions) -> None:
    with tarfile.open(made.sdist) as file:
        members = {member.name.partition("/")[2]: member for member in file.getmembers()}
    assert packaged() <= set(members)
    assert "LICENSE" in members
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert not [name for name in members if name.startswith("passes/")], "once, and not twice"


def test_the_source_distribution_makes_the_same_wheel(made: Distributions, files: dict[str, bytes]) -> None:
    again = contents(made.wheel_of_sdist)
    assert sorted(again) == sorted(files)
    assert [name for name in files if again[name] != files[name]] == []


def test_the_wheel_names_its_command_and_licence(files: dict[str, bytes], information: str) -> None:
    entry_points = files[f"{information}/entry_points.txt"]
    assert b"luvc-fx = luvc_fx.cli.main:main" in entry_points
    assert b"[torch_dynamo_backends]\nluvc_fx = luvc_fx.dynamo.by_name:luvc_fx" in entry_points
    assert b"Apache License" in files[f"{information}/licenses/LICENSE"]
    assert b"License-Expression: Apache-2.0" in files[f"{information}/METADATA"]


def test_one_version(files: dict[str, bytes], information: str, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = email.message_from_bytes(files[f"{information}/METADATA"])
    assert metadata["Version"] == luvc_fx.__version__
    assert cli(["--version"]) == 0
    assert capsys.readouterr().out == f"luvc-fx {luvc_fx.__version__}\n"


def test_the_demo_model_is_small_and_holds_no_pickle(files: dict[str, bytes]) -> None:
    model = {name: data for name, data in files.items() if name.startswith("luvc_fx/apps/demo_model/")}
    assert sum(map(len, model.values())) < 20e6
    assert {Path(name).suffix for name in model} <= {".json", ".jinja", ".safetensors", ".png", ".md"}


@pytest.fixture(scope="module")
def commands(made: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, in front of the packages of this one; its folder of commands."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    place = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # The .pth files of that folder are not read, so an editable install of the checkout is not found.
    (place / "these.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    options = ["--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*command, *options, str(made.wheel)], check=True, capture_output=True, cwd=folder)
    return folder / "bin"


def test_the_installed_command_is_of_the_wheel(commands: Path) -> None:
    assert run([commands / "luvc-fx", "--version"], commands) == f"luvc-fx {luvc_fx.__version__}\n"
    program = "import luvc_fx.passes; print(luvc_fx.passes.__file__)"
    where = Path(run([commands / "python", "-c", program], commands).strip())
    assert where.is_relative_to(commands.parent)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_installed_command_answers_outside_the_checkout(commands: Path) -> None:
    """With the packages of the running environment; `make release-check` installs everything anew."""
    result = demo(commands, "--inner", "eager", "--runs", "1")
    assert faults(result) == []
    assert {graph["kind"] for graph in result["report"]["graphs"]} >= {"vision", "prefill"}


def test_the_release_check_finds_faults() -> None:
    right = {
        "expected": "left",
        "baseline": {"answer": "left"},
        "luvc": {"answer": "left"},
        "versions": {"luvc-fx": luvc_fx.__version__},
        "budget": 0.3,
        "no_speedup_because": [],
    }
    assert faults(right) == []
    wrong = {
        "luvc": {"answer": "right"},
        "baseline": {"answer": ""},
        "versions": {"luvc-fx": "0"},
        "budget": 1.0,
        "no_speedup_because": ["it ran eagerly"],
    }
    for key, value in wrong.items():
        assert len(faults({**right, key: value})) == 1, key


def test_constraints_fit_the_declared_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[_normal(pin.name)] = str(pin.specifier).removeprefix("==")
    for text in [*project["dependencies"], *extras["hf"], *extras["cli"], *extras["test"], *extras["docs"]]:
        wanted = Requirement(text)
        if wanted.name != "luvc-fx":
            assert wanted.specifier.contains(pins[_normal(wanted.name)]), text


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
