"""Images as people have them: the right pixel values of each kind, and one reader behind every front."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from luvc_fx import SizeBuckets
from luvc_fx.apps import demo, inspection
from luvc_fx.apps.evaluation.questions import check_media, read_frames, read_questions
from luvc_fx.apps.inputs import read_image
from luvc_fx.downsample import downsample
from luvc_fx.generate.chat_prompt import make_prompt
from luvc_fx.generate.rgb import to_rgb
from luvc_fx.report.errors import InputError

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
UPRIGHT = np.array([[RED, GREEN, BLUE], [WHITE, BLACK, (90, 90, 90)]], dtype=np.uint8)
"""Two rows of three pixels, no two alike, so that each orientation shows."""

Saved = tuple[Path, Any, str]
"""A file, the pixels that it shows, and a part of what is said about it (empty: nothing)."""


def gray(*values: int) -> np.ndarray:
    """One row of gray pixels as RGB."""
    return np.repeat(np.array([values], dtype=np.uint8)[..., None], 3, axis=-1)


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def turned(orientation: int) -> Image.Image:
    """`UPRIGHT` as a camera stores it that was held so: the inverse of what the tag asks for."""
    rows = UPRIGHT
    stored = {
        1: rows,
        2: rows[:, ::-1],
        3: rows[::-1, ::-1],
        4: rows[::-1],
        5: rows.transpose(1, 0, 2),
        6: rows.transpose(1, 0, 2)[::-1],
        7: rows.transpose(1, 0, 2)[::-1, ::-1],
        8: rows.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    return Image.fromarray(np.ascontiguousarray(stored))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


def oriented(folder: Path, orientation: int) -> Saved:
    return save(turned(orientation), folder / "o.png", exif=exif(orientation)), UPRIGHT, ""


def sixteen_bits(folder: Path, ending: str) -> Saved:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    return save(Image.fromarray(values), folder / f"i16{ending}"), gray(0, 1, 100, 255), ""


def big_endian(folder: Path) -> Saved:
    values = np.array([[0, 257, 25700, 65535]], dtype=">u2")
    return save(Image.fromarray(values), folder / "i16b.tiff"), gray(0, 1, 100, 255), ""


def sixteen_bits_with_a_transparent_value(folder: Path) -> Saved:
    values = np.array([[0, 257, 25700]], dtype=np.uint16)
    file = save(Image.fromarray(values), folder / "trns.png", transparency=257)
    return file, gray(0, 255, 100), "white"


def thirty_two_bits(folder: Path) -> Saved:
    values = np.array([[-1_000_000, 0, 1_550_000]], dtype=np.int32)
    return save(Image.fromarray(values), folder / "i32.tiff"), gray(0, 100, 255), "-1e+06 to 1.55e+06"


def fractions(folder: Path) -> Saved:
    values = np.array([[0.2, 0.4, 0.6]], dtype=np.float32)
    return save(Image.fromarray(values), folder / "f.tiff"), gray(51, 102, 153), ""


def floats(folder: Path) -> Saved:
    values = np.array([[-10.0, 0.0, 15.5, np.nan, np.inf, -np.inf]], dtype=np.float32)
    return save(Image.fromarray(values), folder / "f.tiff"), gray(0, 100, 255, 0, 255, 0), "-10 to 15.5"


def one_number(folder: Path) -> Saved:
    values = np.full((1, 2), 7.0, dtype=np.float32)
    return save(Image.fromarray(values), folder / "f.tiff"), gray(0, 0), "7 to 7"


def palette(folder: Path) -> Saved:
    image = Image.fromarray(np.array([[2, 0, 1]], dtype=np.uint8), mode="P")
    image.putpalette([*RED, *GREEN, *BLUE])
    return save(image, folder / "p.png"), np.array([[BLUE, RED, GREEN]]), ""


def transparent_palette(folder: Path) -> Saved:
    image = Image.fromarray(np.array([[2, 0, 1]], dtype=np.uint8), mode="P")
    image.putpalette([*RED, *GREEN, *BLUE])
    file = save(image, folder / "p.png", transparency=bytes([0, 255, 51]))
    return file, np.array([[(204, 204, 255), WHITE, GREEN]]), "white"


def one_bit(folder: Path) -> Saved:
    image = Image.fromarray(np.array([[True, False, True]]))
    assert image.mode == "1"
    return save(image, folder / "1.png"), gray(255, 0, 255), ""


def transparent(folder: Path) -> Saved:
    pixels = np.array([[(*RED, 255), (*BLACK, 0), (0, 0, 255, 51)]], dtype=np.uint8)
    return save(Image.fromarray(pixels), folder / "a.png"), np.array([[RED, WHITE, (204, 204, 255)]]), "white"


def opaque(folder: Path) -> Saved:
    pixels = np.array([[(*RED, 255), (*BLACK, 255)]], dtype=np.uint8)
    return save(Image.fromarray(pixels), folder / "a.png"), np.array([[RED, BLACK]]), ""


def transparent_gray(folder: Path) -> Saved:
    pixels = np.array([[(100, 255), (0, 0)]], dtype=np.uint8)
    return save(Image.fromarray(pixels, mode="LA"), folder / "la.png"), gray(100, 255), "white"


def a_transparent_colour(folder: Path) -> Saved:
    pixels = np.array([[RED, BLACK]], dtype=np.uint8)
    file = save(Image.fromarray(pixels), folder / "rgb.png", transparency=BLACK)
    return file, np.array([[RED, WHITE]]), "white"


def cmyk(folder: Path) -> Saved:
    pixels = np.array([[(0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)]], dtype=np.uint8)
    return save(Image.fromarray(pixels, mode="CMYK"), folder / "c.tiff"), np.array([[RED, BLACK, WHITE]]), ""


def animated(folder: Path) -> Saved:
    frames = [Image.new("RGB", (2, 1), colour) for colour in (RED, GREEN, BLUE)]
    file = save(frames[0], folder / "g.gif", save_all=True, append_images=frames[1:])
    return file, np.array([[RED, RED]]), "the first of 3 frames"


def pages(folder: Path) -> Saved:
    frames = [Image.new("L", (1, 1), value) for value in (10, 20)]
    file = save(frames[0], folder / "t.tiff", save_all=True, append_images=frames[1:])
    return file, gray(10), "the first of 2 frames"


KINDS: dict[str, Callable[[Path], Saved]] = {
    **{f"orientation {n}": (lambda folder, n=n: oriented(folder, n)) for n in range(1, 9)},
    **{
        f"16 bits{end}": (lambda folder, end=end: sixteen_bits(folder, end))
        for end in (".png", ".tiff", ".pgm")
    },
    "16 bits, big endian": big_endian,
    "16 bits with a transparent value": sixteen_bits_with_a_transparent_value,
    "32 bits": thirty_two_bits,
    "fractions": fractions,
    "floats": floats,
    "one float": one_number,
    "palette": palette,
    "transparent palette": transparent_palette,
    "one bit": one_bit,
    "transparent": transparent,
    "opaque": opaque,
    "transparent gray": transparent_gray,
    "transparent colour": a_transparent_colour,
    "CMYK": cmyk,
    "animated": animated,
    "pages": pages,
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels(kind: str, tmp_path: Path) -> None:
    file, pixels, about = KINDS[kind](tmp_path)
    said: list[str] = []
    image = read_image(file, said.append)
    assert image.mode == "RGB"
    assert np.asarray(image).tolist() == np.asarray(pixels).tolist()
    assert len(said) == bool(about)
    assert all(about in line and str(file) in line for line in said)


@pytest.mark.parametrize("way", ["LA La", "RGBA RGBa", "LA PA", "RGBX", "YCbCr", "HSV"])
def test_other_modes(way: str) -> None:
    image = Image.fromarray(UPRIGHT[1:])
    gray_image = Image.fromarray(UPRIGHT[1:, :, 0])
    image = gray_image if way.startswith("LA") else image
    for mode in way.split():
        image = image.convert(mode)
    assert np.asarray(to_rgb(image)).tolist() == UPRIGHT[1:].tolist()


def test_plain_rgb_is_returned_as_it_is() -> None:
    image = Image.fromarray(UPRIGHT)
    assert to_rgb(image) is image


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.png", b"", "is empty"),
        ("text.jpg", b"not an image", "format"),
        ("cut.png", (demo.MODEL_DIR / "objects.png").read_bytes()[:3000], "truncated"),
        ("head.png", (demo.MODEL_DIR / "objects.png").read_bytes()[:20], ""),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        read_image(file)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_finite_value(tmp_path: Path) -> None:
    file = save(Image.fromarray(np.full((1, 2), np.nan, dtype=np.float32)), tmp_path / "nan.tiff")
    with pytest.raises(InputError, match="none of its values is finite"):
        read_image(file)


# ------------------------------------------------------------------------------------------ the fronts


@pytest.fixture
def sideways(tmp_path: Path) -> Path:
    """A photo of a phone that was held upright, in transparent gray."""
    pixels = np.array([[(0, 0)], [(100, 255)]], dtype=np.uint8)
    return save(Image.fromarray(pixels, mode="LA"), tmp_path / "photo.png", exif=exif(8))


SHOWN = gray(255, 100).tolist()


def test_demo_reads_by_it(sideways: Path) -> None:
    question = demo.ask(sideways, "what is it ?")
    assert np.asarray(question.image).tolist() == SHOWN
    assert question.notes == (f"image '{sideways}': transparent parts are composed on white",)


def test_inspect_reads_by_it(sideways: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(model: Any, processor: Any, images: list[Image.Image], text: str) -> Any:
        seen.extend(images)
        raise InputError("that is enough")

    monkeypatch.setattr(inspection, "load", lambda directory: (None, None))
    monkeypatch.setattr(inspection, "check_supported", lambda model: None)
    monkeypatch.setattr(inspection, "make_prompt", stop)
    said: list[str] = []
    with pytest.raises(InputError, match="that is enough"):
        inspection.inspect(Path(), None, [sideways], say=said.append)  # type: ignore[arg-type]
    assert np.asarray(seen[0]).tolist() == SHOWN
    assert said[0] == f"image '{sideways}': transparent parts are composed on white"


def test_eval_reads_by_it_and_all_files_at_once(sideways: Path, tmp_path: Path) -> None:
    broken = [tmp_path / "cut.png", tmp_path / "empty.png"]
    broken[0].write_bytes(b"PNG")
    broken[1].write_bytes(b"")
    lines = [
        json.dumps({"image": file.name, "question": "what ?", "answer": "ring", "task": "name"})
        for file in (sideways, *broken)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines))
    good, *bad = read_questions(file)
    assert np.asarray(read_frames(good)[0]).tolist() == SHOWN
    assert check_media([good, good]) == [f"image '{sideways}': transparent parts are composed on white"]
    with pytest.raises(InputError, match=r"empty\.png' is empty$"):
        check_media([good, bad[1]])
    with pytest.raises(InputError, match=r"cut\.png' is not .*; 1 more files cannot be read either"):
        check_media([good, *bad])


def test_buckets_fit_what_it_shows(sideways: Path) -> None:
    buckets = SizeBuckets(((10, 20), (20, 10)))
    for how in ("resize", "pad"):
        fitted = buckets.fit(Image.open(sideways), how)
        assert (fitted.mode, fitted.size) == ("RGB", (20, 10))
        assert fitted.getpixel((0, 5)) == WHITE
        assert fitted.getpixel((19, 5))[0] <= 100


def test_a_palette_is_looked_up_before_a_resize(tmp_path: Path) -> None:
    file, _, _ = palette(tmp_path)
    fitted = SizeBuckets(((1, 6),)).fit(Image.open(file))
    between = np.asarray(fitted)[0, 1]
    assert 0 < between[0] < 255 and 0 < between[2] < 255, "blue goes over into red"


def test_prompts_are_made_of_it(sideways: Path) -> None:
    seen: list[Any] = []

    class Processor:
        image_token = "<image>"

        def __call__(self, images: list[Image.Image], **_: Any) -> Any:
            seen.extend(images)
            raise ValueError("that is enough")

    with pytest.raises(InputError, match="that is enough"):
        make_prompt(None, Processor(), [Image.open(sideways)], "what ?")
    assert np.asarray(seen[0]).tolist() == SHOWN


def test_smaller_images_are_made_of_it(sideways: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = SimpleNamespace(takes_any_size=lambda processor: False, takes_squares=lambda processor: True)
    monkeypatch.setattr("luvc_fx.downsample.family_of", lambda model: family)
    vision = SimpleNamespace(image_size=32, patch_size=8)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    processor = SimpleNamespace(image_processor=SimpleNamespace(do_center_crop=False))
    smaller = downsample(model, processor, Image.open(sideways), 0.5)
    assert np.asarray(smaller.image).tolist() == SHOWN
