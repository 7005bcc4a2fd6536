"""The `luvc-fx` command. Sub-commands live in `luvc_fx/cli/commands`, one file each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from luvc_fx import __version__
from luvc_fx.report.errors import InputError

EXTRAS = ("typer", "rich", "transformers", "PIL", "safetensors", "jinja2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 is success and 2 is a mistake in what was asked for, printed in one line on stderr. Anything else
    that goes wrong is ours, and its traceback is shown.
    """
    try:
        return _run(None if argv is None else list(argv))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        return _refuse(f"{error.name} is not installed; pip install 'luvc-fx[cli]'")
    except InputError as error:
        return _refuse(str(error))


def _run(argv: list[str] | None) -> int:
    import typer

    from luvc_fx.cli.commands import COMMANDS, SETTINGS

    app = typer.Typer(
        help="A visual-token budget compiled into the graph of stock vision-language models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    def version(asked: bool) -> None:
        if asked:
            print(f"luvc-fx {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: bool = typer.Option(
            False,
            "--version",
            callback=version,
            is_eager=True,
            help="Print the version and end.",
        ),
    ) -> None:
        """What belongs to no sub-command."""

    for name, command in COMMANDS.items():
        app.command(name, context_settings=SETTINGS.get(name))(command)
    try:
        return app(argv, prog_name="luvc-fx", standalone_mode=False) or 0
    except typer.Abort:
        return 130
    except Exception as error:
        # Usage errors have this method in click and in the copy of it inside newer versions of typer.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        return _refuse(" ".join(describe().split()) or "see luvc-fx --help")


def _refuse(text: str) -> int:
    # A path or a text that somebody typed may hold the end of a line.
    print(f"luvc-fx: {' '.join(text.splitlines())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
