"""One registry knows the names of a kind of method, and fills itself from the files of a folder."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from luvc_fx import mergers, selectors
from luvc_fx.apps.evaluation.methods import methods
from luvc_fx.dynamo.fingerprint import methods_key
from luvc_fx.methods.registry import Method, Registry
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.paths import ROOT

HELPERS = {"__init__", "base", "choose", "cut", "own", "site"}
FILE = """
from dataclasses import dataclass
from %s import METHODS
from luvc_fx.methods.registry import Method

@METHODS.add
@dataclass(frozen=True, slots=True)
class %s(Method):
    name = "%s"
    strength: float = 1.0
"""


@pytest.mark.parametrize("room", [selectors, mergers])
def test_each_file_of_the_room_is_one_method(room: object) -> None:
    registry = selectors.SELECTORS if room is selectors else mergers.MERGERS
    folder = ROOT / "luvc_fx" / room.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    files = {path.stem for path in folder.glob("*.py")} - HELPERS
    defined_in = {type(registry.get(name)).__module__.rpartition(".")[2] for name in registry.names()}
    assert files == defined_in and len(registry.names()) == len(files)
    assert {name.replace("-", "_") for name in registry.names()} == files


def test_a_schedule_has_the_keys_of_the_code_of_its_methods() -> None:
    known = {mergers.MERGERS.fingerprint(name) for name in mergers.MERGERS.names()}
    known |= {selectors.selector_fingerprint(name) for name in selectors.SHIPPED}
    assert len(known) == len(mergers.MERGERS.names()) + len(selectors.SHIPPED)
    tome = Schedule(merge=Merge("width", keep=0.5, layer=1, method="tome"), prune=Prune(keep=0.5, layer=1))
    key = methods_key(tome)
    assert mergers.MERGERS.fingerprint("tome") in key and selectors.selector_fingerprint("spectrum") in key
    assert mergers.MERGERS.fingerprint("oim") not in key


def test_every_selector_can_be_evaluated() -> None:
    assert set(selectors.SHIPPED) <= set(methods())


def test_a_file_is_all_that_a_new_method_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "methods_of_a_test"
    package.mkdir()
    head = "from luvc_fx.methods.registry import Registry\nMETHODS = Registry('method')\n"
    (package / "__init__.py").write_text(head + "METHODS.discover(__name__, __path__)\n")
    for kind in ("Second", "First"):
        (package / f"{kind.lower()}.py").write_text(FILE % (package.name, kind, kind.lower()))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        registry = __import__(package.name).METHODS
        assert registry.names() == ("first", "second")
        made = registry.make("Item", "method", "second", {"strength": 2.0})
        assert made == dataclasses.replace(registry.get("second"), strength=2.0) and str(made) == "second"
        assert registry.make("Item", "method", made, {}) is made
        assert registry.holders("strength") == (registry.get("first"), registry.get("second"))
        assert registry.holders("weight") == ()
        with pytest.raises(ValueError, match=r"Item\.weight is 3; .*which has only strength$"):
            registry.make("Item", "method", "first", {"weight": 3})
        registry.remove("first")
        with pytest.raises(ValueError, match=r"Item\.method is 'first'; allowed: 'second'$"):
            registry.make("Item", "method", "first", {})
    finally:
        for module in [name for name in sys.modules if name.startswith(package.name)]:
            del sys.modules[module]


@dataclasses.dataclass(frozen=True, slots=True)
class Unnamed(Method):
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class Named(Method):
    name = "named"


def test_a_name_is_given_once() -> None:
    registry: Registry[Method] = Registry("method")
    registry.put(Named())
    for method in (Unnamed(), Named()):
        with pytest.raises(ValueError, match="needs a name of its own"):
            registry.put(method)
