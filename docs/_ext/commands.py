"""A directive that shows the options of a ``luvc-fx`` sub-command, read from the command itself."""

from __future__ import annotations

import re
from typing import Any

import typer
from sphinx.util.docutils import SphinxDirective

from luvc_fx.cli.commands import COMMANDS, SETTINGS


def group() -> Any:
    """All sub-commands, as `luvc-fx` has them."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    for name, command in COMMANDS.items():
        app.command(name, context_settings=SETTINGS.get(name))(command)
    return typer.main.get_command(app)


def code_of(text: str) -> str:
    """`text` with the options in it as code, so that their dashes stay."""
    return re.sub(r"(?<![\w`])(--[\w-]+)", r"`\1`", text)


def described(name: str) -> list[str]:
    """The command's help as Markdown: its text, then each argument and option."""
    command = group().commands[name]
    lines = [code_of(" ".join(line.split())) for line in (command.help or "").splitlines()]
    lines += [""]
    for parameter in command.params:
        names = "`, `".join([*parameter.opts, *parameter.secondary_opts])
        if parameter.param_type_name == "argument":
            names = parameter.name.upper()
        about = code_of(" ".join((getattr(parameter, "help", "") or "").split()))
        default = parameter.default
        default = getattr(default, "value", default)
        if isinstance(default, str | int | float) and not isinstance(default, bool) and str(default):
            about += f" Default: `{default}`."
        lines += [f"`{names}`", f": {about}", ""]
    return lines


class Command(SphinxDirective):
    """``{command} demo``."""

    required_arguments = 1

    def run(self) -> list[Any]:
        """The nodes of the text and of the list of options."""
        name = self.arguments[0]
        if name not in COMMANDS:
            raise self.error(f"luvc-fx has no command {name!r}; it has {', '.join(COMMANDS)}")
        return self.parse_text_to_nodes("\n".join(described(name)))


def setup(app: Any) -> dict[str, bool]:
    """Tell Sphinx."""
    app.add_directive("command", Command)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
