"""README.md and docs/: what they show comes from programs, and what they name is there.

Pages take the lines of a program by `literalinclude`. README.md cannot, so each of its Python blocks has to
be one region of a program (``# NAME`` to ``# end of NAME``). Commands are parsed by the commands themselves.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from luvc_fx import Reason
from luvc_fx.cli.commands import COMMANDS, SETTINGS
from tests.support.paths import EXAMPLES, ROOT

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [
    README,
    *sorted(path for path in DOCS.rglob("*.md") if not {"_build", "_generated"} & set(path.parts)),
]
OTHER_PAGES = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "tests").glob("*.md")),
    *sorted(EXAMPLES.rglob("*.md")),
]
PROGRAMS = sorted([*DOCS.glob("programs/*.py"), *EXAMPLES.glob("*.py")])
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
REGION = re.compile(r"^ *# (?P<name>[^\n]+)\n(?P<body>.*?)^ *# end of (?P=name)$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:luvc_fx|passes|tests|examples|docs)/(?!_build/)[\w./-]+|[\w-]+\.(?:txt|toml))`")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [
        body for language, body in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages
    ]


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


def commands(page: Path) -> list[list[str]]:
    """Words of each command in the page's shell blocks."""
    found = []
    for body in blocks(page, "sh"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


def group() -> Any:
    app = typer.Typer(add_completion=False)
    for name, command in COMMANDS.items():
        app.command(name, context_settings=SETTINGS.get(name))(command)
    return typer.main.get_command(app)


def complaint(words: list[str]) -> str | None:
    """What is wrong with a command, as far as it can be told without running it."""
    program, *rest = words
    if program == "luvc-fx":
        if rest[0] not in COMMANDS:
            return f"luvc-fx has no command {rest[0]}"
        try:
            group().commands[rest[0]].make_context(rest[0], rest[1:])
        except Exception as error:
            return repr(error)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return None if rest[0] in targets else f"the Makefile has no target {rest[0]}"
    elif program in ("python", "python3") and rest[0] == "-m":
        if find_spec(rest[1]) is None:
            return f"there is no module {rest[1]}"
    elif program == "python" or program == "torchrun":
        return None if any((ROOT / word).is_file() for word in rest) else "no file of the checkout is run"
    elif program not in ("pip", "curl", "git", "cd"):
        return f"{program} is not known here"
    return None


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=name_of)
def test_commands_are_those_that_there_are(page: Path) -> None:
    for words in commands(page):
        assert complaint(words) is None, " ".join(words)


def test_a_wrong_command_is_found() -> None:
    assert "no command" in str(complaint(["luvc-fx", "fly"]))
    assert "--fly" in str(complaint(["luvc-fx", "demo", "--fly"]))
    assert complaint(["luvc-fx", "demo", "--json"]) is None
    assert "no target" in str(complaint(["make", "fly"]))
    assert "no module" in str(complaint(["python", "-m", "luvc_fx.fly"]))
    assert "no file" in str(complaint(["torchrun", "fly.py"]))
    assert "not known" in str(complaint(["fly"]))


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
