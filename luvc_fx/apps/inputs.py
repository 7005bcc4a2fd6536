"""Read what people hand to a command: schedules and images, with errors of one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from luvc_fx.report.errors import InputError, one_line
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
        raise InputError(f"schedule {value!r} is neither a preset ({', '.join(KINDS)}) nor a file")
    try:
        return Schedule.load(value)
    except UnicodeDecodeError:
        raise InputError(f"schedule {value!r} is not a text file") from None
    except OSError as error:
        raise InputError(f"schedule {value!r} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"schedule {value!r}: {one_line(error)}") from None


def read_image(path: Path) -> Image:
    """The image in that file, as RGB.

    Raises:
        InputError: no such file, or none that Pillow can decode to the end.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"image '{path}' is not in a format that Pillow can read") from None
    except OSError as error:
        raise InputError(f"image '{path}' cannot be read: {error.strerror or one_line(error)}") from None
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image '{path}' cannot be decoded: {one_line(error)}") from None
