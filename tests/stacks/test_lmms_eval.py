"""The model `luvc_hf` of the harness lmms-eval, and the task that comes with it."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import luvc_fx
from examples.research.lmms_eval import local_task
from luvc_fx.apps.demo import MODEL_DIR
from tests.support.paths import RESEARCH

PLACE = RESEARCH / "lmms_eval"

needs_harness = pytest.mark.skipif(
    find_spec("lmms_eval") is None or find_spec("evaluate") is None,
    reason="the harness lmms-eval is not installed (examples/research/lmms_eval/README.md says how)",
)


@pytest.fixture
def luvc_hf(monkeypatch: pytest.MonkeyPatch) -> Any:
    # As `pip install examples/research/lmms_eval` does: the harness imports both by these names.
    monkeypatch.syspath_prepend(str(PLACE))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module("luvc_hf")


def request(doc_id: int, parts: list[Any], question: str) -> tuple[SimpleNamespace, list[dict[str, Any]]]:
    """A request as the harness makes it, and its messages."""
    content = [{"type": kind, "url": source} for kind, source in parts]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    options = {"max_new_tokens": 2, "temperature": 0}
    return SimpleNamespace(args=("", lambda doc: doc, options, doc_id, "task", "test")), messages


def ask(model: Any, *asked: tuple[list[Any], str]) -> list[str]:
    made = [request(number, parts, question) for number, (parts, question) in enumerate(asked)]
    model.task_dict = {"task": {"test": [messages for _, messages in made]}}
    return [answer.text for answer in model.generate_until([given for given, _ in made])]


def test_the_task_has_questions_with_answers_and_images(tmp_path: Path) -> None:
    assert local_task.write(tmp_path, scenes=3, per_scene=2) == 6
    docs = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(docs) == 6
    functions = runpy.run_path(str(tmp_path / "scene_functions.py"))
    for doc in docs:
        (image,) = functions["visuals"](doc)
        assert (image.size, image.mode) == ((128, 128), "RGB")
        assert functions["score"](doc, [f" {doc['answer']}"]) == {"exact_match": 1.0}
        assert functions["score"](doc, ["no"]) == {"exact_match": 0.0}
    assert str(tmp_path / "questions.jsonl") in (tmp_path / "luvc_scenes.yaml").read_text()
    named = re.findall(r"!function scene_functions\.(\w+)", (tmp_path / "luvc_scenes.yaml").read_text())
    assert len(named) == 3 and set(named) <= set(functions)


def test_the_commands_of_the_readme_take_arguments_that_exist() -> None:
    tree = ast.parse((PLACE / "luvc_hf.py").read_text(encoding="utf-8"))
    (made,) = (
        item
        for kind in tree.body
        if isinstance(kind, ast.ClassDef) and kind.name == "LuvcHf"
        for item in kind.body
        if isinstance(item, ast.FunctionDef) and item.name == "__init__"
    )
    allowed = {argument.arg for argument in made.args.args}
    readme = re.sub(r"\$\{[^}]*\}", "", (PLACE / "README.md").read_text(encoding="utf-8"))
    commands = re.findall(r"--model_args \"?([^\s\"]+)", readme)
    commands += re.findall(r"`arm \w+ \w+ ([^`]+)`", readme)
    assert len(commands) > 7
    for command in commands:
        assert {part.partition("=")[0] for part in command.split(",")} <= allowed


@needs_harness
def test_arguments_that_are_not_allowed(luvc_hf: Any) -> None:
    with pytest.raises(ValueError, match="batch_size is 2; allowed: 1"):
        luvc_hf.LuvcHf(str(MODEL_DIR), batch_size=2)
    with pytest.raises(ValueError, match="max_frames is 0; allowed"):
        luvc_hf.LuvcHf(str(MODEL_DIR), max_frames=0)
    with pytest.raises(ValueError, match="report is empty; with a schedule it is needed"):
        luvc_hf.LuvcHf(str(MODEL_DIR), schedule="image")
    with pytest.raises(ValueError, match="neither a preset"):
        luvc_hf.LuvcHf(str(MODEL_DIR), schedule="none", report="report.json")


@needs_harness
@pytest.mark.slow
def test_the_harness_counts_what_was_answered_and_the_report_is_of_the_pruned_model(
    luvc_hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HF_HOME": tmp_path / "hf", "HF_DATASETS_CACHE": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    entry = importlib.import_module("luvc_hf_entry")
    MODEL_REGISTRY_V2.register_manifest(entry.manifest(), overwrite=True)
    local_task.write(tmp_path / "task", scenes=4, per_scene=2)
    report = tmp_path / "out" / "report.json"
    results = simple_evaluate(
        model="luvc_hf",
        model_args=f"pretrained={MODEL_DIR},schedule=image,report={report},dtype=float32",
        tasks=["luvc_scenes"],
        batch_size=1,
        task_manager=TaskManager("ERROR", include_path=str(tmp_path / "task"), model_name="luvc_hf"),
    )
    samples = results["samples"]["luvc_scenes"]
    right = [sample["filtered_resps"][0] == sample["target"] for sample in samples]
    assert len(right) == 8
    assert results["results"]["luvc_scenes"]["exact_match,none"] == sum(right) / 8 > 0.5
    told = json.loads(report.read_text())
    (graphs,) = (found["graphs"] for found in told["reports"])
    layers = next(graph["tokens_per_layer"] for graph in graphs if graph["kind"] == "prefill")
    assert told["asked"][0]["budget"]["mean"] == pytest.approx(sum(layers) / len(layers) / 256)
    assert results["throughput"]["avg_budget"] == told["asked"][0]["budget"]["mean"] < 0.3
    assert not [refusal for graph in graphs for refusal in graph["refusals"]]


@needs_harness
@pytest.mark.slow
def test_answers_keep_their_order_whatever_the_sizes(
    luvc_hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(luvc_hf, "MOST_SHAPES", 1)
    shipped = json.loads((MODEL_DIR / "examples.json").read_text())[0]["questions"]
    picture = Image.open(MODEL_DIR / "objects.png")
    one, two = [("image", picture)], [("image", picture)] * 2
    asked = [(two, shipped[0]["text"]), (one, shipped[2]["text"]), (two, "where is the circle ?")]
    asked += [(one, shipped[0]["text"])]
    schedule = tmp_path / "half.json"
    schedule.write_text(luvc_fx.Schedule(prune=luvc_fx.Prune(keep=0.5, layer=2)).to_json())
    told = tmp_path / "report.json"
    model = luvc_hf.LuvcHf(str(MODEL_DIR), schedule=str(schedule), report=str(told), dtype="float32")
    found = ask(model, *asked)
    assert (found[1], found[3]) == (shipped[2]["answer"], shipped[0]["answer"])
    assert len(set(found)) > 1
    body = json.loads(told.read_text())
    assert len(body["reports"]) == 2  # a set of graphs for each of the two shapes
    assert body["asked"][0]["visual_tokens"] == {"least": 256, "mean": 384.0, "most": 512}
    assert body["asked"][0]["budget"]["most"] == (2 + 14 * 0.5) / 16
    plain = luvc_hf.LuvcHf(str(MODEL_DIR), report=str(told), dtype="float32")
    assert ask(plain, *asked)[1:4:2] == [shipped[2]["answer"], shipped[0]["answer"]]
    body = json.loads(told.read_text())
    assert (body["reports"], body["asked"][0]["budget"]["least"]) == ([], 1.0)


@needs_harness
def test_a_merge_that_is_left_undone_ends_the_run(luvc_hf: Any, tmp_path: Path) -> None:
    report = str(tmp_path / "report.json")
    model = luvc_hf.LuvcHf(str(MODEL_DIR), schedule="image", report=report, dtype="float32")
    given, messages = request(0, [("image", Image.open(MODEL_DIR / "objects.png"))], "where is the ring ?")
    given.args[2]["num_beams"] = 2
    model.task_dict = {"task": {"test": [messages]}}
    with pytest.raises(luvc_fx.NotRewritten, match="not merged"):
        model.generate_until([given])
    assert not Path(report).exists()


@needs_harness
@pytest.mark.skipif(find_spec("av") is None, reason="PyAV, which the harness decodes videos with, is missing")
def test_frames_of_a_video(luvc_hf: Any, tmp_path: Path) -> None:
    import av
    import numpy as np

    path = str(tmp_path / "film.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for number in range(21):
            frame = np.full((64, 64, 3), 10 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames, facts = luvc_hf.read_frames(path, 3)
    assert [round(float(frame.mean()) / 10) for frame in frames] == [0, 10, 20]
    assert facts == {"total_num_frames": 21, "fps": 10.0, "duration": 2.1, "frames_indices": [0, 10, 20]}
    assert len(luvc_hf.read_frames(path, 99)[0]) == 21
    model = luvc_hf.LuvcHf(str(MODEL_DIR), max_frames=2, dtype="float32")
    (answer,) = ask(model, ([("video", path)], "where is the ring ?"))
    assert answer
    assert model.seen[0].visual_tokens == [512]  # this model takes no videos: two images
    with pytest.raises(ValueError, match="a video is int"):
        luvc_hf.read_frames(1, 3)
