"""Questions about images and videos, one JSON object a line."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luvc_fx.apps.inputs import read_image
from luvc_fx.generate.rgb import Say
from luvc_fx.methods.checks import refuse, shown
from luvc_fx.report.errors import InputError
from luvc_fx.schedule.json_text import parse

if TYPE_CHECKING:
    from PIL.Image import Image

ALL_TASKS = "all"
"""The name under which the questions of all tasks are counted together; no task may have it."""

ARRAYS = (".npy", ".npz")


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its right answer.

    Attributes:
        media: the files: images in order, or one array of them.
        video: whether they are shown as the frames of a video, and not as images one after another.
        task: what kind of question it is; accuracy is given for each.
        scene: what questions share that are not independent of each other: the image.
    """

    media: tuple[Path, ...]
    text: str
    answer: str
    task: str
    scene: str
    video: bool = False
    split: str = ""

    @property
    def key(self) -> str:
        """What decides the answer, apart from the model: a hash of the files' bytes and of the text."""
        hasher = hashlib.sha256(f"{self.video}\n{len(self.text)}\n{self.text}".encode())
        for path in self.media:
            hasher.update(_digest(path))
        return hasher.hexdigest()[:24]

    def right(self, answer: str) -> bool:
        """Whether `answer` is the right one: exactly, apart from case and spaces around it."""
        return normalised(answer) == normalised(self.answer)


def normalised(answer: str) -> str:
    """What of an answer is compared."""
    return answer.strip().lower()


@functools.cache
def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from None


def read_questions(path: Path, split: str | None = None, limit: int | None = None) -> list[Question]:
    """The questions in a JSONL file, in its order; files are found relative to its folder.

    Each line is an object with ``image`` or ``video`` (a file or a list of files in order; one ``.npy`` or
    ``.npz`` file may hold all, uint8 ``[frames, height, width, 3]``), ``question``, ``answer``, ``task``,
    and if wanted ``scene`` (without it the image or video) and ``split``. Other keys are ignored.

    Args:
        split: only questions of that split; `limit`: at most so many, from the beginning.

    Raises:
        InputError: a file that cannot be read, a line that is no question, with its number, or no
            question at all.
    """
    try:
        # Not splitlines: a text in JSON may hold what other standards end a line with.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"questions '{path}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"questions '{path}' is not a text file") from None
    questions, splits = [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = _question(line, path.parent)
        except ValueError as error:
            raise InputError(f"questions '{path}', line {number}: {error}") from None
        splits.add(question.split)
        if split is None or question.split == split:
            questions.append(question)
    if not questions:
        has = f" of split {split!r}; there are {sorted(splits)}" if splits else ""
        raise InputError(f"questions '{path}' holds no question{has}")
    return questions[:limit]


def _question(line: str, folder: Path) -> Question:
    try:
        entry = parse(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(entry, Mapping):
        raise ValueError(f"{shown(entry)} is not an object with image, question, answer and task")
    if ("image" in entry) == ("video" in entry):
        raise ValueError("a question needs either image or video")
    kind = "image" if "image" in entry else "video"
    names = _names(entry, kind)
    media = tuple(folder / name for name in names)
    for file in media:
        if not os.path.isfile(file):  # in the library, this fails for no name
            raise ValueError(f"{kind} {shown(str(file))} is not a file")
    task = _text(entry, "task")
    if task == ALL_TASKS:
        raise ValueError(f"task is {task!r}, which stands for all tasks together")
    scene = entry.get("scene", "|".join(names))
    if not isinstance(scene, (str, int)) or isinstance(scene, bool):
        refuse("", "scene", scene, "a text or a whole number")
    split = entry.get("split", "")
    if not isinstance(split, str):
        refuse("", "split", split, "a text")
    return Question(
        media=media,
        text=_text(entry, "question"),
        answer=_text(entry, "answer"),
        task=task,
        scene=str(scene),
        video=kind == "video",
        split=split,
    )


def _names(entry: Mapping[str, Any], kind: str) -> list[str]:
    given = entry[kind]
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) and name for name in names):
        refuse("", kind, given, "a file, or a list of files that is not empty")
    if len(names) > 1 and any(Path(name).suffix in ARRAYS for name in names):
        refuse("", kind, given, "one array, or images")
    return names


def _text(entry: Mapping[str, Any], field: str) -> str:
    if field not in entry:
        raise ValueError(f"{field} is missing")
    value = entry[field]
    if not isinstance(value, str) or not value.strip():
        refuse("", field, value, "a text that is not empty")
    return value


def read_frames(question: Question) -> list[Image]:
    """The images, or the frames of the video, in order, as RGB.

    Raises:
        InputError: a file that holds no image, or no array of frames.
    """
    return [frame for path in question.media for frame in _frames(path)]


def check_media(questions: Sequence[Question]) -> list[str]:
    """Decode all files of these questions, so that none fails when half of the answers are there.

    Returns:
        What reading them did that may be unexpected (`read_image`), a line each.

    Raises:
        InputError: naming the first file that cannot be read, and the number of others.
    """
    notes: list[str] = []
    errors: list[InputError] = []
    for path in dict.fromkeys(path for question in questions for path in question.media):
        try:
            _frames(path, notes.append)
        except InputError as error:
            errors.append(error)
    if len(errors) > 1:
        raise InputError(f"{errors[0]}; {len(errors) - 1} more files cannot be read either")
    if errors:
        raise errors[0]
    return notes


def _frames(path: Path, say: Say = lambda _: None) -> list[Image]:
    return _array_frames(path) if path.suffix in ARRAYS else [read_image(path, say)]


def _array_frames(path: Path) -> list[Image]:
    import numpy
    from PIL import Image

    try:
        frames = numpy.load(path, allow_pickle=False)
        if isinstance(frames, numpy.lib.npyio.NpzFile):
            with frames:
                names = frames.files
                if len(names) != 1:
                    raise InputError(f"'{path}' holds the arrays {names}; allowed: one")
                frames = frames[names[0]]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"'{path}' cannot be read: {type(error).__name__}") from None
    if frames.dtype != numpy.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        shape = "x".join(map(str, frames.shape))
        raise InputError(f"'{path}' is {frames.dtype} {shape}; allowed: uint8 frames x height x width x 3")
    return [Image.fromarray(frame) for frame in frames]


def with_wrong_images(questions: Sequence[Question]) -> dict[int, Question]:
    """The same questions, by number, about another scene's image or video: what the words alone give away.

    The other scene is the next one in the file that has a question of the same task, so that the
    wrong image is of the same type. Questions of a task with one scene are left out.
    """
    scenes: dict[str, dict[str, Question]] = defaultdict(dict)
    for question in questions:
        scenes[question.task].setdefault(question.scene, question)
    following: dict[str, dict[str, Question]] = {}
    for task, first in scenes.items():
        names = list(first)
        shifted = zip(names, [*names[1:], names[0]], strict=True)
        following[task] = {name: first[other] for name, other in shifted}
    return {
        number: dataclasses.replace(question, media=other.media, video=other.video)
        for number, question in enumerate(questions)
        if (other := following[question.task][question.scene]).scene != question.scene
    }
