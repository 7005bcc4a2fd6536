"""What holds for the repository as a whole: its root, its rooms, its changelog, its hooks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import luvc_fx
from tests.release.build import tracked
from tests.support.paths import ROOT

PACKAGE = ROOT / "luvc_fx"
MOST_FILES = 10
"""At the root of the package: what is more than that belongs into a room."""

MACHINE = re.compile(r"(?<![\w.~$}])/(?:work|root|home|Users|tmp|mnt|opt|scratch)/\w+")
"""An absolute path of somebody's machine."""


def rooms() -> set[str]:
    """Folders and modules at the root of the package."""
    names = {name.split("/")[1] for name in tracked() if name.startswith("luvc_fx/")}
    found = {name.removesuffix(".py") for name in names if name.endswith(".py") or (PACKAGE / name).is_dir()}
    return found - {"__init__"}


def test_the_root_of_the_package_has_few_files() -> None:
    names = {name for name in tracked() if name.count("/") == 1 and name.startswith("luvc_fx/")}
    assert len(names) <= MOST_FILES, sorted(names)


def test_passes_are_a_link_to_the_folder_beside_the_package() -> None:
    link = PACKAGE / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")
    assert "luvc_fx/passes" in tracked()


def test_every_room_is_in_the_import_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (contract,) = (each for each in contracts if each["name"] == "Rooms")
    named = [room.strip().removeprefix("luvc_fx.") for line in contract["layers"] for room in line.split("|")]
    assert sorted(named) == sorted(rooms())


def test_the_architecture_page_has_every_room() -> None:
    page = (ROOT / "docs" / "develop" / "architecture.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    described = {
        *re.findall(r"`luvc_fx/(\w+)(?:\.py)?`", table),
        *re.findall(r"^\| `(passes)`", table, re.MULTILINE),
    }
    assert sorted(rooms() - described) == []


def test_the_changelog_has_the_current_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == luvc_fx.__version__
    assert all(date for _, date in headings[1:])


def test_hooks_run_what_make_lint_runs() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for source in settings["repos"] for hook in source["hooks"]]
    recipe = re.search(
        r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert recipe is not None
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert [hook["entry"] for hook in hooks] == commands
    assert {source["repo"] for source in settings["repos"]} == {"local"}
    assert {(hook["language"], hook["pass_filenames"]) for hook in hooks} == {("system", False)}


def test_no_file_names_a_path_of_a_machine() -> None:
    found = []
    for name in tracked():
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data[:1024]:
            found += [f"{name}: {match[0]}" for match in MACHINE.finditer(data.decode("utf-8", "replace"))]
    assert found == []
