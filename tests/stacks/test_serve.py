"""`luvc-fx serve`: a real server in a process of its own, asked by OpenAI's client over HTTP."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import luvc_fx
from luvc_fx import Prune, Schedule
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.cli.main import main as cli
from tests.support import golden
from tests.support.paths import EXAMPLES
from tests.support.server import Server, running

CLIENT = runpy.run_path(str(EXAMPLES / "serve_client.py"))
IMAGE = MODEL_DIR / "objects.png"
QUESTIONS = ("where is the ring ?", "what color is the star ?", "how many objects are there ?")
WORDS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "stderr"
    with running([sys.executable, "-m", "luvc_fx.cli.main"], log) as server:
        yield server


def ask(server: Server, question: str, stream: bool) -> str:
    return CLIENT["ask"](server.address, str(MODEL_DIR), IMAGE, question, stream, WORDS)


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What `generate` of a compiled model answers, loaded as the server loads it."""
    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    luvc_fx.compile(model, "image", inner="eager", strict=True)
    found = {}
    for question in QUESTIONS:
        content = [{"type": "image", "url": str(IMAGE)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False)
        words = output[0, inputs["input_ids"].shape[1] :]
        found[question] = processor.decode(words, skip_special_tokens=True)
    assert len(set(found.values())) == len(QUESTIONS)
    return found


@pytest.mark.slow
def test_answers_in_one_piece_and_streamed_equal_generate(server: Server, answers: dict[str, str]) -> None:
    question = QUESTIONS[0]
    for stream in (False, True):
        assert ask(server, question, stream).strip() == answers[question].strip()


@pytest.mark.slow
def test_two_clients_at_once(server: Server, answers: dict[str, str]) -> None:
    asked = [QUESTIONS[1], QUESTIONS[2]] * 2
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(partial(ask, server), asked, (False, True, True, False)))
    assert [answer.strip() for answer in got] == [answers[question].strip() for question in asked]


@pytest.mark.slow
def test_pruning_is_seen_from_outside(server: Server, answers: dict[str, str]) -> None:
    before = server.report()
    ask(server, QUESTIONS[0], False)
    (report,) = CLIENT["report"](server.address).values()
    assert report == before, "all was compiled before the server listened"
    golden.check(golden.SERVE, report)
    kinds = {graph["kind"]: graph for graph in report["graphs"]}
    assert kinds["vision"]["inserted"] == ["merge after encoder block 2: width 16 -> 12"]
    assert kinds["prefill"]["tokens_per_layer"][-1] == 0
    assert not report["refusals"]
    assert not any(graph["refusals"] for graph in report["graphs"])
    log = server.log.read_text()
    assert "luvc_fx: vision graph" in log
    assert "prune before decoder layer 15: spectrum 48 -> 0" in log


def chat(image: str | None = None, **more: Any) -> dict[str, Any]:
    """The body of a request about an image, a data URL unless told otherwise."""
    messages = CLIENT["messages"](IMAGE, QUESTIONS[0])
    if image is not None:
        messages[0]["content"][0]["image_url"]["url"] = image
    return {"model": str(MODEL_DIR), "messages": messages, "max_tokens": WORDS, "temperature": 0, **more}


@pytest.mark.slow
def test_bad_requests_are_a_sentence_with_status_400(server: Server) -> None:
    stray = chat()
    stray["messages"][0]["content"][1]["text"] = "what is <image> ?"
    bodies = {
        "is not in a format": chat("data:image/png;base64,AAAA"),
        "is no base64": chat("not an image"),
        "cannot be fetched": chat("http://127.0.0.1:9/none.png"),
        "a list of messages that is not empty": chat(messages=[]),
        "'<image>', which stands for media": stray,
        "n is 2": chat(n=2),
        "logprobs is true": chat(logprobs=True),
        "tools have no place": chat(tools=[{"type": "function", "function": {"name": "f"}}]),
    }
    for says, body in bodies.items():
        status, answer = server.post("/v1/chat/completions", body)
        assert (status, says in answer["error"]["message"]) == (400, True), answer
    status, answer = server.post("/v1/completions", {"model": str(MODEL_DIR), "prompt": "<image>"})
    assert (status, "prompt holds" in answer["error"]["message"]) == (400, True)
    status, answer = server.post("/v1/responses", {"model": str(MODEL_DIR), "input": []})
    assert (status, "input is []" in answer["error"]["message"]) == (400, True)


@pytest.mark.slow
def test_an_answer_ends_at_a_stop_text(server: Server, answers: dict[str, str]) -> None:
    whole = answers[QUESTIONS[0]].split()
    for stop in (whole[0], ["nowhere", whole[0]]):
        _, answer = server.post("/v1/chat/completions", chat(stop=stop))
        assert answer["choices"][0]["message"]["content"].split() == whole[:1]
        assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.slow
def test_images_of_requests_are_read_as_files_are(server: Server, tmp_path: Path) -> None:
    """In 16 bits of gray the picture is what it is in eight; clipped, as it would be, it is all white."""
    gray = np.asarray(Image.open(IMAGE).convert("L"))
    kinds = {"16.png": gray.astype(np.uint16) * 257, "8.png": gray, "white.png": np.full_like(gray, 255)}
    said = {}
    for name, values in kinds.items():
        Image.fromarray(values).save(tmp_path / name)
        _, answer = server.post("/v1/chat/completions", chat(str(tmp_path / name)))
        said[name] = answer["choices"][0]["message"]["content"]
    assert said["16.png"] == said["8.png"] != said["white.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--schedule", "imgae"), "schedule 'imgae' is neither a preset (image, video, document) nor a file"),
        (("--prot", "80"), "--prot"),
        (("--port", "eighty"), "--port"),
        (("--device", "gpu9"), "the model cannot be served"),
    ],
)
def test_a_mistake_is_one_line(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert says in _refused(capfd, str(MODEL_DIR), *arguments)


def test_a_model_that_cannot_be_served_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "does not exist" in _refused(capfd, str(tmp_path / "none"))
    assert "no config.json" in _refused(capfd, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "the model cannot be served" in _refused(capfd, str(tmp_path))
    deep = tmp_path / "deep.json"
    deep.write_text(Schedule(prune=Prune(keep=0.5, layer=99)).to_json())
    assert "Prune.layer is 99" in _refused(capfd, str(MODEL_DIR), "--schedule", str(deep))


def test_a_missing_server_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert "pip install 'luvc-fx[serve]'" in _refused(capfd, str(MODEL_DIR))


def _refused(capfd: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert cli(["serve", *arguments]) == 2
    lines = capfd.readouterr().err.splitlines()
    # What transformers itself says while it loads comes before.
    theirs = ("[transformers]", "Loading weights", "\r")
    ours = [line for line in lines if line and not line.startswith(theirs)]
    assert len(ours) == 1
    assert ours[0].startswith("luvc-fx: ")
    return ours[0]
