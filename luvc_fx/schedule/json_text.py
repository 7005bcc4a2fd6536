"""JSON that people write: what the standard reader lets through, or fails on in its own way, is an error."""

from __future__ import annotations

import json
from typing import Any

from luvc_fx.methods.checks import shown


def parse(text: str | bytes) -> Any:
    """What a JSON text holds; a byte-order mark in front of it is skipped.

    NaN, infinities and numbers of any size are read, so that the field that does not allow them is named.

    Raises:
        ValueError: in one line, for what is not JSON: also for a key that an object has twice, numbers of
            more digits than Python reads, and lists or objects nested beyond Python's depth.
    """
    if isinstance(text, (bytes, bytearray)):
        text = text.decode("utf-8")
    try:
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_object, parse_int=_int)
    except RecursionError:
        raise ValueError("lists or objects in it are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is in one object twice; allowed: once")
        found[key] = value
    return found


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"a number in it has {len(text)} digits, more than Python reads") from None
