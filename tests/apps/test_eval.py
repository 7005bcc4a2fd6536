"""`luvc-fx eval` on a cut-down copy of the shipped model, and its questions, answers and errors."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import luvc_fx
from examples.research.tinyvlm.questions import export
from luvc_fx import _compat
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.apps.evaluation import Options, run
from luvc_fx.apps.evaluation.asking import ask
from luvc_fx.apps.evaluation.features import Features
from luvc_fx.apps.evaluation.keys import model_key, run_key
from luvc_fx.apps.evaluation.markdown import is_evidence, markdown
from luvc_fx.apps.evaluation.methods import methods
from luvc_fx.apps.evaluation.plot import draw
from luvc_fx.apps.evaluation.prompts import Prompt, Prompts, batches, collate
from luvc_fx.apps.evaluation.questions import read_frames, read_questions, with_wrong_images
from luvc_fx.apps.evaluation.result import EvalResult, WrongImage
from luvc_fx.apps.evaluation.store import Answers
from luvc_fx.apps.local_model import load
from luvc_fx.cli.main import main
from luvc_fx.report.errors import InputError
from luvc_fx.schedule import Prune, Schedule

running = importlib.import_module("luvc_fx.apps.evaluation.run")

LAYERS, VISION_LAYERS = 3, 2
SCENES = 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with its first layers only, and questions about four scenes."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("eval")
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, local_files_only=True)
    del model.model.language_model.layers[LAYERS:]
    model.config.text_config.num_hidden_layers = LAYERS
    del model.model.vision_tower.encoder.layers[VISION_LAYERS:]
    model.config.vision_config.num_hidden_layers = VISION_LAYERS
    model.save_pretrained(folder / "model")
    AutoProcessor.from_pretrained(MODEL_DIR, local_files_only=True).save_pretrained(folder / "model")
    export(folder / "questions", "dev", SCENES, per_scene=3)
    return folder


def options(small: Path, out: Path, **more: Any) -> Options:
    """Few cells, some of which FastV cannot reach."""
    given = {"methods": ("spectrum", "fastv", "last"), "budgets": (0.25,), "batch": 6, "new_tokens": 1}
    return Options(small / "model", small / "questions" / "questions.jsonl", out, **{**given, **more})


def quiet(*_: object) -> None:
    """Say nothing."""


@pytest.mark.slow
def test_from_questions_to_tables_and_on_from_where_it_stopped(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []

    def stop(title: str, done: int, total: int) -> None:
        asked.append((title, done, total))
        if title == "spectrum at 25 %" and done:
            raise KeyboardInterrupt

    given = options(small, tmp_path, wrong_image=True)
    with pytest.raises(KeyboardInterrupt):
        run(given, quiet, stop)
    assert asked[-1] == ("spectrum at 25 %", 6, 12)

    asked.clear()
    result = run(given, quiet, lambda *told: asked.append(told))
    assert [told for told in asked if told[1] == 0] == [("spectrum at 25 %", 0, 6), ("last", 0, 12)]
    _check(result)

    monkeypatch.setattr(running, "ask", None)  # nothing is left to be asked
    again = run(given, quiet, quiet)
    assert again.to_dict() == result.to_dict()
    with pytest.raises(TypeError):  # but another number of new tokens is another question
        run(options(small, tmp_path, new_tokens=2), quiet, quiet)


def _check(result: EvalResult) -> None:
    unpruned, spectrum, fastv, last = result.rows
    assert result.tasks[0] == "all" and len(result.tasks) > 2
    assert unpruned.tokens_per_layer == [256] * LAYERS and unpruned.measured == 1.0
    assert unpruned.scores["all"].questions == 3 * SCENES and unpruned.scores["all"].scenes == SCENES
    assert unpruned.scores["all"].agreement == 1.0
    assert spectrum.tokens_per_layer == [128, 64, 0]
    assert spectrum.measured == 0.25
    assert last.tokens_per_layer == [256, 256, 0] and last.measured == pytest.approx(2 / 3)
    assert fastv.scores == {} and fastv.cell.schedule is None
    assert set(result.wrong_image) == set(result.tasks) and result.hardware["dtype"] == "float32"

    text = markdown(result)
    assert "| fastv | n/a |  |" in text
    assert "| last |  | " in text and ", at 66.7 % |" in text
    assert text.count("| spectrum | ") == len(result.tasks) + 1, "one table a task, and that of agreement"
    row = json.loads(result.to_json())["rows"][1]
    assert row["schedule"] == json.loads(spectrum.cell.schedule.to_json()) if spectrum.cell.schedule else None


def test_smaller_images_and_what_the_graphs_refuse(small: Path, tmp_path: Path) -> None:
    """More tokens than there are: the reason stands where the answers would."""
    path = tmp_path / "many.json"
    path.write_text(Schedule(prune=Prune(tokens=300, layer=1)).to_json())
    given = options(small, tmp_path, methods=("fastv", "downsample"), schedules=(str(path),), limit=2)
    result = run(given, quiet, quiet)
    smaller, many = result.rows[-2:]
    assert smaller.tokens_per_layer == [64] * LAYERS and smaller.measured == 0.25 and smaller.visual == 256
    assert many.cell.method == "many" and not many.scores and "256" in many.cell.reason
    assert f"- no answers from many: {many.cell.reason}" in markdown(result)


@pytest.mark.slow
def test_batches_give_the_answers_of_single_prompts(small: Path) -> None:
    """Padding, the filled last batch, and the order of the answers."""
    model, processor = load(small / "model")
    prompts = Prompts(model.float(), processor)
    asked = read_questions(small / "questions" / "questions.jsonl", limit=7)
    schedule = methods()["spectrum"].make(0.25, LAYERS)
    assert schedule is not None
    features, found = Features(), []
    for _ in range(2):  # the second time without the encoder
        parts = list(ask(prompts, asked, schedule, batch=5, new_tokens=1, features=features))
        found.append({question: text for part, _ in parts for question, text in part})
        assert [facts.budget for _, facts in parts] == [0.25, 0.25]
    answers = found[0]
    assert found[1] == answers and len(features.kept) == 2
    with torch.inference_mode(), luvc_fx.applied(model, schedule, inner="eager", strict=True):
        for question in asked:
            inputs = collate([prompts.prompt(question)], 1, 0, model.device, model.dtype)
            ids = model.generate(**inputs, max_new_tokens=1)[0, inputs["input_ids"].shape[1] :]
            assert answers[question] == processor.decode(ids, skip_special_tokens=True).strip()


# ------------------------------------------------------------------------------------------- questions


def write(folder: Path, *lines: object) -> Path:
    """A set of questions beside one image and one video."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (8, 8), "red").save(folder / "b.png")
    np.save(folder / "v.npy", np.zeros((2, 8, 8, 3), np.uint8))
    path = folder / "q.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = {"image": "a.png", "question": "what ?", "answer": " Red", "task": "color"}


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "not JSON"),
        ([1], "is not an object"),
        ({**GOOD, "image": "c.png"}, "c.png' is not a file"),
        ({**GOOD, "video": ["a.png"]}, "either image or video"),
        ({**GOOD, "image": ["a.png", "v.npy"]}, "one array, or images"),
        ({"video": [], "question": "?", "answer": "a", "task": "t"}, "a list of files that is not empty"),
        ({key: value for key, value in GOOD.items() if key != "answer"}, "answer is missing"),
        ({**GOOD, "answer": 3}, "answer is 3; allowed: a text"),
        ({**GOOD, "question": "  "}, "question is '  '"),
        ({**GOOD, "task": "all"}, "stands for all tasks"),
        ({**GOOD, "scene": [1]}, "scene is [1]"),
        ({**GOOD, "split": 1}, "split is 1"),
        ({**GOOD, "scene": float("nan")}, "scene is nan"),
        ({**GOOD, "answer": 10**4000}, "answer is 1"),
        ({**GOOD, "image": "x" * 5000}, "is not a file"),
        ("[" * 100_000, "not JSON: lists or objects in it are nested too deeply"),
        ('{"task": "a", "task": "b"}', "the key 'task' is in one object twice"),
    ],
)
def test_bad_lines_are_named(line: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_questions(write(tmp_path, GOOD, line))
    assert "line 2: " in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_line_says(tmp_path: Path) -> None:
    video = {"video": "v.npy", "question": "q", "answer": "a", "task": "t", "split": "dev", "scene": 7}
    path = write(tmp_path, GOOD, "", video, {**video, "video": ["b.png", "a.png"]})
    first, array, frames = read_questions(path)
    assert not first.video and [frame.size for frame in read_frames(first)] == [(8, 8)]
    assert first.scene == "a.png" and first.right("red ") and not first.right("reds")
    assert array.video and array.scene == "7" and len(read_frames(array)) == 2
    assert [frame.getpixel((0, 0)) for frame in read_frames(frames)] == [(255, 0, 0), (0, 0, 0)]
    assert read_questions(path, split="dev", limit=1) == [array]
    with pytest.raises(InputError, match=r"no question of split 'test'; there are \['', 'dev'\]"):
        read_questions(path, split="test")
    with pytest.raises(InputError, match="holds no question"):
        read_questions(write(tmp_path, ""))
    np.save(tmp_path / "v.npy", np.zeros((2, 8, 8)))
    with pytest.raises(InputError, match="float64 2x8x8; allowed: uint8"):
        read_frames(array)


def test_keys_follow_what_decides_an_answer(tmp_path: Path) -> None:
    other = {**GOOD, "image": "b.png"}
    first, same, else_, text = read_questions(
        write(tmp_path, GOOD, {**GOOD, "task": "x"}, other, {**GOOD, "question": "why ?"})
    )
    assert first.key == same.key and len({first.key, else_.key, text.key}) == 3
    before = model_key(tmp_path)
    keys = {run_key(before, Schedule()), run_key(before, Schedule.preset("image"))}
    keys |= {run_key(before, Schedule(), dtype="float16")}
    (tmp_path / "config.json").write_text("{}")
    assert len(keys | {run_key(model_key(tmp_path), Schedule())}) == 4


def test_videos_are_exported_too(tmp_path: Path) -> None:
    count = export(tmp_path, "dev", 2, per_scene=2, frames=4)
    asked = read_questions(tmp_path / "questions.jsonl", split="dev")
    assert len(asked) == count == 4 and len({question.scene for question in asked}) == 2
    assert [frame.size for frame in read_frames(asked[0])] == [(128, 128)] * 4


def test_wrong_images_are_of_the_same_task(small: Path) -> None:
    asked = read_questions(small / "questions" / "questions.jsonl")
    numbered = with_wrong_images(asked)
    others = list(numbered.values())
    assert [asked[number].text for number in numbered] == [q.text for q in others]
    of = {question.media: question.scene for question in asked}
    tasks = {(question.media, question.task) for question in asked}
    assert others and all(of[q.media] != q.scene and (q.media, q.task) in tasks for q in others)
    assert [q.text for q in others] == [q.text for q in asked if _has_other(q, asked)]


def _has_other(question: Any, asked: list[Any]) -> bool:
    return any(q.task == question.task and q.scene != question.scene for q in asked)


# ---------------------------------------------------------------------------------------------- answers


def test_answers_survive_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    store = Answers(path)
    store.add("r", {"1": "a", "2": "ü\n"}, {"n": 1})
    store.add("r", {"4": "b"}, {"n": 2})
    with path.open("ab") as file:  # of an earlier version
        file.write(b'{"run": "old", "question": "1", "answer": "a"}\n{"run": "old", "facts": {}}\n')
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"run": "r", "question": "3", "ans')
    again = Answers(path)
    assert again.answers["r"] == {"1": "a", "2": "ü\n", "4": "b"} and "old" not in again.answers
    assert [again.facts["r"][key] for key in "124"] == [{"n": 1}, {"n": 1}, {"n": 2}]
    assert path.read_bytes() == whole
    again.add("s", {"3": "c"}, {})
    assert Answers(path).answers["s"] == {"3": "c"}
    with path.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(InputError, match="line 6, is no answer"):
        Answers(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not JSON|Expecting"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "it is no object with a run"),
        (b'{"run": 5, "answers": {}, "facts": {}}', "it is no object with a run"),
        (b'{"run": "r", "answers": ["a"], "facts": {}}', "its answers are no object of texts"),
        (b'{"run": "r", "answers": {"1": 5}, "facts": {}}', "its answers are no object of texts"),
        (b'{"run": "r", "answers": {"1": "a"}, "facts": 5}', "its facts are no object"),
        (b'{"run": "r", "answers": {"1": "a", "1": "b"}, "facts": {}}', "the key '1' is in one object twice"),
        (b"\xff", "utf-8"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(line: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    content = line + b'\n{"run": "r", "cut'
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"line 1, is no answer of `luvc-fx eval`: .*({says})"):
        Answers(path)
    assert path.read_bytes() == content


def test_a_last_line_without_its_end_is_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"run": "r", "answers": {"1": "a"}, "facts": {}}')
    store = Answers(path)
    store.add("r", {"2": "b"}, {})
    assert Answers(path).answers["r"] == {"1": "a", "2": "b"}


def _row(length: int, visual: int, size: int, grid: tuple[int, ...] = (1, 2)) -> Prompt:
    text = {"input_ids": torch.full((1, length), 7), "attention_mask": torch.ones(1, length).long()}
    return Prompt(text, {"pixel_values": torch.ones(1, size), "grid": torch.tensor([grid])}, visual)


def test_batches_hold_rows_of_one_shape() -> None:
    rows = [_row(5, 4, 2), _row(6, 4, 3), _row(3, 4, 2), _row(4, 4, 2), _row(4, 4, 2, (2, 1))]
    assert list(batches(rows, 2)) == [([2, 3], 2), ([0], 2), ([1], 1), ([4], 1)]
    inputs = collate([rows[0], rows[2]], 3, 9, torch.device("cpu"), torch.float64)
    assert inputs["input_ids"].tolist() == [[9] * (16 - n) + [7] * n for n in (5, 3, 3)]
    assert inputs["attention_mask"].sum(1).tolist() == [5, 3, 3]
    assert inputs["pixel_values"].shape == (3, 2) and inputs["pixel_values"].dtype == torch.float64


def test_evidence_needs_accuracy_and_the_image() -> None:
    class Scored:
        accuracy = 0.93

    def evidence(wrong: WrongImage | None) -> bool | None:
        return is_evidence(Scored(), wrong)  # type: ignore[arg-type]

    assert evidence(WrongImage(9, 0.5, 0.93)) and evidence(None) is None
    assert not evidence(WrongImage(9, 0.7, 0.93))
    assert not evidence(WrongImage(9, 0.5, 0.7)), "on the control's own questions"


# ---------------------------------------------------------------------------------------------- command


@pytest.mark.slow
def test_the_command_writes_all_and_prints_one_object(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inductor would take minutes, and has no part in how times are taken.
    monkeypatch.setattr(_compat, "compile_inductor", lambda gm, *_: gm.forward)
    asked = ["--model", str(small / "model"), "--questions", str(small / "questions" / "questions.jsonl")]
    few = ["--methods", "last", "--limit", "3", "--max-new-tokens", "1", "--out", str(tmp_path)]
    assert main(["eval", *asked, *few, "--time", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in shown["rows"]] == ["unpruned", "last"]
    assert all(row["prefill_ms"] > 0 for row in shown["rows"])
    assert "| last |" in (tmp_path / "RESULTS.md").read_text()
    with Image.open(tmp_path / "pareto.png") as picture:
        wide = picture.width
    assert main(["eval", *asked, *few]) == 0
    assert "0.667" in capsys.readouterr().out
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.width < wide, "without times there is one panel"
    with pytest.raises(InputError, match="cannot be written"):
        draw(EvalResult([], [], {}, {}, {}, {}), tmp_path / "none" / "x.png")


@pytest.mark.parametrize(
    "more, said",
    [
        (["--methods", "spectrum,spice"], "method 'spice' is not known; allowed: default,"),
        (["--budgets", "0.5,x"], "--budgets is '0.5,x'; allowed: numbers in (0, 1]"),
        (["--budgets", "1.5"], "--budgets holds 1.5; allowed: numbers in (0, 1]"),
        (["--budgets", "nan"], "--budgets holds nan"),
        (["--budgets", ""], "--budgets is ''; allowed: values with commas between them"),
        (["--budgets", ", ,"], "--budgets is ', ,'"),
        (["--methods", ","], "--methods is ','"),
        (["--limit", "0"], "--limit"),
        (["--batch", "1" + "0" * 20], "--batch"),
        (["--max-new-tokens", "1" + "0" * 20], "--max-new-tokens"),
        (["--time", "1" + "0" * 20], "--time"),
        (["--seed", "-1"], "--seed"),
        (["--schedule", "none.json"], "neither a preset"),
        (["--split", "x"], "no question of split 'x'"),
        (["--questions", "none.jsonl"], "'none.jsonl' cannot be read"),
        (["--model", "nowhere"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(
    more: list[str],
    said: str,
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> Callable[[], None]:
        raise AssertionError("asked before everything was checked")

    monkeypatch.setattr(running, "ask", never)
    questions = str(small / "questions" / "questions.jsonl")
    common = ["--model", str(small / "model"), "--questions", questions, "--out", str(tmp_path)]
    assert main(["eval", *common, *more]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("...")]
    assert captured.out == "" and len(errors) == 1 and said in errors[0]


def test_an_interrupt_is_no_traceback(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "ask", stop)
    questions = str(small / "questions" / "questions.jsonl")
    argv = ["eval", "--model", str(small / "model"), "--questions", questions, "--out", str(tmp_path)]
    assert main(argv) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_eager_graphs_keep_the_tokens_that_inductor_keeps(tmp_path: Path) -> None:
    """The default of the command: the same rows and the same answers, on the shipped model."""
    model, processor = load(MODEL_DIR)
    prompts = Prompts(model.float(), processor)
    export(tmp_path, "dev", 6, per_scene=2)
    asked = read_questions(tmp_path / "questions.jsonl", limit=8)
    # Without the prune to zero, behind which nothing is left to compare.
    schedule = Schedule(prune=Schedule.preset("image").prune[:-1], merge=Schedule.preset("image").merge)
    rows = [prompts.prompt(question) for question in asked]
    inputs = collate(rows, len(rows), prompts.padding, model.device, model.dtype)
    kept, said = [], []
    for inner in ("eager", "inductor"):
        with torch.inference_mode(), luvc_fx.applied(model, schedule, inner=inner, strict=True):
            kept.append(model(**inputs).row_index)
            said.append(model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist())
    text = max(row.length - row.visual for row in rows)
    assert torch.equal(*kept) and text < kept[0].shape[1] < inputs["input_ids"].shape[1]
    assert said[0] == said[1]
