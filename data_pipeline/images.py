"""Pictures as bytes <-> RGB arrays: decode whatever comes, resize, crop, encode.

The format is read from the bytes, never from the file's name. Transparent pictures are flattened
on white; grey, palette and CMYK become RGB; a camera's orientation tag is obeyed.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # a quarter of a GB as RGB: Pillow's own limit, above which it warns
# Pillow knows dozens of formats; one of them, EPS, is a program that it hands to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF")
IMAGE_ENDINGS = ("webp", "jpg", "jpeg", "png", "gif", "bmp", "tif", "tiff")


class ImageProblem(Exception):
    """Why a picture is dropped: a short reason to count."""


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The picture as RGB; ImageProblem if it is broken, cut or larger than `max_pixels`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _header(data, max_pixels)
            image.load()
            return _to_rgb(_upright(image))
    except ImageProblem:
        raise
    except Exception as error:  # decoders raise whatever their library does on bad bytes
        raise ImageProblem("image unreadable") from error


def _header(data: bytes, max_pixels: int) -> Image.Image:
    """The picture with its header read and its pixels not; ImageProblem if they would be too many."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageProblem("image too large") from error
    if image.width * image.height > max_pixels:
        raise ImageProblem("image too large")
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken tag says nothing against the picture
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("I", "I;16", "I;16B", "F"):  # 16-bit grey: Pillow would clip, not scale
        grey = np.asarray(image, np.float64)
        return Image.fromarray((grey / max(grey.max(), 255.0) * 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Reduce so that the shorter side is at most `side`, keeping the aspect; never enlarges."""
    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = (max(side, round(length * side / shorter)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BOX if shorter % side == 0 else Image.Resampling.LANCZOS)


def encode(image: Image.Image, ending: str, quality: int) -> bytes:
    """The picture as png (lossless), webp or jpg bytes; ImageProblem if the format cannot hold its size."""
    out = io.BytesIO()
    try:
        if ending == "png":
            image.save(out, "png")
        else:
            image.save(out, {"webp": "webp", "jpg": "jpeg"}[ending], quality=quality)
    except (OSError, ValueError) as error:
        raise ImageProblem(f"image too long for {ending}") from error
    return out.getvalue()


def square(data: bytes, side: int) -> np.ndarray:
    """Decode, crop the middle square, resize to side x side: (side, side, 3) uint8.

    ImageProblem, before the pixels are decoded, if there are more than MAX_PIXELS of them.
    """
    return np.asarray(_squared(data, side))


def planes(data: bytes, side: int) -> np.ndarray:
    """What `square` gives, as (3, side, side): cheaper than turning it round later."""
    rows = np.frombuffer(_squared(data, side).tobytes("raw", "RGB;L"), np.uint8)  # of a row all reds, greens, blues
    return rows.reshape(side, 3, side).transpose(1, 0, 2)


def _squared(data: bytes, side: int) -> Image.Image:
    image = _header(data, MAX_PIXELS)
    if image.mode != "RGB" or "exif" in image.info or "transparency" in image.info:  # no picture of ours
        image = decode(data, MAX_PIXELS)
    shorter = min(image.size)
    left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
    if image.size != (shorter, shorter):
        image = image.crop((left, top, left + shorter, top + shorter))
    if shorter != side:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return image
