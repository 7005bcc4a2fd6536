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

from luvc_fx import passes
from luvc_fx.graph import markers
from luvc_fx.graph.emit import inserted
from luvc_fx.registry import selector_fingerprint
from luvc_fx.schedule import Schedule


def fingerprint(schedule: Schedule) -> str:
    """A key of this package's files and version, of `schedule`, and of the selectors it names."""
    hasher = hashlib.sha256(_sources().encode())
    hasher.update(schedule.to_json().encode())
    for name in sorted({prune.selector for prune in schedule.prune}):
        # Those of third parties are not among our files.
        hasher.update(f"{name}={selector_fingerprint(name)}".encode())
    return hasher.hexdigest()[:32]


def depends_on_us(graph: fx.Graph) -> bool:
    """Whether code of ours is in `graph`: nodes that a pass inserted, or operators of this package.

    A graph that we left alone has none, and shares its cache entries with the inner compiler used alone.
    """
    return any(inserted(node) or markers.is_ours(node) for node in graph.nodes)


@cache
def _sources() -> str:
    """Hash of every Python file of the package; `passes` lies elsewhere in a source tree."""
    hasher = hashlib.sha256(_version().encode())
    for module in (markers, passes):
        root = Path(str(module.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            hasher.update(f"{path.relative_to(root).as_posix()}:{path.stat().st_size}\n".encode())
            hasher.update(path.read_bytes())
    return hasher.hexdigest()


def _version() -> str:
    try:
        return metadata.version("luvc-fx")
    except metadata.PackageNotFoundError:  # a copy on sys.path that nobody installed
        return "unknown"
