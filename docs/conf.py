"""How Sphinx makes the pages: ``make docs`` writes them to docs/_build/html."""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

project = "luvc_fx"
author = "the luvc_fx authors"
copyright = "the luvc_fx authors, Apache-2.0"
release = installed("luvc-fx")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "commands",
    "methods",
]
exclude_patterns = ["_build", "_generated", "programs"]
html_theme = "furo"
html_title = "luvc_fx"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings put code into single backticks.
default_role = "literal"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"

autodoc_preserve_defaults = True
napoleon_use_ivar = True
python_use_unqualified_type_names = True

# Types without a page here; those of other packages are not looked up, so that the build needs no network.
nitpick_ignore_regex = [
    ("py:class", r"luvc_fx\.passes\.support\..*"),  # what a pass is given, not what it has to know
    ("py:.*", r"(torch|transformers|PIL|collections|pathlib|typing|types|fx|Tensor|Any|os|Image)(\..*)?"),
]

_SHARED = re.compile(r"^(\s+)(\w+(?:, \w+)+): ")
"""``name, other: text`` in a list of arguments or attributes."""


def one_entry_a_name(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give each of several names that share an entry of a docstring one of its own."""
    made: list[str] = []
    while lines:
        line = lines.pop(0)
        shared = _SHARED.match(line)
        if shared is None:
            made.append(line)
            continue
        indent, names, text = shared[1], shared[2].split(", "), line[shared.end() :]
        more = []
        while lines and lines[0].startswith(indent + " "):
            more.append(lines.pop(0))
        for each in names:
            made += [f"{indent}{each}: {text}", *more]
    lines[:] = made


def setup(app: Any) -> None:
    """Before napoleon reads the docstrings."""
    app.connect("autodoc-process-docstring", one_entry_a_name, priority=400)
