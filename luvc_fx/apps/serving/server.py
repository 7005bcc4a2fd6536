"""`transformers serve`, with every model that it loads compiled by luvc_fx."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from luvc_fx.apps.serving.checks import check
from luvc_fx.apps.serving.images import reading_as_files
from luvc_fx.apps.serving.stopping import stopping_at_texts
from luvc_fx.generate.chat_prompt import make_prompt
from luvc_fx.generate.frontdoor import compile, report_of
from luvc_fx.generate.hooks import HookedMethod
from luvc_fx.generate.sizes.synthetic_image import synthetic_image
from luvc_fx.generate.sizes.warming import warmup
from luvc_fx.methods.checks import shown
from luvc_fx.report.errors import InputError, brief, cannot
from luvc_fx.schedule import Schedule

log = logging.getLogger(__name__)

REPORT_PATH = "/luvc_fx/report"
"""GET there returns, as JSON, the report of each loaded model, by its name."""

HANDLERS = {"chat_handler": "chat", "completion_handler": "completion", "response_handler": "response"}
"""Arguments of transformers' `build_server` whose requests are checked, and as what."""

BAD_REQUEST = 400


def serve(
    model: str,
    schedule: Schedule,
    inner: str = "inductor",
    options: Sequence[str] = (),
    show: bool = True,
    warm_up: bool = False,
) -> None:
    """Run the server of `transformers serve`, pinned to one model, until it is stopped.

    The server loads its models in one public method and builds its routes in one public function (the
    same from transformers 5.17 to 5.23); both are wrapped while it runs. Of the objects that go through
    them, and of no class, some methods are wrapped: images are read by `read_source`, requests are checked
    by `check`, and what is wrong with a request is answered with status 400 and one sentence.

    Args:
        model: a directory, or a name that `from_pretrained` takes.
        inner: as of `luvc_fx.compile`.
        options: further arguments of `transformers serve`, as one types them.
        show: log every compiled graph's report on stderr.
        warm_up: compile the graphs for one image of the size that the processor expects before listening.

    Raises:
        InputError: a model that cannot be loaded or wired, or no server installed.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise InputError("the server is not installed; pip install 'luvc-fx[serve]'")
    _check_directory(model)
    import typer
    from transformers.cli import serve as command
    from transformers.cli.serving import model_manager, server

    if show:
        _log_reports()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command.Serve)
    manager = _compiling_manager(model_manager.ModelManager, schedule, inner, warm_up)
    with (
        _replaced(model_manager, "ModelManager", manager),
        _replaced(server, "build_server", _with_checks_and_report(server.build_server)),
    ):
        app([model, *options], prog_name="luvc-fx serve", standalone_mode=False)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _check_directory(model: str) -> None:
    if os.path.isfile(model):
        raise InputError(f"model directory '{model}' is a file")
    if os.path.isdir(model) and not os.path.isfile(Path(model) / "config.json"):
        raise InputError(f"'{model}' holds no model: there is no config.json")
    if model.startswith((".", "/", "~")) and not os.path.exists(model):
        raise InputError(f"model directory {shown(model)} does not exist")


def _compiling_manager(base: Any, schedule: Schedule, inner: str, warm_up: bool) -> type:
    class CompilingManager(base):
        """The server's model manager; what it hands out is compiled."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._luvc_lock = threading.Lock()
            try:
                super().__init__(*args, **kwargs)
            except InputError:
                raise
            except Exception as error:
                raise InputError(f"the model cannot be served: {brief(error)}") from error

        def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            model, processor = super().load_model_and_processor(*args, **kwargs)
            with self._luvc_lock:  # requests load from threads of their own
                compile(model, schedule, inner=inner)
                _prepare(model, processor)
                if warm_up and not report_of(model).graphs:
                    log.info("%s", warmup(model, inputs=[_request(model, processor)]))
            return model, processor

    return CompilingManager


def _request(model: Any, processor: Any) -> dict[str, Any]:
    """What a request with one image calls `generate` with: pixels in float32, and the server's tokenizer."""
    inputs = make_prompt(model, processor, [synthetic_image(model, processor)], "Describe the image.")
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    return {**inputs, "tokenizer": processor}


def _prepare(model: Any, processor: Any) -> None:
    """Hooks on one model and its processor; without effect where they are already."""
    images = getattr(processor, "image_processor", None)
    if images is None or "fetch_images" in vars(images):
        return
    fetch = HookedMethod(images, "fetch_images")
    fetch.replace(reading_as_files(fetch.original))
    template = HookedMethod(processor, "apply_chat_template")

    def apply_chat_template(*args: Any, **kwargs: Any) -> Any:
        try:
            return template.original(*args, **kwargs)
        except InputError:
            raise
        except Exception as error:  # templates and processors fail in ways of their own
            raise cannot("the messages cannot be made a prompt", error) from error

    template.replace(apply_chat_template)
    generate = HookedMethod(model, "generate")
    generate.hook(stopping_at_texts(generate.original, processor.tokenizer))


def _with_checks_and_report(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_server(*args: Any, **kwargs: Any) -> Any:
        from fastapi.responses import JSONResponse

        given = inspect.signature(build).bind(*args, **kwargs).arguments
        manager = given["model_manager"]
        for name, kind in HANDLERS.items():
            if given.get(name) is not None:
                handler = HookedMethod(given[name], "handle_request")
                handler.replace(_checked(handler.original, kind, manager))
        app = build(*args, **kwargs)

        def refuse(request: Any, error: Exception) -> Any:
            about = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": about}, status_code=BAD_REQUEST)

        def report() -> dict[str, Any]:
            loaded = {name: timed.model for name, timed in list(manager.loaded_models.items())}
            return {name: report_of(model).to_dict() for name, model in loaded.items()}

        app.exception_handler(InputError)(refuse)
        app.get(REPORT_PATH)(report)
        return app

    return build_server


def _checked(handle: Callable[..., Any], kind: str, manager: Any) -> Callable[..., Any]:
    async def handle_request(body: dict[str, Any], request_id: str) -> Any:
        # The server is pinned to one model, which is loaded unless somebody asked for /reset.
        processor = next((timed.processor for timed in list(manager.loaded_models.values())), None)
        check(kind, body, processor)
        return await handle(body, request_id)

    return handle_request


def _log_reports() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("luvc_fx: %(message)s"))
    logger = logging.getLogger("luvc_fx")
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
