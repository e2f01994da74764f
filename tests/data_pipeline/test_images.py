"""Pictures of every kind become RGB; broken ones are named."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.images import ImageProblem, decode, encode, planes, shrink, square
from tests.pairs import encoded, picture


def corner(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0].tolist())


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_every_format_is_told_by_its_bytes(kind: str) -> None:
    image = decode(picture("red", (5, 4), kind), 100)
    assert image.size == (5, 4)
    assert np.abs(np.asarray(image).astype(int) - [255, 0, 0]).max() <= 5


def test_grey_palette_bilevel_and_cmyk_become_rgb() -> None:
    assert corner(decode(encoded(Image.new("L", (4, 4), 100), "png"), 100)) == (100, 100, 100)
    assert corner(decode(encoded(Image.new("1", (4, 4), 1), "png"), 100)) == (255, 255, 255)
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert corner(decode(encoded(palette, "png"), 100)) == (10, 200, 30)
    cmyk = corner(decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "jpeg"), 1000))
    assert cmyk[0] > 240 and cmyk[1] < 15 and cmyk[2] < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_on_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    assert corner(decode(encoded(clear, "png"), 100)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128)).convert(mode)
    assert corner(decode(encoded(half, "png"), 100)) == (127, 127, 127)


def test_a_transparent_palette_colour_lies_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((3, 3), 0)
    image.info["transparency"] = 1
    decoded = decode(encoded(image, "gif"), 100)
    assert corner(decoded) == (255, 255, 255)
    assert decoded.getpixel((3, 3)) == (0, 0, 0)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.array([[0, 16_384], [32_768, 65_535]], np.uint16)
    decoded = np.asarray(decode(encoded(Image.fromarray(ramp), "png"), 100))
    assert np.abs(decoded[..., 0] - np.array([[0.0, 63.75], [127.5, 255.0]])).max() < 1


def test_a_camera_orientation_tag_is_obeyed() -> None:
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    with_tag = encoded_with_exif(image, exif.tobytes())
    upright = decode(with_tag, 1000)
    assert upright.size == (16, 32)
    assert corner(upright)[0] < 20 and np.asarray(upright)[-1, 0, 0] > 235


def test_a_broken_orientation_tag_costs_no_picture() -> None:
    assert decode(encoded_with_exif(Image.new("RGB", (8, 4), "red"), b"Exif\0\0garbage"), 100).size == (8, 4)


def encoded_with_exif(image: Image.Image, exif: bytes) -> bytes:
    """JPEG with the EXIF block put in by hand, so that it may be broken."""
    data = encoded(image, "jpeg")
    block = exif if exif.startswith(b"Exif") else b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


def test_broken_cut_and_empty_pictures_are_unreadable() -> None:
    whole = encoded(Image.effect_noise((64, 64), 90), "jpeg")
    for data in (b"", b"<html>", whole[: len(whole) // 2], whole[:30], picture("red")[:45]):
        with pytest.raises(ImageProblem, match="image unreadable"):
            decode(data, 10_000)


def test_pictures_above_the_limit_are_dropped_before_they_are_decoded() -> None:
    assert decode(picture("red", (10, 10)), 100).size == (10, 10)
    with pytest.raises(ImageProblem, match="image too large"):
        decode(picture("red", (10, 10)), 99)
    bomb = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
        bomb += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    with pytest.raises(ImageProblem, match="image too large"):
        decode(bomb, 100_000_000)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 50), (32, 16)), ((50, 100), (16, 32)), ((16, 400), (16, 400)), ((9, 5), (9, 5)), ((17, 17), (16, 16))],
)
def test_shrinking_keeps_the_aspect_and_never_enlarges(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert shrink(Image.new("RGB", size), 16).size == expected


def test_shrinking_by_a_whole_number_averages_blocks() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    small = np.asarray(shrink(Image.fromarray(pixels), 8), np.float64)
    blocks = pixels.reshape(8, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(small - blocks).max() <= 1


def test_png_is_lossless_and_webp_and_jpg_are_near() -> None:
    pixels = np.asarray(Image.radial_gradient("L").resize((64, 64)).convert("RGB"))
    for ending, most in (("png", 0), ("webp", 12), ("jpg", 12)):
        back = np.asarray(decode(encode(Image.fromarray(pixels), ending, 95), 10_000)).astype(int)
        assert np.abs(back - pixels).max() <= most


def test_a_picture_too_long_for_the_format_is_named() -> None:
    for ending, length in (("webp", 16_384), ("jpg", 65_501)):
        with pytest.raises(ImageProblem, match=f"image too long for {ending}"):
            encode(Image.new("RGB", (1, length)), ending, 90)


def test_square_is_the_middle_of_the_picture() -> None:
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (10, 0, 20, 10))
    assert (square(encoded(image, "png"), 10) == [255, 0, 0]).all()
    assert (square(encoded(image.transpose(Image.Transpose.ROTATE_90), "png"), 5) == [255, 0, 0]).all()


@pytest.mark.parametrize("size", [(12, 12), (17, 9), (9, 30)])
def test_planes_are_the_square_with_its_colours_apart(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = encoded(Image.fromarray(pixels), "png")
    for side in (9, 12):
        assert (planes(data, side) == square(data, side).transpose(2, 0, 1)).all()
