"""The authors' random crops: where a crop may lie, how it is shrunk, and what it is drawn from."""

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_pipeline.augment import area, dvae_crop, transformer_crop
from data_pipeline.images import ImageProblem
from data_pipeline.order import counter_random

# TensorFlow 2.21's ResizeArea(align_corners=True) of the red of (7, 7, 3) values 37 n mod 256, rounded to 3 places
TENSORFLOW = {
    4: [[60.0, 154.0, 120.0, 158.5], [78.0, 172.0, 138.0, 176.5], [96.0, 62.0, 156.0, 194.5],
        [109.5, 75.5, 169.5, 208.0]],
    5: [[40.0, 188.0, 117.0, 94.333, 157.0], [52.0, 200.0, 129.0, 106.333, 169.0],
        [67.0, 158.111, 144.0, 121.333, 184.0], [79.0, 56.333, 156.0, 133.333, 196.0],
        [91.0, 68.333, 168.0, 145.333, 208.0]],
}  # fmt: skip


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red is the column and whose green is the row; both below 256."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def plain_area(pixels: np.ndarray, side: int) -> np.ndarray:
    """The definition, pixel by pixel: the mean over a window, beyond the edge the last pixel."""
    length = len(pixels)
    scale = (length - 1) / (side - 1) if side > 1 else length
    shares = np.zeros((side, length))
    for y in range(side):
        for row in range(math.floor(y * scale), math.ceil((y + 1) * scale)):
            part = min((y + 1) * scale, row + 1) - max(y * scale, row)
            shares[y, min(row, length - 1)] += part / scale
    return np.einsum("yr,rcz,xc->yxz", shares, pixels.astype(np.float64), shares)


@pytest.mark.parametrize("side", [4, 5])
def test_shrinking_is_tensorflows(side: int) -> None:
    pixels = (np.arange(7 * 7 * 3).reshape(7, 7, 3) * 37 % 256).astype(np.uint8)
    assert np.array_equal(area(pixels, side)[:, :, 0], np.rint(TENSORFLOW[side]))


@pytest.mark.parametrize(("length", "side"), [(7, 4), (8, 4), (10, 7), (96, 75), (85, 72), (5, 1), (200, 33), (9, 9)])
def test_shrinking_is_the_mean_over_windows(length: int, side: int) -> None:
    pixels = np.random.default_rng(length).integers(0, 256, (length, length, 3), np.uint8)
    exact = plain_area(pixels, side)
    shrunk = area(pixels, side)
    assert shrunk.dtype == np.uint8
    assert np.abs(shrunk - exact).max() <= 0.5 + 1e-3  # rounding to whole numbers, from float32 sums


def test_flat_pictures_stay_flat() -> None:
    for value in (0, 1, 127, 254, 255):
        assert (area(np.full((100, 100, 3), value, np.uint8), 67) == value).all()


def test_a_picture_of_the_crops_own_size_is_left_as_it_is() -> None:
    image = coordinates(64, 64)
    for crop in (dvae_crop, transformer_crop):
        assert np.array_equal(crop(image, 64, np.random.default_rng(0)), np.asarray(image))


def test_the_transformers_squares_lie_near_the_middle() -> None:
    """Of 80 spare columns those from 30 to 49; with a square as large as the crop nothing else is drawn."""
    image = coordinates(144, 64)
    lefts = Counter(int(transformer_crop(image, 64, counter_random(0, n))[0, 0, 0]) for n in range(2000))
    assert lefts.keys() == set(range(30, 50))
    assert min(lefts.values()) > 60  # 100 each are expected, and 60 lies four standard deviations below
    tall = coordinates(64, 144)
    tops = {int(transformer_crop(tall, 64, counter_random(0, n))[0, 0, 1]) for n in range(400)}
    assert tops == set(range(30, 50))


@pytest.mark.parametrize(
    ("spare", "found"), [(0, {0}), (1, {0}), (2, {0}), (3, {1}), (4, {1}), (5, {1, 2}), (8, {3, 4})]
)
def test_a_square_with_little_to_spare_is_still_placed(spare: int, found: set[int]) -> None:
    image = coordinates(64 + spare, 64)
    assert {int(transformer_crop(image, 64, counter_random(0, n))[0, 0, 0]) for n in range(200)} == found


def test_the_dvaes_squares_lie_anywhere() -> None:
    image = coordinates(144, 64)
    lefts = {int(dvae_crop(image, 64, counter_random(0, n))[0, 0, 0]) for n in range(2000)}
    assert lefts == set(range(81))


@pytest.mark.parametrize(
    ("crop", "sides"),
    [(transformer_crop, range(64, 73)), (dvae_crop, range(72, 97))],
)
def test_the_sides_that_are_shrunk_to_are_those_of_the_listings(
    crop: object, sides: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 to 288, and 288 to 384, in proportion: a quarter of them for crops of 64."""
    drawn = Counter()
    monkeypatch.setattr("data_pipeline.augment.area", lambda pixels, side: drawn.update([side]) or area(pixels, side))
    for n in range(1000):
        assert crop(coordinates(200, 200), 64, counter_random(0, n)).shape == (64, 64, 3)  # type: ignore[operator]
    assert drawn.keys() == set(sides)


@pytest.mark.parametrize(("shorter", "sides"), [(68, {68}), (80, set(range(72, 81)))])
def test_nothing_is_enlarged(shorter: int, sides: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: set[int] = set()
    monkeypatch.setattr("data_pipeline.augment.area", lambda pixels, side: drawn.add(side) or area(pixels, side))
    for n in range(300):
        dvae_crop(coordinates(200, shorter), 64, counter_random(0, n))
    assert drawn == sides


def test_the_last_crop_lies_anywhere_in_what_was_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first corner to the last."""
    monkeypatch.setattr("data_pipeline.augment.area", lambda pixels, side: np.asarray(coordinates(side, side)))
    corners = {tuple(transformer_crop(coordinates(80, 80), 64, counter_random(0, n))[0, 0, :2]) for n in range(4000)}
    assert {corner[0] for corner in corners} == {corner[1] for corner in corners} == set(range(9))
    assert (0, 8) in corners and (8, 0) in corners


@pytest.mark.parametrize("crop", [dvae_crop, transformer_crop])
def test_a_picture_smaller_than_the_crop_is_refused(crop: object) -> None:
    with pytest.raises(ImageProblem, match="200 x 63 pixels, less than the crop's 64"):
        crop(coordinates(200, 63), 64, np.random.default_rng(0))  # type: ignore[operator]
