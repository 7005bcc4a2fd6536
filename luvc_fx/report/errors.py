"""Errors in one line: those that a caller can mend, and others' errors in brief."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class InputError(ValueError):
    """Something that the caller can mend; the text is one line and says what and how."""


def one_line(error: Exception) -> str:
    """An error's text without its line ends."""
    return " ".join(str(error).split())


def brief(error: Exception, most: int = 300) -> str:
    """One line about an error that is not ours: its type and the first paragraph of its text."""
    paragraph = " ".join(str(error).strip().partition("\n\n")[0].split())
    if len(paragraph) > most:
        paragraph = paragraph[: most - 3] + "..."
    return f"{type(error).__name__}: {paragraph}" if paragraph else type(error).__name__


def cannot(what: str, error: Exception) -> InputError:
    """An error in one line about something that failed in code that is not ours; the log has all of it."""
    log.debug("%s", what, exc_info=error)
    return InputError(f"{what}: {brief(error)}")
