"""The sub-commands of `luvc-fx`: one file each, listed here under the name that people type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from luvc_fx.commands.demo import demo
from luvc_fx.commands.inspect import inspect

COMMANDS: Mapping[str, Callable[..., None]] = MappingProxyType({"demo": demo, "inspect": inspect})

__all__ = ["COMMANDS"]
