"""Tables that are made from committed results: docs/_generated/*.md, and their copies in README.md.

``python -m docs.generated --check`` fails where a table is not what its results say, ``--write`` mends it.
Each generator is a module with ``pages() -> {name: Markdown}`` and can be run by itself with the same
options. A table whose name stands between two comments in README.md (``<!-- name: ... -->`` and
``<!-- /name -->``) is put there, too.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDER = ROOT / "docs" / "_generated"
GENERATORS = (
    "tests.support.family_table",
    "examples.research.benchmarks.speed_table",
    "examples.research.evidence.table",
    "tests.compat.table",
)

Pages = dict[str, str]


def in_readme(readme: str, name: str, text: str) -> str:
    """`readme` with `text` between the comments of that name; as it was, where there are none."""
    pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{text.strip()}\n{found[2]}", readme)


def stale(pages: Pages) -> list[str]:
    """What is not as `pages` say: files of docs/_generated and README.md."""
    wrong = []
    for name, text in pages.items():
        file = FOLDER / f"{name}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != text.strip() + "\n":
            wrong.append(f"docs/_generated/{file.name}")
        readme = README.read_text(encoding="utf-8")
        if in_readme(readme, name, text) != readme:
            wrong.append(f"README.md ({name})")
    return wrong


def write(pages: Pages) -> None:
    """Bring docs/_generated and README.md up to date."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages.items():
        (FOLDER / f"{name}.md").write_text(text.strip() + "\n", encoding="utf-8")
        readme = README.read_text(encoding="utf-8")
        README.write_text(in_readme(readme, name, text), encoding="utf-8")


def run(pages: Callable[[], Pages], arguments: argparse.Namespace) -> int:
    """Print, write or check; the exit code."""
    made = pages()
    if arguments.write:
        write(made)
    elif arguments.check:
        wrong = stale(made)
        for file in wrong:
            print(
                f"{file} is not what the results say: run python -m docs.generated --write", file=sys.stderr
            )
        return bool(wrong)
    else:
        print("\n\n".join(made.values()))
    return 0


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all generators have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    either = made.add_mutually_exclusive_group()
    either.add_argument("--write", action="store_true", help="into docs/_generated and README.md")
    either.add_argument("--check", action="store_true", help="fail where they say something else")
    return made


def all_pages() -> Pages:
    """The pages of all generators."""
    made: Pages = {}
    for name in GENERATORS:
        made |= importlib.import_module(name).pages()
    return made


if __name__ == "__main__":
    sys.exit(run(all_pages, parser(__doc__).parse_args()))
