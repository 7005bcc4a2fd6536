"""What `luvc-fx serve` does with a request before a model sees it, and where an answer ends."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.apps.inputs import read_image
from luvc_fx.apps.serving.checks import check
from luvc_fx.apps.serving.images import read_source, reading_as_files
from luvc_fx.apps.serving.stopping import stopping_at_texts
from luvc_fx.report.errors import InputError

PROCESSOR = SimpleNamespace(image_token="<image>", chat_template="{{ messages }}")
WITH_TOOLS = SimpleNamespace(image_token="<image>", chat_template="{{ tools }}", feature_extractor=object())


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


TEXT = {"type": "text", "text": "what ?"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://there/a.png"}}
GOOD: dict[str, Any] = user(IMAGE, TEXT)


@pytest.mark.parametrize(
    "body",
    [
        GOOD,
        user({"type": "input_image", "image_url": "data:"}, {"type": "input_text", "text": "what ?"}),
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}, GOOD["messages"][0]]},
        {**GOOD, "n": 1, "logprobs": False, "stop": ["a"], "seed": 0, "temperature": 0.5, "top_p": 1},
        {**GOOD, "n": None, "tools": None, "max_tokens": None, "response_format": {"type": "text"}},
        {**GOOD, "user": "me", "stream_options": {"include_usage": True}, "store": False, "metadata": {}},
        {**GOOD, "logit_bias": {"5": -1}, "generation_config": "{}", "frequency_penalty": -0.5},
    ],
)
def test_good_requests(body: dict[str, Any]) -> None:
    for processor in (PROCESSOR, None):
        check("chat", body, processor)
    check("response", {"input": body["messages"]}, PROCESSOR)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"messages": None}, r"^messages is null; allowed: a list of messages that is not empty$"),
        ({"messages": []}, r"^messages is \[\]"),
        ({"messages": "hi"}, r'^messages is "hi"'),
        ({"messages": ["hi"]}, r'^messages\[0\] is "hi"; allowed: an object with a role'),
        ({"messages": [{"content": "hi"}]}, r"^messages\[0\] is "),
        ({"messages": [{"role": "user"}]}, r"^messages\[0\]\.content is null"),
        ({"messages": [{"role": "user", "content": 5}]}, r"^messages\[0\]\.content is 5"),
        (user("hi"), r'content\[0\] is "hi"'),
        (user({"type": "file"}), "allowed: an object whose type is one of text, .* video_url$"),
        (user({"type": "input_audio", "input_audio": "x"}), "whose type is one of"),
        (user({"type": "text"}), r"content\[0\]\.text is null; allowed: a text"),
        (user({"type": "image_url"}), r'image_url is null; allowed: an object {"url": ...}'),
        (user({"type": "image_url", "image_url": {"url": 5}}), 'image_url is {"url": 5}'),
        (user({"type": "video_url", "video_url": "x"}), 'video_url is "x"'),
        (user({"type": "text", "text": "an <image> ?"}), r"holds '<image>', which stands for media"),
        ({"messages": [{"role": "system", "content": "<image>"}]}, r"messages\[0\]\.content holds"),
        ({"max_tokens": "many"}, '^max_tokens is "many"; allowed: a whole number of at least 1$'),
        ({"max_completion_tokens": 0}, "^max_completion_tokens is 0"),
        ({"max_tokens": True}, "^max_tokens is true"),
        ({"temperature": -1}, "^temperature is -1; allowed: a number of at least 0$"),
        ({"temperature": float("nan")}, "^temperature is NaN"),
        ({"top_p": 0}, r"^top_p is 0; allowed: a number in \(0, 1\]$"),
        ({"frequency_penalty": -1}, "^frequency_penalty is -1"),
        ({"seed": 1 << 80}, "^seed is 12089258"),
        ({"stop": 5}, "^stop is 5; allowed: a text, or a list of texts"),
        ({"stop": ["a", ""]}, "^stop is "),
        ({"stream": "yes"}, '^stream is "yes"'),
        ({"logit_bias": {"ring": 1}}, "^logit_bias is"),
        ({"generation_config": "{"}, "^generation_config is"),
        ({"generation_config": "[" * 100_000}, r"^generation_config is .*\.\.\.; allowed: a text that is"),
        ({"chat_template_kwargs": []}, "^chat_template_kwargs is"),
        ({"n": 3}, "^n is 3, which this server does not do; allowed: 1$"),
        ({"logprobs": True}, "^logprobs is true, .* allowed: false$"),
        ({"top_logprobs": 2}, "^top_logprobs is 2"),
        ({"response_format": {"type": "json_object"}}, "^response_format is"),
        ({"reasoning_effort": "low"}, "^reasoning_effort is .*; leave it out$"),
        ({"tool_choice": "required"}, "^tool_choice is"),
        ({"tools": "f"}, "^tools is"),
        ({"tools": [{"type": "function"}]}, "^tools have no place in this model's chat template"),
    ],
)
def test_bad_requests(more: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        check("chat", {**GOOD, **more}, PROCESSOR)
    assert len(str(caught.value)) < 300


def test_what_the_processor_takes_is_let_through() -> None:
    check("chat", {**GOOD, "tools": [{"type": "function"}]}, WITH_TOOLS)
    check("chat", user({"type": "input_audio", "input_audio": "x"}), WITH_TOOLS)


@pytest.mark.parametrize(
    ("kind", "body", "says"),
    [
        ("completion", {"prompt": 5}, "^prompt is 5"),
        ("completion", {"prompt": "an <image>"}, "^prompt holds"),
        ("completion", {"prompt": "x", "echo": True}, "^echo is true"),
        ("completion", {"prompt": "x", "logprobs": 0}, "^logprobs is 0"),
        ("response", {}, "^input is null"),
        ("response", {"input": [5]}, r"^input is \[5\]"),
        ("response", {"input": "an <image>"}, "^input holds"),
        ("response", {"input": [{"type": "input_text", "text": 5}]}, r"^input\[0\]\.text is 5"),
        ("response", {"input": "x", "previous_response_id": "y"}, "^previous_response_id is"),
    ],
)
def test_other_routes(kind: str, body: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check(kind, body, PROCESSOR)


# ------------------------------------------------------------------------------------------- images


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """Sideways by its EXIF, in 16 bits of gray."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "turned.png"
    Image.fromarray(np.array([[0, 25700], [65535, 257]], dtype=np.uint16)).save(file, exif=exif)
    return file


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a server of the files in `tmp_path`."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_source_is_read_as_a_file_is(turned: Path, address: str) -> None:
    wanted = np.asarray(read_image(turned)).tolist()
    assert wanted[0] == [[255] * 3, [0] * 3], "upright, and in its range"
    coded = base64.b64encode(turned.read_bytes()).decode()
    sources = (str(turned), coded, f"data:image/png;base64,{coded}", f"{address}/turned.png")
    fetch = reading_as_files(lambda other: f"stock {other}")
    for read in (*sources, Image.open(turned)):
        assert np.asarray(fetch([[read]])[0][0]).tolist() == wanted
    assert fetch(5) == "stock 5"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("data:image/png;base64,????", "is no base64; allowed: a URL"),
        ("data:image/png;base64,AAAA", "format"),
        ("data:image/png", "is empty"),
        ("x" * 5000, r"image 'x+\.\.\.' is n"),
        ("http://127.0.0.1:9/none.png", "cannot be fetched: URLError"),
        ("http://", "cannot be fetched"),
        ("http://[::1", "cannot be fetched"),
        (str(MODEL_DIR / "config.json"), "format"),
    ],
)
def test_bad_sources(source: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read_source(source)
    assert len(str(caught.value)) < 300


def test_a_file_that_is_not_there(address: str) -> None:
    with pytest.raises(InputError, match="cannot be fetched: HTTPError: HTTP Error 404"):
        read_source(f"{address}/none.png")


# ------------------------------------------------------------------------------------------ the end


def test_rows_end_at_a_text_of_their_own_words() -> None:
    config = GenerationConfig(stop_strings="stop here")
    words = ["go", "stop", "here"]

    def batch_decode(rows: torch.Tensor) -> list[str]:
        return [" ".join(words[number] for number in row) for row in rows.tolist()]

    given: dict[str, Any] = {}
    prompt = torch.tensor([[1, 2], [1, 2]])
    tokenizer = SimpleNamespace(batch_decode=batch_decode)
    stopping_at_texts(given.update, tokenizer)(input_ids=prompt, generation_config=config)
    (criterion,) = given["stopping_criteria"]
    assert given["generation_config"].stop_strings is None
    new = torch.tensor([[0, 1, 2], [1, 0, 2]])
    assert criterion(torch.cat([prompt, new], 1), None).tolist() == [True, False]
    assert criterion(prompt, None).tolist() == [False, False], "the prompt does not count"
    stopping_at_texts(given.update, tokenizer)(input_ids=prompt, generation_config=GenerationConfig())
