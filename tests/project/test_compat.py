"""`make compat`: what it runs exists, its rows are those that we promise, and its results count tests."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.compat.check import RESULTS, ROWS, constraints, outcomes, selected
from tests.support.paths import ROOT


def required(package: str) -> Requirement:
    """What pyproject.toml says of torch or transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = map(Requirement, project["dependencies"] + project["optional-dependencies"]["hf"])
    (found,) = [requirement for requirement in every if requirement.name == package]
    return found


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (found,) = [line for line in lines if line.startswith(f"{package}==")]
    return found.partition("==")[2]


@pytest.mark.parametrize(("place", "package"), list(enumerate(["torch", "transformers"])))
def test_rows_are_the_promised_versions(place: int, package: str) -> None:
    specifier = required(package).specifier
    oldest = ROWS["oldest"][place]
    assert min((row[place] for row in ROWS.values()), key=Version) == oldest
    assert max((row[place] for row in ROWS.values()), key=Version) == ROWS["newest"][place]
    assert {clause.operator for clause in specifier} == {">="}, "a newer version is not shut out"
    assert all(Version(clause.version).release == Version(oldest).release[:2] for clause in specifier)
    assert ROWS["constraints"][place] == pinned(package)


@pytest.mark.parametrize("test", selected())
def test_each_selected_test_exists(test: str) -> None:
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not name or name.partition("[")[0] in functions


@pytest.mark.slow
def test_each_selected_case_exists() -> None:
    """With its parameters, of which pytest makes the names."""
    options = ["--collect-only", "-m", "", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *selected()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_committed_results_are_of_these_rows_and_each_failure_is_explained() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert {"oldest", "constraints", "newest"} <= set(results)
    assert {name: (row["torch"], row["transformers"]) for name, row in results.items()} == {
        name: versions for name, versions in ROWS.items() if name in results
    }
    for row in results.values():
        assert sorted(row.get("explained", {})) == row["failed"]
    assert all(row["passed"] >= len(selected()) for row in results.values())


def test_constraints_of_a_row() -> None:
    lines = constraints("2.99.0", "5.99.0").splitlines()
    assert "torch==2.99.0" in lines
    assert "transformers==5.99.0" in lines
    assert f"torch=={pinned('torch')}" not in lines
    assert not [line for line in lines if line.startswith(("tokenizers==", "triton=="))]
    assert f"peft=={pinned('peft')}" in lines


def test_what_a_report_counts() -> None:
    report = (
        '<testsuites><testsuite><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad"><failure/></testcase>'
        '<testcase classname="a" name="broken"><error/></testcase>'
        '<testcase classname="a" name="left out"><skipped/></testcase></testsuite></testsuites>'
    )
    assert outcomes(report) == {"passed": 1, "skipped": 1, "failed": ["a::bad", "a::broken"]}
