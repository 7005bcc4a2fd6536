"""`luvc-fx serve`: an OpenAI-style server whose model runs with a token budget."""

from __future__ import annotations

from typing import Annotated

import typer

from luvc_fx.apps.inputs import read_schedule
from luvc_fx.apps.serving import serve as run
from luvc_fx.cli.commands.demo import Inner


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A directory or a name that from_pretrained can load.")],
    schedule: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="image, video, document or a JSON file.")
    ] = "image",
    inner: Annotated[Inner, typer.Option(help="What compiles the graphs.")] = Inner.INDUCTOR,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="Compile for one image of the usual size before listening.")
    ] = False,
) -> None:
    """Run `transformers serve` for one model, compiled with a schedule.

    All further options are those of `transformers serve` (--host, --port, --device, --dtype ...). What
    each graph became is logged on stderr, and GET /luvc_fx/report has it as JSON.
    """
    run(model, read_schedule(schedule), inner.value, context.args, warm_up=warm_up)
