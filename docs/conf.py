"""How Sphinx makes the pages: ``make docs`` writes them to docs/_build/html."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

project = "luvc_fx"
author = "the luvc_fx authors"
copyright = "the luvc_fx authors, Apache-2.0"
release = installed("luvc-fx")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "commands"]
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
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
python_use_unqualified_type_names = True

# Types of other packages: their pages are not looked up, so that the build needs no network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|PIL|collections|pathlib|typing|types|fx|Tensor|Any|os)(\..*)?"),
]
