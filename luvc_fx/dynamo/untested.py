"""A warning about versions of torch and transformers that are newer than luvc_fx was tested with."""

from __future__ import annotations

import functools
import re
import warnings
from importlib.metadata import PackageNotFoundError, version

from luvc_fx.report.reasons import LuvcWarning

NEWEST_TESTED = {"torch": (2, 15), "transformers": (5, 24)}
"""Of each package major and minor version of the newest row of ``make compat``."""


def warn_of_untested_versions() -> None:
    """Warn (`LuvcWarning`) of each installed package that is newer, once a process; everything goes on."""
    for package, newest in NEWEST_TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:  # transformers, which `backend` does without
            continue
        numbers = re.match(r"(\d+)\.(\d+)", installed)
        if numbers is not None and (int(numbers[1]), int(numbers[2])) > newest:
            _warn_once(package, installed, ".".join(map(str, newest)))


@functools.cache
def _warn_once(package: str, installed: str, newest: str) -> None:
    warnings.warn(
        f"{package} {installed} is newer than luvc_fx was tested with ({newest}); a graph that it does not "
        "recognise runs as the stock model does, with a reason in the report",
        LuvcWarning,
        stacklevel=4,
    )
