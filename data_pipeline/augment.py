"""Random crops of pictures as the authors made them (Ramesh et al. 2021, Listings 1 and 2), drawn from counters.

The listings are for crops of 256 pixels; for another side every length is in proportion.

Both shrink with TensorFlow's AREA at align_corners=True. That is no plain average over areas: output
pixel y is the mean over the input from y * s to (y + 1) * s with s = (n_in - 1) / (n_out - 1), so the
windows begin at the first pixel, overlap the last one, and the last output pixel is the last input
pixel. `area` is that, to the rounding of TensorFlow's own float32 sums (0.01 of 255). Pillow's BOX is
not: it takes whole pixels with centred windows of n_in / n_out.
"""

import math

import numpy as np
from PIL import Image

from cluster.manifest import FolderError, Manifest
from data_pipeline.images import ImageProblem

TARGET = 256  # the side that the listings crop to
NINE_EIGHTHS, TWELVE_EIGHTHS = 288, 384  # and the sides that they shrink to before


def dvae_crop(image: Image.Image, side: int, random: np.random.Generator) -> np.ndarray:
    """Listing 1 but for its flip: (side, side, 3) uint8 of any square of the picture, shrunk and cropped again.

    ImageProblem if the picture is smaller than the crop.
    """
    shorter = _checked(image, side)
    left, top = (int(random.integers(length - shorter + 1)) for length in image.size)
    low, high = (min(shorter, most * side // TARGET) for most in (NINE_EIGHTHS, TWELVE_EIGHTHS))
    return _cropped(image, left, top, shorter, low, high, side, random)


def transformer_crop(image: Image.Image, side: int, random: np.random.Generator) -> np.ndarray:
    """Listing 2: (side, side, 3) uint8 of a square near the middle, shrunk less; no flip, pictures may hold text.

    ImageProblem if the picture is smaller than the crop.
    """
    shorter = _checked(image, side)
    left, top = (_near_middle(length - shorter, random) for length in image.size)
    high = min(shorter, NINE_EIGHTHS * side // TARGET)
    return _cropped(image, left, top, shorter, side, high, side, random)


def check_room(images: Manifest, side: int, most: int) -> str:
    """What to say of stored pictures that leave random crops of this side too little room; "" if nothing.

    images: of the folder; tars of others have no settings, and nothing is known of them. most: what the listing
    shrinks to at most, NINE_EIGHTHS or TWELVE_EIGHTHS. FolderError if no picture is as large as the crop.
    """
    stored, wanted = images.settings.get("image_side", math.inf), most * side // TARGET
    if stored >= wanted:
        return ""
    told = f"pictures are stored with {stored} pixels along the short side"
    advice = f"`smalti preprocess` with image_side={wanted} and filters.min_side={side} keeps them larger"
    if stored < side:
        raise FolderError(f"{told}, too few for random crops of {side}; {advice}")
    few = "all crops of a square one are the same" if stored == side else "crops differ less than the paper's"
    return f"warning: {told}, and random crops of {side} want {wanted}: {few}; {advice}"


def area(pixels: np.ndarray, side: int) -> np.ndarray:
    """(n, n, 3) uint8 -> (side, side, 3) uint8 as TensorFlow's AREA resize with aligned corners, rounded."""
    if len(pixels) == side:
        return pixels
    return np.rint(_area_along(_area_along(pixels, side, 0), side, 1).clip(0, 255)).astype(np.uint8)


def _checked(image: Image.Image, side: int) -> int:
    shorter = min(image.size)
    if shorter < side:
        raise ImageProblem(f"{image.width} x {image.height} pixels, less than the crop's {side}")
    return shorter


def _near_middle(spare: int, random: np.random.Generator) -> int:
    """A whole number from 3/8 of what is to spare to below 5/8 of it."""
    first = 3 * spare // 8
    return int(random.integers(first, max(first + 1, 5 * spare // 8)))


def _cropped(
    image: Image.Image, left: int, top: int, shorter: int, low: int, high: int, side: int, random: np.random.Generator
) -> np.ndarray:
    """The square at (left, top), shrunk to a side drawn from low to high, both included; of it a crop anywhere."""
    square = np.asarray(image.crop((left, top, left + shorter, top + shorter)))
    shrunk = area(square, int(random.integers(low, high + 1)))
    x, y = (int(random.integers(len(shrunk) - side + 1)) for _ in range(2))
    return shrunk[y : y + side, x : x + side]


def _area_along(values: np.ndarray, count: int, axis: int) -> np.ndarray:
    """`count` means of neighbours along an axis of (n, w, 3) or (h, n, 3), in float32."""
    length = values.shape[axis]
    scale = (length - 1) / (count - 1) if count > 1 else float(length)
    starts = np.arange(count) * scale
    shape = [1, 1, 1]
    shape[axis] = count
    total = np.float32(0)
    for tap in range(math.ceil(scale) + 1):  # pixels that a window may touch
        places = starts.astype(np.int64) + tap
        share = (np.minimum(places + 1, starts + scale) - np.maximum(places, starts)).clip(0) / scale
        reached = values.take(np.minimum(places, length - 1), axis)  # over the edge the last one goes on
        total = total + reached * share.astype(np.float32).reshape(shape)
    return np.asarray(total)
