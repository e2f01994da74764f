"""What a sample holds: its caption, its picture, its codes. What is missing or damaged is a ShardError."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from PIL import Image

from cluster.command import shown
from data_pipeline.augment import dvae_crop
from data_pipeline.captions import CAPTION_ENDINGS
from data_pipeline.images import IMAGE_ENDINGS, MAX_PIXELS, ImageProblem, decode, planes, square
from data_pipeline.shards import Sample, ShardError

MOST_CAPTION_BYTES = 1 << 16  # no caption is so long
T = TypeVar("T")
MAGIC = b"\x93NUMPY\x01\x00"  # version 1.0: two bytes of length, then the header


def picture_of(sample: Sample, side: int) -> np.ndarray:
    """(side, side, 3) uint8 picture of an images/ sample; ShardError if it has none that can be decoded."""
    return _decoded(sample, lambda data: square(data, side))


def planes_of(sample: Sample, side: int) -> np.ndarray:
    """As `picture_of`, as (3, side, side)."""
    return _decoded(sample, lambda data: planes(data, side))


def image_of(sample: Sample) -> Image.Image:
    """The whole picture as RGB; ShardError as of `picture_of`."""
    return _decoded(sample, lambda data: decode(data, MAX_PIXELS))


def random_planes_of(sample: Sample, side: int, random: np.random.Generator) -> np.ndarray:
    """(3, side, side) uint8 of a random crop as of Listing 1; ShardError also if the picture is too small."""
    image = image_of(sample)
    try:
        return dvae_crop(image, side, random).transpose(2, 0, 1)
    except ImageProblem as problem:
        raise ShardError(f"sample {shown(sample.key)}: {problem}") from None


def _decoded(sample: Sample, made_of: Callable[[bytes], T]) -> T:
    for ending in IMAGE_ENDINGS:
        if ending in sample.files:
            try:
                return made_of(sample.files[ending])
            except MemoryError:
                raise
            except Exception as error:  # decoders raise whatever their library does on bad bytes
                raise ShardError(
                    f"sample {shown(sample.key)}: {ending} cannot be decoded ({reason_of(error)})"
                ) from None
    raise ShardError(f"sample {shown(sample.key)} has no picture, only {shown(', '.join(sample.files))}")


def caption_of(sample: Sample) -> str:
    """The caption of a sample; ShardError if it has none in UTF-8, or one that must be a mistake."""
    text = next((sample.files[ending] for ending in CAPTION_ENDINGS if ending in sample.files), None)
    if text is None:
        raise ShardError(f"sample {shown(sample.key)} has no caption, only {shown(', '.join(sample.files))}")
    if len(text) > MOST_CAPTION_BYTES:
        raise ShardError(
            f"sample {shown(sample.key)} has a caption of {len(text)} bytes, more than {MOST_CAPTION_BYTES}"
        )
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ShardError(f"sample {shown(sample.key)} has a caption that is not UTF-8 ({error.reason})") from None


@dataclass(frozen=True)
class Codes:
    """What the codes of a folder must be like: a side G and a codebook K, where they are known."""

    grid: int | None = None
    codebook: int | None = None

    def read(self, sample: Sample) -> np.ndarray:
        """(crops, G, G) whole numbers below K; ShardError if the sample has no such array."""
        if "npy" not in sample.files:
            raise ShardError(f"sample {shown(sample.key)} has no npy, only {shown(', '.join(sample.files))}")
        try:
            codes = read_npy(sample.files["npy"])
        except (ValueError, EOFError, OSError) as error:
            raise ShardError(f"sample {shown(sample.key)}: npy cannot be read ({reason_of(error)})") from None
        shape = codes.shape
        if (
            codes.dtype.kind not in "ui"
            or len(shape) != 3
            or not codes.size
            or shape[1:] != (self.grid or shape[1],) * 2
        ):
            wanted = f"crops of {self.grid or 'G'} x {self.grid or 'G'} codes"
            raise ShardError(f"sample {shown(sample.key)}: npy holds {codes.dtype} {shape}, not {wanted}")
        if self.codebook is not None and (codes.max() >= self.codebook or codes.min() < 0):
            raise ShardError(f"sample {shown(sample.key)}: npy holds codes outside of 0 to {self.codebook - 1}")
        return codes


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as the content of a .npy file."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def read_npy(data: bytes) -> np.ndarray:
    """The array of a .npy file's content; ValueError if it is damaged, or would need a pickle.

    np.load parses every header with Python's own parser, which takes longer than all the rest: here
    each different header is parsed once.
    """
    if not data.startswith(MAGIC[:6]):
        raise ValueError("no array in the format of numpy")
    start = 10 + int.from_bytes(data[8:10], "little")
    if data.startswith(MAGIC):
        shape, dtype, is_fortran = _header(data[:start])
        if not is_fortran and len(data) == start + math.prod(shape) * dtype.itemsize:
            return np.frombuffer(data, dtype, offset=start).reshape(shape)
    return np.load(io.BytesIO(data), allow_pickle=False)


@lru_cache(maxsize=256)
def _header(data: bytes) -> tuple[tuple[int, ...], np.dtype, bool]:
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("objects, which would have to be unpickled")
    return shape, dtype, is_fortran


def reason_of(error: Exception) -> str:
    """An error in one line that is the same on every machine: without addresses in memory."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shown(re.sub(r" ?<[^>]* at 0x[0-9a-f]+>", "", text.splitlines()[0]))
