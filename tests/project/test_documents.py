"""README.md and docs/: what they show comes from programs, and what they name is there.

Pages take the lines of a program by `literalinclude`. README.md cannot, so each of its Python blocks has to
be one region of a program (``# NAME`` to ``# end of NAME``). Commands are run by `test_commands`.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from luvc_fx import Reason
from tests.support.pages import BLOCK, DOCS, OTHER_PAGES, PAGES, README, blocks, name_of
from tests.support.paths import EXAMPLES, ROOT

PROGRAMS = sorted([*DOCS.glob("programs/*.py"), *EXAMPLES.glob("*.py")])
REGION = re.compile(r"^ *# (?P<name>[^\n]+)\n(?P<body>.*?)^ *# end of (?P=name)$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:luvc_fx|passes|tests|examples|docs)/(?!_build/)[\w./-]+|[\w-]+\.(?:txt|toml))`")


def regions(program: Path) -> dict[str, str]:
    found = REGION.finditer(program.read_text(encoding="utf-8"))
    return {match["name"]: textwrap.dedent(match["body"]).strip() for match in found}


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_python_in_the_readme_is_what_programs_run() -> None:
    run = [body for program in PROGRAMS for body in regions(program).values()]
    shown = blocks(README, "python")
    assert shown
    for body in shown:
        assert body.strip() in run, f"no program has a region with these lines:\n{body}"


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_a_page_shows_lines_of_programs_that_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not blocks(page, "python", "py", "pycon"), "take the lines of a program by literalinclude"
    for header, body in re.findall(
        r"^```\{literalinclude\} ([^\n]+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    ):
        source = (page.parent / header).resolve()
        assert source.is_file(), header
        options = dict(re.findall(r"^:([\w-]+): *(.*)$", body, re.MULTILINE))
        if source.suffix == ".py" and "start-after" in options:
            name = options["start-after"].strip('"').removeprefix("# ")
            assert options["end-before"].strip('"') == f"# end of {name}"
            assert name in regions(source), f"{header} has no region {name!r}"
            # Sphinx looks for the text anywhere in a line.
            assert source.read_text(encoding="utf-8").count(options["start-after"].strip('"')) == 1
        elif source.suffix == ".py" and "pyobject" in options:
            assert re.search(rf"^(def|class) {options['pyobject']}\b", source.read_text(), re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    found = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Inside the checkout; other sites are not asked."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for links in LINK.findall(text):
        target = next(filter(None, links))
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    for named in NAMED.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / named).exists(), named


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set()
    for body in re.findall(
        r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL
    ):
        listed |= {line for line in body.splitlines() if line and not line.startswith(":")}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES[1:]}
    assert pages - {"index"} == listed


def test_every_reason_is_explained() -> None:
    text = (DOCS / "reference" / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == {reason.value for reason in Reason}
