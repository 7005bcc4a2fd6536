"""What the rows of `luvc-fx eval` share, and what is kept: features, facts, keys, prompts, seeds, names."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

import luvc_fx
from examples.research.evidence import table
from examples.research.mixed_sizes import qwen2_vl
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.apps.evaluation import keys, prompts
from luvc_fx.apps.evaluation.asking import Facts, ask
from luvc_fx.apps.evaluation.features import Features
from luvc_fx.apps.evaluation.markdown import LEGEND, markdown
from luvc_fx.apps.evaluation.prompts import Prompts
from luvc_fx.apps.evaluation.questions import Question, read_questions
from luvc_fx.apps.evaluation.result import Cell
from luvc_fx.apps.evaluation.scoring import score
from luvc_fx.apps.evaluation.statistics import sign_flip
from luvc_fx.apps.evaluation.store import Answers
from luvc_fx.cli.commands import eval as command
from luvc_fx.downsample import downsample_all
from luvc_fx.report.errors import InputError
from luvc_fx.schedule import Prune, Schedule
from tests.support.models import inputs, tiny_llava

running = importlib.import_module("luvc_fx.apps.evaluation.run")

LAYERS = 16


def quiet(*_: object) -> None:
    """Say nothing."""


@torch.no_grad()
def test_shared_features_have_the_grid_wherever_tokens_are_pruned() -> None:
    """The unpruned model is asked first, and its encoder tells no grid.

    Without one there are no 2 x 2 squares, and images of a row cannot be told apart.
    """
    model = tiny_llava(grid=4, encoder_layers=1, decoder_layers=1, vision_feature_layer=-1)
    given, features, kept = inputs(model, images=2), Features(), []
    pruned, by_image = (Schedule(prune=Prune(keep=0.25, layer=0, per_image=value)) for value in (False, True))
    for schedule, shared in ((Schedule(), True), (pruned, True), (pruned, False), (by_image, True)):
        with luvc_fx.applied(model, schedule, inner="eager", strict=True):
            if shared:
                features.share(model)
            kept.append(model(**given).row_index)
    assert torch.equal(kept[1], kept[2]) and kept[1].shape[1] == kept[3].shape[1] == kept[0].shape[1] - 24
    assert len(features.kept) == 2


# ------------------------------------------------------------------------------- runs without a model


class Stub:
    """Stands for the model in a run: what it answers is up to `said`."""

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=LAYERS))

    def float(self) -> Stub:
        """Itself."""
        return self


def said(schedule: Schedule, question: Question) -> str:
    """Random tokens answer by their seed, the others are right; a wrong image is always answered wrongly."""
    number = int(question.text)
    if not question.media[0].stem.endswith(question.scene):
        return "no"
    if schedule.prune and schedule.prune[0].selector.name.startswith("random"):
        return "yes" if number % (schedule.prune[0].seed + 2) else "no"
    return "yes"


def stub_ask(given: Prompts, todo: Sequence[Question], schedule: Schedule, *_: Any) -> Iterator[Any]:
    """A question a batch; the number of visual tokens is the question's."""
    for question in todo:
        visual, part = int(question.text), given.smaller or 1.0
        yield [(question, said(schedule, question))], Facts([visual], visual, round(part, 1), 1.0)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `Options`; eight questions about four scenes, and one about a scene alone in its task."""
    lines = []
    for number in range(1, 10):
        scene = min((number - 1) // 2, 4)
        Image.new("RGB", (8, 8), (50 * scene, 0, 0)).save(tmp_path / f"image{scene}.png")
        task = "alone" if scene == 4 else "many"
        lines.append(
            f'{{"image": "image{scene}.png", "question": "{number}", "answer": "yes", "task": "{task}", '
            f'"scene": {scene}, "split": "{"ab"[number % 2]}"}}'
        )
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "model").mkdir()
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    monkeypatch.setattr(running, "load", lambda _: (Stub(), processor))
    monkeypatch.setattr(running, "ask", stub_ask)

    def make(**more: Any) -> Any:
        given = {"methods": ("spectrum", "random"), "budgets": (0.25,), **more}
        return running.Options(
            tmp_path / "model", tmp_path / "questions.jsonl", given.pop("out", tmp_path / "out"), **given
        )

    return make


def test_facts_are_of_the_questions_that_are_scored(options: Any) -> None:
    """Whatever was asked before: a few questions, a run that was stopped, another split."""

    def stop(title: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.run(options(), quiet, stop)
    for more, numbers in ({"limit": 3}, [1, 2, 3]), ({"split": "a"}, [2, 4, 6, 8]), ({}, range(1, 10)):
        row = running.run(options(**more), quiet, quiet).rows[0]
        assert row.visual == numbers[0] and row.tokens_per_layer == [numbers[0]]
        assert row.scores["all"].questions == len(numbers)
    asked = read_questions(options().questions)
    store = Answers(options().out / "answers.jsonl")
    asker = running.Asker(Stub(), SimpleNamespace(tokenizer=None), options(), store, quiet)
    seen = store.facts[asker.key(Cell("unpruned", None, Schedule()))]
    assert [seen[question.key]["visual"] for question in asked] == list(range(1, 10))


def test_random_tokens_are_asked_with_three_seeds(options: Any) -> None:
    given = options(
        seed=1, methods=("spectrum", "random", "random-block", "uniform"), schedules=("image:random",)
    )
    result = running.run(given, quiet, quiet)
    rows = {row.cell.method: row for row in result.rows}
    for name in ("random", "random-block", "image:random"):
        assert rows[name].to_dict()["seeds"] == [1, 2, 3]
        right = [sum(n % (seed + 2) > 0 for n in range(1, 10)) for seed in (1, 2, 3)]
        assert len(set(right)) > 1, "one seed says something else"
        assert rows[name].scores["all"].accuracy == pytest.approx(sum(right) / 27)
        against = rows["spectrum"].scores["all"].against
        if name in against:
            assert against[name].difference == pytest.approx(1 - sum(right) / 27)
            scenes = ((1, 2), (3, 4), (5, 6), (7, 8), (9,))
            lost = [sum(n % (seed + 2) == 0 for seed in (1, 2, 3) for n in scene) for scene in scenes]
            assert against[name].p == pytest.approx(sign_flip(lost)), "a scene is one difference"
    assert set(rows["spectrum"].scores["all"].against) == {"unpruned", "random", "random-block"}
    assert rows["uniform"].cell.seeds == () and "mean of 3 seeds" in markdown(result)


def test_seeds_are_counted_together() -> None:
    """By hand: two scenes of two questions; seeds are no further scenes."""
    asked = [Question((), str(n), "yes", "t", str(n // 2)) for n in range(4)]
    base, one, drawn = (Cell(name, 0.5, Schedule()) for name in "abc")
    words = {"1": "yes", "0": "no"}
    texts = {key: [words[c] for c in key] for key in ("1111", "1110", "1100", "0110", "1010")}
    found = score(
        asked,
        {base: texts["1111"], one: texts["1110"], drawn: texts["1100"]},
        base,
        {"c": {one: drawn}},
        again={drawn: [texts["0110"], texts["1010"]]},
    )
    drawn_score = found[drawn]["all"]
    assert drawn_score.accuracy == drawn_score.retention == drawn_score.agreement == 0.5
    assert drawn_score.accuracy_interval == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert drawn_score.against["unpruned"].difference == -0.5
    assert found[one]["all"].against["c"].difference == pytest.approx(0.25)
    assert found[one]["all"].against["c"].p == sign_flip([2, 1])


def test_wrong_images_are_compared_on_their_own_questions(options: Any) -> None:
    result = running.run(options(wrong_image=True, methods=("last",)), quiet, quiet)
    assert set(result.wrong_image) == {"all", "many"}
    control = result.wrong_image["all"]
    assert (control.questions, control.accuracy, control.right_image) == (8, 0.0, 1.0)
    assert "| all | 9 | 5 | 100.0 % (100.0 - 100.0) | 0.0 % of 8, right image 100.0 % | yes |" in markdown(
        result
    )
    assert result.to_dict()["wrong_image"]["many"]["right_image"] == 1.0
    lines = table.sets_table({"of": result.to_dict()})
    assert "| of | 9 | 5 | 100.0% | 0.0% (100.0%) | yes | alone (100%) |" in lines
    assert "per set" in LEGEND and "not over sets" in table.LEGEND


def test_a_missed_budget_is_told(options: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = running.run(options(methods=("downsample",), budgets=(0.33, 0.5)), quiet, quiet)
    assert [row.measured for row in result.rows[1:]] == [pytest.approx(0.3), pytest.approx(0.5)]
    text = markdown(result)
    assert "| downsample | 100.0 (100.0 - 100.0), at 30.0 % | 100.0 (100.0 - 100.0) |" in text
    given = {"of": {**result.to_dict(), "wrong_image": {}}}
    assert "| of | downsample | 100.0 (100.0 - 100.0), at 30.0% | 100.0 (100.0 - 100.0) |" in "\n".join(
        table.methods_table(given)
    )
    command.show(result, command.make_console())
    shown = capsys.readouterr().out
    assert "0.300" in shown and "s/question" not in shown, "which no two methods are measured alike in"
    assert result.to_dict()["rows"][1]["seconds_per_question"] == 1.0


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("a/x.json", "b/x.json"), "a/x.json"),
        (("a/x.json", "b/x.json:random"), "a/x.json"),
        (("a/last.json",), "the method 'last'"),
        (("a/last.json:random",), "the method 'last'"),
        (("a/unpruned.json",), "the unpruned model"),
        (("image", "a/image.json"), "image"),
    ],
)
def test_rows_are_never_of_one_name(names: tuple[str, ...], taken: str, options: Any, tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for stem in ("x", "last", "unpruned", "image"):
            (tmp_path / folder / f"{stem}.json").write_text(Schedule().to_json())
    given = tuple(name if name == "image" else str(tmp_path / name) for name in names)
    with pytest.raises(InputError, match="cannot be told from") as caught:
        running.run(options(schedules=given), quiet, quiet)
    assert taken in str(caught.value) and given[-1] in str(caught.value)


def test_one_file_may_be_given_with_several_selectors(options: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "x.json")
    Path(path).write_text(Schedule.preset("image").to_json())
    given = options(methods=("last",), schedules=(path, f"{path}:random", f"{path}:norm"))
    assert [row.cell.method for row in running.run(given, quiet, quiet).rows[2:]] == [
        "x",
        "x:random",
        "x:norm",
    ]


# --------------------------------------------------------------------------------------------- keys


def test_keys_follow_device_batch_and_processor(options: Any, tmp_path: Path) -> None:
    cell, store = Cell("u", None, Schedule()), Answers(tmp_path / "answers.jsonl")

    def key(video: object = None, device: str = "cpu", **more: Any) -> str:
        model, processor = Stub(), SimpleNamespace(tokenizer=None, video_processor=video)
        asker = running.Asker(model, processor, options(**more), store, quiet)
        model.device = torch.device(device)
        return str(asker.key(cell))

    assert key() == key()
    assert len({key(), key(batch=7), key(video="one"), key(device="meta")}) == 4


def test_keys_follow_packages_and_how_frames_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], Path.read_bytes

    def noted(path: Path) -> bytes:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    found = {keys.code_key.__wrapped__()}
    assert {"questions.py", "prompts.py", "random_block.py"} <= set(read)
    for changed in ("pillow", "torchvision", "tokenizers"):

        def version(name: str, changed: str = changed) -> str:
            if name == "torchvision" and changed != name:
                raise keys.PackageNotFoundError(name)
            return "changed" if name == changed else "1"

        monkeypatch.setattr(keys, "version", version)
        found.add(keys.code_key.__wrapped__())
    assert len(found) == 4


# ------------------------------------------------------------------------------------------ prompts


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, Any]:
    """A small model and its processor, without the part for videos."""
    model = qwen2_vl.build_model(hidden=256, decoder_layers=1, vision_hidden=64, encoder_layers=1)
    return model, qwen2_vl.build_processor()


def pictures(folder: Path, *sizes: tuple[int, int]) -> tuple[Path, ...]:
    """Files of noise, each of that width and height."""
    draw, found = np.random.default_rng(0), []
    for number, (width, height) in enumerate(sizes):
        found.append(folder / f"{number}.png")
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(found[-1])
    return tuple(found)


def test_a_video_is_not_shown_as_images_where_the_processor_lost_its_part(qwen: Any, tmp_path: Path) -> None:
    media = pictures(tmp_path, (56, 56), (56, 56))
    with pytest.raises(
        InputError, match=r"without its part for videos .* allowed: the frames as a list under"
    ):
        Prompts(*qwen).prompt(Question(media, "what ?", "a", "t", "s", video=True))
    assert Prompts(*qwen).prompt(Question(media, "what ?", "a", "t", "s")).visual == 8
    model, processor = tiny_llava(), AutoProcessor.from_pretrained(MODEL_DIR, local_files_only=True)
    model.config.image_token_id = processor.image_token_id
    never = Prompts(model, processor).prompt(Question(media, "what ?", "a", "t", "s", video=True))
    assert never.visual == 512, "LLaVA never knew videos"


@pytest.mark.parametrize("templated", [True, False])
def test_a_prompt_begins_once(qwen: Any, tmp_path: Path, templated: bool) -> None:
    model, processor = qwen[0], qwen2_vl.build_processor()
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    if templated:
        processor.chat_template = "<s> " + processor.chat_template
    row = Prompts(model, processor).prompt(Question(pictures(tmp_path, (56, 56)), "what ?", "a", "t", "s"))
    ids = row.text["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_several_images_are_made_smaller_together(qwen: Any, tmp_path: Path) -> None:
    """The largest comes last, and is not made smaller to what the first one has."""
    media = pictures(tmp_path, (56, 56), (224, 224))
    row = Prompts(*qwen, smaller=0.5).prompt(Question(media, "what ?", "a", "t", "s"))
    assert row.smaller is not None and row.smaller.of == 4 + 64
    assert row.visual == row.smaller.tokens == pytest.approx(34, abs=4)
    images = [Image.open(path).convert("RGB") for path in media]
    shown, whole = downsample_all(*qwen, images, 1.0)
    assert whole.tokens == whole.of == 68 and [image.size for image in shown] == [(56, 56), (224, 224)]


@pytest.mark.parametrize("most", [0, prompts.PIXEL_BYTES])
def test_pixels_are_held_for_one_batch(
    qwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    media = pictures(tmp_path, *[(56, 56)] * 6)
    asked = [Question((path,), "what ?", "a", "t", "s") for path in media]
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    real = Prompts.process

    def process(self: Prompts, question: Question) -> Any:
        found = real(self, question)
        made.append(weakref.ref(found[0]["pixel_values"]))
        return found

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        alive.append(sum(pixels() is not None for pixels in made))
        return torch.cat([input_ids, input_ids[:, :1]], dim=1)

    monkeypatch.setattr(Prompts, "process", process)
    monkeypatch.setattr(prompts, "PIXEL_BYTES", most)
    monkeypatch.setattr(qwen[0], "generate", generate)
    parts = list(ask(Prompts(*qwen), asked, Schedule(), batch=2))
    assert [len(part) for part, _ in parts] == [2, 2, 2]
    assert all(facts.budget == 1.0 and facts.visual == 4 for _, facts in parts)
    assert alive == ([6, 6, 6] if most else [2, 2, 2])
    assert len(made) == (6 if most else 12), "what is kept is processed once"
