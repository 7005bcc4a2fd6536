"""The images of requests, read as those of files are."""

from __future__ import annotations

import base64
import binascii
import logging
import os
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luvc_fx import __version__
from luvc_fx.apps.inputs import decode
from luvc_fx.generate.rgb import to_rgb
from luvc_fx.report.errors import InputError, cannot

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

FETCH_SECONDS = 20.0
"""How long a server that an image's URL names may be silent. Without a limit it would stop all requests."""

SHOWN = 48
"""Characters of an image's source in a message; a data URL has megabytes."""


def reading_as_files(fetch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Stands for an image processor's `fetch_images`: texts and PIL images are read by us, all else by it."""

    def fetch_images(images: Any) -> Any:
        from PIL import Image

        if isinstance(images, (list, tuple)):
            return [fetch_images(image) for image in images]
        if isinstance(images, str):
            return read_source(images)
        return to_rgb(images) if isinstance(images, Image.Image) else fetch(images)

    return fetch_images


def read_source(source: str) -> Image:
    """The image that a URL, a data URL, a path on this machine or plain base64 stands for, as RGB.

    Raises:
        InputError: naming the source, for what cannot be fetched or decoded.
    """
    short = source if len(source) <= SHOWN else f"{source[: SHOWN - 3]}..."
    what = f"image {short!r}"
    if source.startswith(("http://", "https://")):
        return decode(BytesIO(_fetched(source, what)), what, log.info)
    if os.path.isfile(source):
        return decode(Path(source), what, log.info)
    given = source.partition(",")[2] if source.startswith("data:") else source
    try:
        content = base64.b64decode("".join(given.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(
            f"{what} is no base64; allowed: a URL, data:image/...;base64,..., a file of the server, or base64"
        ) from None
    return decode(BytesIO(content), what, log.info)


def _fetched(url: str, what: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"luvc-fx/{__version__}"})
        with urllib.request.urlopen(request, timeout=FETCH_SECONDS) as answer:
            content: bytes = answer.read()
    except (OSError, HTTPException, ValueError) as error:
        raise cannot(f"{what} cannot be fetched", error) from error
    return content
