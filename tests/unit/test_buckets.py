"""Size buckets: what is nearest, what is fitted, how they are spread, what they refuse."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import luvc_fx
from luvc_fx import SizeBuckets
from luvc_fx.generate.sizes.buckets import GREY
from tests.support.models_qwen import PATCH, UNIT, tiny_qwen2_vl

THREE = SizeBuckets(((336, 336), (224, 448), (448, 224)))


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), 200 if mode == "L" else (10, 200, 30))


def test_it_is_data() -> None:
    assert SizeBuckets([[336, 336], (224, 448), (448, 224)]) == THREE  # type: ignore[arg-type]
    assert hash(SizeBuckets(THREE.sizes)) == hash(THREE)
    assert len(THREE) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        THREE.sizes = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((336, 336), (336, 336)),
        ((2000, 2000), (336, 336)),
        ((600, 1300), (224, 448)),
        ((1300, 600), (448, 224)),
        ((10, 1000), (224, 448)),
    ],
)
def test_the_nearest(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert THREE.nearest(*size) == bucket


def test_the_area_counts_as_the_ratio_does() -> None:
    sizes = SizeBuckets(((100, 100), (400, 400), (100, 200)))
    assert sizes.nearest(120, 120) == (100, 100)
    assert sizes.nearest(300, 300) == (400, 400)
    # Twice the sides is as far as twice the ratio: from 100 x 200, 200 x 400 is nearer than a square.
    assert sizes.nearest(150, 300) == (100, 200)


def test_ties_do_not_depend_on_the_order() -> None:
    # A square is as far from a ratio of 2 as from one of 1/2, and 200 lies between 100 and 400.
    for sizes in ([(448, 224), (224, 448)], [(224, 448), (448, 224)]):
        assert SizeBuckets(tuple(sizes)).nearest(300, 300) == (224, 448)
    for sizes in ([(400, 400), (100, 100)], [(100, 100), (400, 400)]):
        assert SizeBuckets(tuple(sizes)).nearest(200, 200) == (100, 100)


@given(st.integers(1, 4000), st.integers(1, 4000), st.permutations(THREE.sizes))
def test_order_and_transposition(height: int, width: int, sizes: list[tuple[int, int]]) -> None:
    found = THREE.nearest(height, width)
    assert SizeBuckets(tuple(sizes)).nearest(height, width) == found
    if height != width and found != (336, 336):
        assert THREE.nearest(width, height) == found[::-1]


def test_resize() -> None:
    fitted = THREE.fit(picture(600, 1300))
    assert (fitted.height, fitted.width) == (224, 448)
    assert (numpy.asarray(fitted) == (10, 200, 30)).all()


def test_an_image_of_a_bucket_is_returned_as_it_is() -> None:
    image = picture(336, 336)
    assert THREE.fit(image) is image
    assert THREE.fit(image, "pad") is image


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pad_keeps_the_aspect_ratio(mode: str) -> None:
    image = Image.new(mode, (900, 600), 200 if mode == "L" else (200, 200, 200, 255)[: len(mode)])
    fitted = THREE.fit(image, how="pad", color=(1, 2, 3))
    assert (fitted.mode, fitted.height, fitted.width) == ("RGB", 336, 336)
    pixels = numpy.asarray(fitted)
    assert (pixels[:56] == (1, 2, 3)).all()
    assert (pixels[56:280] == 200).all()
    assert (pixels[280:] == (1, 2, 3)).all()


def test_the_padding_is_grey_unless_told() -> None:
    assert THREE.fit(picture(600, 900), "pad").getpixel((0, 0)) == GREY


def test_a_thread_of_an_image_keeps_a_pixel() -> None:
    fitted = THREE.fit(picture(1, 4000), "pad")
    assert (fitted.height, fitted.width) == (224, 448)
    assert fitted.getpixel((200, 111)) == (10, 200, 30)


# --------------------------------------------------------------------------------------------- spread


def test_spread() -> None:
    buckets = SizeBuckets.spread(8, area=448 * 448, granularity=28, narrowest=0.4, widest=2.5)
    assert len(buckets) == 8
    ratios = [width / height for height, width in buckets.sizes]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (0.4, 2.5)
    for height, width in buckets.sizes:
        assert height % 28 == width % 28 == 0
        assert 0.9 < height * width / 448**2 <= 1
        assert (width, height) in buckets.sizes


@given(st.integers(1, 12), st.integers(60, 900), st.integers(1, 32), st.floats(0.3, 1), st.floats(1, 4))
def test_spread_keeps_its_promises(count: int, side: int, unit: int, narrowest: float, widest: float) -> None:
    area = max(side, 4 * unit) ** 2
    buckets = SizeBuckets.spread(count, area, unit, narrowest, widest)
    assert 1 <= len(buckets) <= count
    for height, width in buckets.sizes:
        assert height % unit == width % unit == 0
        assert height * width <= area


def test_an_area_of_few_squares_gives_what_there_is() -> None:
    assert SizeBuckets.spread(2, 2 * 28 * 28, 28, 0.1, 10.0).sizes == ((56, 28), (28, 56))
    assert SizeBuckets.spread(2, 28 * 28, 28, 0.1, 10.0).sizes == ((28, 28),)


def test_one_bucket_is_in_the_middle() -> None:
    assert SizeBuckets.spread(1, 336 * 336, 28).sizes == ((336, 336),)


def test_the_granularity_of_a_model() -> None:
    assert SizeBuckets.granularity_of(tiny_qwen2_vl(encoder_layers=1, decoder_layers=1)) == PATCH * UNIT
    with pytest.raises(ValueError, match="SimpleNamespace has no vision_config with a patch_size"):
        SizeBuckets.granularity_of(SimpleNamespace(config=SimpleNamespace()))


def test_the_most_graphs() -> None:
    assert THREE.most_graphs() == 3 + 4 + 4
    assert THREE.most_graphs(warmed=False) == 3 + 6 + 4


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((), "SizeBuckets.sizes is empty"),
        (((1, 2), (1, 2)), r"holds \(1, 2\) twice"),
        (((0, 2),), r"holds \(0, 2\); allowed: a pair \(height, width\)"),
        (((1, 2, 3),), r"holds \(1, 2, 3\)"),
        (((1.5, 2),), r"holds \(1.5, 2\)"),
        ((336, 336), "holds 336"),
        (("ab",), "holds 'ab'"),
        (336, "is 336; allowed"),
    ],
)
def test_wrong_sizes(sizes: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SizeBuckets(sizes)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"count": 0}, "count is 0; allowed: a whole number of at least 1"),
        ({"count": True}, "count is True"),
        ({"granularity": 1.0}, "granularity is 1.0"),
        ({"narrowest": 3.0}, "0 < narrowest <= widest"),
        ({"widest": float("inf")}, "0 < narrowest <= widest"),
        ({"narrowest": "thin"}, r"narrowest, widest is \('thin', 2.0\); allowed: two numbers"),
        ({"count": 10**6}, "count is 1000000; allowed: at most 1024"),
        ({"count": 10**400}, "count is 1000+[.]{3}0+; allowed: a whole number of at least 1, below 2"),
        ({"count": torch.ones(2)}, "count is tensor"),
        ({"area": 10**15}, "area is 1000000000000000; allowed: 1 to 262144 times"),
        ({"area": 100}, "area is 100; allowed: 1 to 262144 times the granularity's square, which is 784"),
    ],
)
def test_wrong_spreads(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SizeBuckets.spread(**{"count": 3, "area": 336 * 336, "granularity": 28, **changed})


def test_wrong_images() -> None:
    with pytest.raises(ValueError, match=r"the image's size holds \(0, 5\)"):
        THREE.nearest(0, 5)
    with pytest.raises(ValueError, match="how is 'crop'; allowed: 'resize', 'pad'"):
        THREE.fit(picture(5, 5), how="crop")
    with pytest.raises(ValueError, match="image is 'x'; allowed: a PIL image"):
        THREE.fit("x")  # type: ignore[arg-type]
    for color in ("no colour", (1, 2), 10**400):
        with pytest.raises(ValueError, match=r"color is .*; allowed: a colour of Pillow"):
            THREE.fit(picture(5, 5), "pad", color)


def test_it_is_exported() -> None:
    assert luvc_fx.SizeBuckets is SizeBuckets
    assert "warmup" in luvc_fx.__all__
