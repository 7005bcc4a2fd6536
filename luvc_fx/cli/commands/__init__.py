"""The sub-commands of `luvc-fx`: one file each, listed here under the name that people type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from luvc_fx.cli.commands.bench import bench
from luvc_fx.cli.commands.demo import demo
from luvc_fx.cli.commands.eval import evaluate
from luvc_fx.cli.commands.inspect import inspect
from luvc_fx.cli.commands.serve import serve

COMMANDS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {"bench": bench, "demo": demo, "eval": evaluate, "inspect": inspect, "serve": serve}
)

SETTINGS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {"serve": {"allow_extra_args": True, "ignore_unknown_options": True}}
)
"""Settings of a sub-command that passes options on."""

__all__ = ["COMMANDS", "SETTINGS"]
