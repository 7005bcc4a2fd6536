"""Read what people hand to a command: schedules and images, with errors of one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, TYPE_CHECKING

from luvc_fx.generate.rgb import Say, to_rgb
from luvc_fx.methods.checks import shown
from luvc_fx.report.errors import InputError, cannot, one_line
from luvc_fx.schedule import KINDS, Schedule

if TYPE_CHECKING:
    from PIL.Image import Image


def read_schedule(value: str) -> Schedule:
    """The preset of that name, or the schedule in that JSON file.

    Raises:
        InputError: neither a preset nor a readable file, or a file that holds no schedule.
    """
    if value in KINDS:
        return Schedule.preset(value)
    if not os.path.lexists(value):
        raise InputError(f"schedule {shown(value)} is neither a preset ({', '.join(KINDS)}) nor a file")
    try:
        return Schedule.load(value)
    except UnicodeDecodeError:
        raise InputError(f"schedule {value!r} is not a text file") from None
    except OSError as error:
        raise InputError(f"schedule {value!r} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"schedule {value!r}: {one_line(error)}") from None


def read_image(path: Path, say: Say = lambda _: None) -> Image:
    """The image in that file, as RGB: the one way in which commands read images (see `to_rgb`).

    Of a file with several frames the first is read.

    Args:
        say: called with a line about each thing that was done and may be unexpected: further frames that
            are left out, transparent parts, values scaled from the least to the greatest.

    Raises:
        InputError: no such file, or none that Pillow can decode to the end.
    """
    return decode(path, f"image '{path}'", say)


def decode(file: Path | IO[bytes], what: str, say: Say = lambda _: None) -> Image:
    """As `read_image`, from a path or from an open file, called `what` in errors."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            frames = getattr(image, "n_frames", 1)
            found = to_rgb(image, lambda did: say(f"{what}: {did}"))
    except UnidentifiedImageError:
        if _is_empty(file):
            raise InputError(f"{what} is empty") from None
        raise InputError(f"{what} is not in a format that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{what} cannot be decoded: {one_line(error)}") from None
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror or one_line(error)}") from None
    except Exception as error:  # a broken file fails in as many ways as there are formats
        raise cannot(f"{what} cannot be decoded", error) from None
    if frames > 1:
        say(f"{what}: the first of {frames} frames is used")
    return found


def _is_empty(file: Path | IO[bytes]) -> bool:
    if isinstance(file, Path):
        return file.stat().st_size == 0
    return file.seek(0, os.SEEK_END) == 0
