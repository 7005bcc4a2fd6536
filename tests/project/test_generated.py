"""Tables of the documentation are what their generators make of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import generated


def test_the_committed_tables_are_those_of_the_results() -> None:
    assert generated.stale(generated.all_pages()) == [], "run python -m docs.generated --write"


def test_a_table_that_says_something_else_is_found_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "README", tmp_path / "README.md")
    monkeypatch.setattr(generated, "FOLDER", tmp_path / "made")
    generated.README.write_text(
        "one\n<!-- cost: of a bench -->\nold\n<!-- /cost -->\ntwo\n", encoding="utf-8"
    )
    pages = {"cost": "| a |\n| - |\n| 3 |", "other": "x"}
    assert generated.stale(pages) == [
        "docs/_generated/cost.md",
        "README.md (cost)",
        "docs/_generated/other.md",
    ]
    generated.write(pages)
    assert generated.stale(pages) == []
    wanted = "one\n<!-- cost: of a bench -->\n| a |\n| - |\n| 3 |\n<!-- /cost -->\ntwo\n"
    assert generated.README.read_text(encoding="utf-8") == wanted
    arguments = generated.parser("").parse_args(["--check"])
    assert generated.run(lambda: pages, arguments) == 0
    assert generated.run(lambda: pages | {"other": "y"}, arguments) == 1
