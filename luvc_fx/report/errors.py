"""Errors in one line: mistakes that the user can mend, and other libraries' errors in brief."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class InputError(ValueError):
    """A mistake that the user can mend; the text is one line and says what and how."""


def one_line(error: Exception | str) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


def brief(error: Exception, most: int = 300) -> str:
    """One line about an error of another library: its type and the first paragraph of its text."""
    paragraph = " ".join(str(error).strip().partition("\n\n")[0].split())
    if len(paragraph) > most:
        paragraph = paragraph[: most - 3] + "..."
    return f"{type(error).__name__}: {paragraph}" if paragraph else type(error).__name__


def cannot(what: str, error: Exception) -> InputError:
    """An `InputError` about another library's failure: `what`, and the error in brief; the log has it all."""
    log.debug("%s", what, exc_info=error)
    return InputError(f"{what}: {brief(error)}")
