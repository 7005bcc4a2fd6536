"""A version newer than those of `make compat` is warned of once, and is no obstacle."""

from __future__ import annotations

import importlib.metadata
import re
import warnings

import pytest
from packaging.version import Version

import luvc_fx
from luvc_fx import LuvcWarning
from tests.compat.check import ROWS

real = importlib.metadata.version


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Give a package another version."""

    def set_version(package: str, installed: str) -> None:
        monkeypatch.setattr(
            "luvc_fx.dynamo.untested.version", lambda name: installed if name == package else real(name)
        )

    return set_version


@pytest.mark.parametrize(
    ("package", "installed"),
    [
        ("torch", "2.99.0a0+git1"),
        ("torch", "3.0.0"),
        ("transformers", "5.40.0.dev0"),
        ("transformers", "6.0.0"),
    ],
)
def test_a_newer_version_is_warned_of_once(pretend, package: str, installed: str) -> None:
    pretend(package, installed)
    with pytest.warns(LuvcWarning, match=re.escape(f"{package} {installed} is newer")) as seen:
        luvc_fx.backend("image", inner="eager")
        luvc_fx.backend("image", inner="eager")
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("row", ROWS)
def test_versions_that_were_tried_are_not(pretend, row: str) -> None:
    for package, installed in zip(("torch", "transformers"), ROWS[row], strict=True):
        pretend(package, installed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            luvc_fx.backend("image", inner="eager")


def test_the_next_minor_version_of_the_newest_row_was_not(pretend) -> None:
    for place, package in enumerate(("torch", "transformers")):
        newest = max(Version(versions[place]) for versions in ROWS.values())
        pretend(package, f"{newest.major}.{newest.minor + 1}.0")
        with pytest.warns(LuvcWarning, match=package):
            luvc_fx.backend("image", inner="eager")
