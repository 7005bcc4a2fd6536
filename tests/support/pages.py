"""The pages of the documentation, and the commands that they show."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

from tests.support.paths import EXAMPLES, ROOT

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [
    README,
    *sorted(path for path in DOCS.rglob("*.md") if not {"_build", "_generated"} & set(path.parts)),
]
"""README.md, and what is built into the site."""
OTHER_PAGES = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / ".github").rglob("*.md")),
    *sorted((ROOT / "tests").glob("*.md")),
    *sorted(EXAMPLES.rglob("*.md")),
]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    """The page's path in the checkout."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """The contents of the page's fenced blocks in these languages."""
    return [
        body for language, body in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages
    ]


@cache
def shell_commands(page: Path) -> tuple[str, ...]:
    """Each command of the page's shell blocks: the lines up to where bash can read them as a whole."""
    found = []
    for body in blocks(page, "sh"):
        lines: list[str] = []
        for line in body.splitlines():
            if not lines and (not line or line.startswith("#")):
                continue
            lines.append(line)
            text = "\n".join(lines)
            if not line.endswith("\\") and _is_whole(text):
                found.append(text)
                lines = []
        assert not lines, f"bash cannot read this in {name_of(page)}:\n{body}"
    return tuple(found)


def _is_whole(text: str) -> bool:
    return subprocess.run(["bash", "-n", "-c", text], capture_output=True).returncode == 0
