"""A directive that lists the selectors or mergers that are registered, with their parameters."""

from __future__ import annotations

import inspect
from typing import Any

from sphinx.util.docutils import SphinxDirective

from luvc_fx.mergers import MERGERS
from luvc_fx.selectors import SELECTORS

REGISTRIES = {"selectors": SELECTORS, "mergers": MERGERS}


def described(registry: Any) -> list[str]:
    """Name, parameters with their defaults, and the first paragraph of each docstring, as Markdown."""
    lines = []
    for name in registry.names():
        method = registry.get(name)
        about = (inspect.getdoc(type(method)) or "").partition("\n\n")[0].replace("``", "`")
        values = ", ".join(f"`{key}={value!r}`" for key, value in method.parameters().items())
        lines += [f'`"{name}"`', ": " + " ".join(about.split())]
        lines += ["", f"  Parameters: {values}", ""] if values else [""]
    return lines


class Methods(SphinxDirective):
    """``{methods} selectors``."""

    required_arguments = 1

    def run(self) -> list[Any]:
        """The nodes of a list of definitions."""
        return self.parse_text_to_nodes("\n".join(described(REGISTRIES[self.arguments[0]])))


def setup(app: Any) -> dict[str, bool]:
    """Tell Sphinx."""
    app.add_directive("methods", Methods)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
