"""What a request may hold: one sentence for whatever a server would stumble over, or leave out unsaid."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from luvc_fx.report.errors import InputError

Test = Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        token.isdecimal() and _is_number(bias) for token, bias in value.items()
    )


def _is_config(value: Any) -> bool:
    try:
        return isinstance(value, str) and isinstance(json.loads(value), Mapping)
    except (ValueError, RecursionError):
        return False


_TOKENS: tuple[Test, str] = (lambda n: _is_whole(n) and n >= 1, "a whole number of at least 1")
_FIELDS: Mapping[str, tuple[Test, str]] = MappingProxyType(
    {
        "model": (lambda name: isinstance(name, str), "a text"),
        "max_tokens": _TOKENS,
        "max_completion_tokens": _TOKENS,
        "max_output_tokens": _TOKENS,
        "temperature": (lambda t: _is_number(t) and t >= 0, "a number of at least 0"),
        "top_p": (lambda p: _is_number(p) and 0 < p <= 1, "a number in (0, 1]"),
        # It becomes a repetition penalty of 1 + f, which has to be above zero.
        "frequency_penalty": (lambda f: _is_number(f) and -1 < f <= 2, "a number in (-1, 2]"),
        "seed": (lambda seed: _is_whole(seed) and 0 <= seed < 1 << 63, "a whole number in [0, 2^63)"),
        "stop": (_is_stop, "a text, or a list of texts, that are not empty"),
        "stream": (lambda flag: isinstance(flag, bool), "true or false"),
        "logit_bias": (_is_bias, "an object of numbers by token number"),
        "generation_config": (_is_config, "a text that is a JSON object"),
        "chat_template_kwargs": (lambda given: isinstance(given, Mapping), "an object"),
        "tools": (lambda given: isinstance(given, list), "a list"),
    }
)
"""Fields with their test, and what is allowed, in words. Null is as if the field were not there."""

_ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "chat": {
            "n": (1,),
            "logprobs": (False,),
            "top_logprobs": (0,),
            "presence_penalty": (0,),
            "response_format": ({"type": "text"},),
            "modalities": (["text"],),
            "audio": (),
            "functions": ([],),
            "function_call": ("none",),
            "tool_choice": ("none", "auto"),
            "reasoning_effort": (),
            "web_search_options": (),
        },
        "completion": {
            "n": (1,),
            "best_of": (1,),
            "echo": (False,),
            "logprobs": (),
            "presence_penalty": (0,),
        },
        "response": {
            "background": (False,),
            "include": ([],),
            "max_tool_calls": (),
            "previous_response_id": (),
            "prompt": (),
            "text": ({"format": {"type": "text"}},),
            "tool_choice": ("none", "auto"),
            "top_logprobs": (0,),
            "truncation": ("disabled",),
        },
    }
)
"""Fields that the server does not follow, with the values that ask for what it does anyway."""

_TEXT = ("text", "input_text", "output_text")
_IMAGE = ("image_url", "input_image")
_VIDEO = ("video_url",)
_AUDIO = ("input_audio", "audio_url")


def check(kind: str, body: Mapping[str, Any], processor: Any) -> None:
    """Refuse a request that cannot be answered as it asks.

    Args:
        kind: ``"chat"``, ``"completion"`` or ``"response"``.
        processor: the model's; None: not known yet, and what depends on it is not looked at.

    Raises:
        InputError: one sentence that names the field, its value and what is allowed.
    """
    for field, (test, allowed) in _FIELDS.items():
        if body.get(field) is not None and not test(body[field]):
            _refuse(field, body[field], allowed)
    for field, neutral in _ONLY[kind].items():
        if body.get(field) is not None and body[field] not in neutral:
            allowed = f"allowed: {', '.join(map(json.dumps, neutral))}" if neutral else "leave it out"
            raise InputError(f"{field} is {_short(body[field])}, which this server does not do; {allowed}")
    if body.get("tools") and processor is not None and not _knows_tools(processor):
        raise InputError("tools have no place in this model's chat template; leave them out")
    if kind == "chat":
        _check_messages(body.get("messages"), processor)
    elif kind == "response":
        _check_input(body.get("input"), processor)
    else:
        _check_text("prompt", body.get("prompt"), processor)


def _check_messages(messages: Any, processor: Any) -> None:
    if not isinstance(messages, list) or not messages:
        _refuse("messages", messages, "a list of messages that is not empty")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            _refuse(where, message, "an object with a role and a content")
        if message.get("content") is None and not message.get("tool_calls"):
            _refuse(f"{where}.content", message.get("content"), "a text or a list of parts")
        _check_content(f"{where}.content", message.get("content"), processor)


def _check_input(given: Any, processor: Any) -> None:
    if isinstance(given, str):
        _check_text("input", given, processor)
        return
    if not isinstance(given, list) or not given or not all(isinstance(item, Mapping) for item in given):
        _refuse("input", given, "a text, or a list of parts or messages that is not empty")
    if "role" not in given[0] and given[0].get("type") in (*_TEXT, *_IMAGE, *_VIDEO, *_AUDIO):
        _check_content("input", given, processor)
        return
    for number, item in enumerate(given):
        _check_content(f"input[{number}].content", item.get("content"), processor)


def _check_content(where: str, content: Any, processor: Any) -> None:
    if isinstance(content, str):
        _check_text(where, content, processor)
    elif content is not None and not isinstance(content, list):
        _refuse(where, content, "a text or a list of parts")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        _check_part(f"{where}[{number}]", part, processor)


def _check_part(where: str, part: Any, processor: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    hears = processor is None or getattr(processor, "feature_extractor", None) is not None
    known = (*_TEXT, *_IMAGE, *_VIDEO, *(_AUDIO if hears else ()))
    if kind not in known:
        _refuse(where, part, f"an object whose type is one of {', '.join(known)}")
    if kind in _TEXT:
        _check_text(f"{where}.text", part.get("text"), processor)
    elif kind in (*_IMAGE, *_VIDEO):
        field = "image_url" if kind in _IMAGE else kind
        source = part.get(field)
        url = source.get("url") if isinstance(source, Mapping) else source
        if not isinstance(url, str) or not url or (kind in _VIDEO and source is url):
            _refuse(f"{where}.{field}", source, 'an object {"url": ...}')


def _check_text(where: str, text: Any, processor: Any) -> None:
    if not isinstance(text, str):
        _refuse(where, text, "a text")
    for name in ("image_token", "video_token", "audio_token"):
        token = getattr(processor, name, None)
        if isinstance(token, str) and token in text:
            raise InputError(f"{where} holds {token!r}, which stands for media; leave it out")


def _knows_tools(processor: Any) -> bool:
    template = getattr(processor, "chat_template", None)
    templates = template.values() if isinstance(template, Mapping) else [template or ""]
    return any("tools" in one for one in templates)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _refuse(field: str, value: Any, allowed: str) -> None:
    raise InputError(f"{field} is {_short(value)}; allowed: {allowed}")


SHOWN = 100
"""Characters of a value in a message."""
