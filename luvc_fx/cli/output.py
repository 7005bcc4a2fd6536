"""Output of the sub-commands: tables or one JSON object on stdout, progress on stderr."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 100
"""Columns of tables that do not go to a terminal."""


def note(text: str) -> None:
    """Print on stderr what happens next, for people who wait."""
    print(f"... {text}", file=sys.stderr, flush=True)


def make_console() -> Console:
    """A console that prints text as it is: nothing is coloured, parsed or cut."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)


def make_table(*headings: str, title: str | None = None, right: bool = False) -> Table:
    """An empty table with these columns, aligned to the right if they hold numbers."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if right else "left")
    return table
