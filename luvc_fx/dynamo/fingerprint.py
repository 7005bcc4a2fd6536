"""What compiler caches must know about us: the key of the code that shaped a graph.

The caches key a graph by what is written in it. The bodies of our own operators are not, and what a pass
put there is: the fingerprint covers both, so that after an edit nothing compiled before it comes back.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

from torch import fx

from luvc_fx.graph import markers
from luvc_fx.graph.emit import inserted
from luvc_fx.mergers import MERGERS
from luvc_fx.schedule import Schedule
from luvc_fx.selectors import selector_fingerprint

_PACKAGE = Path(__file__).parents[1]

COMPILE_TIME = (
    "_compat",
    "anatomy",
    "dynamo",
    "graph",
    "mergers",
    "methods",
    "ops",
    "passes",
    "plan.py",
    "schedule",
    "selectors",
)
"""What shapes a graph. Other rooms call, measure or print: editing those keeps what was compiled."""


def fingerprint(schedule: Schedule) -> str:
    """A key of our version, of the files that shape a graph, of `schedule` and of the methods it names."""
    hasher = hashlib.sha256(_sources().encode())
    hasher.update(schedule.to_json().encode())
    hasher.update(methods_key(schedule).encode())
    return hasher.hexdigest()[:32]


def methods_key(schedule: Schedule) -> str:
    """A key of the code of the selectors and mergers that `schedule` names.

    Those of third parties are not among our files.
    """
    selectors = {prune.selector.name: selector_fingerprint(prune.selector.name) for prune in schedule.prune}
    mergers = {merge.method.name: MERGERS.fingerprint(merge.method.name) for merge in schedule.merge}
    return f"{sorted(selectors.items())} {sorted(mergers.items())}"


def depends_on_us(graph: fx.Graph) -> bool:
    """Whether code of ours is in `graph`: nodes that a pass inserted, or operators of this package.

    A graph that we left alone has none, and shares its cache entries with the inner compiler used alone.
    """
    return any(inserted(node) or markers.is_ours(node) for node in graph.nodes)


def hash_of_sources(*places: str) -> str:
    """A hash of the Python files in those rooms of the package (or of those files): paths and bytes.

    Args:
        places: relative to the package, ``"ops"`` or ``"plan.py"``.
    """
    hasher = hashlib.sha256()
    for place in places:
        for path in _python_files(_PACKAGE / place):
            hasher.update(f"{path.relative_to(_PACKAGE).as_posix()}:{path.stat().st_size}\n".encode())
            hasher.update(path.read_bytes())
    return hasher.hexdigest()


def _python_files(place: Path) -> list[Path]:
    return [place] if place.suffix == ".py" else sorted(place.rglob("*.py"))


@cache
def _sources() -> str:
    return f"{_version()} {hash_of_sources(*COMPILE_TIME)}"


def _version() -> str:
    try:
        return metadata.version("luvc-fx")
    except metadata.PackageNotFoundError:  # a copy on sys.path that nobody installed
        return "unknown"
