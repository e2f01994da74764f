"""A picture as the beginning of others: which codes are given, and which are to be drawn.

As in the paper's image-to-image figures (Ramesh et al. 2021, section 3.3 and appendix G): the caption
and the top rows of a picture's codes are given, the model draws the rest.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster.manifest import FolderError
from cluster.settings import SettingError
from data_pipeline.images import FORMATS, ImageProblem, decode, square
from data_pipeline.loader import to_pixels
from dvae.likelihood import map_pixels
from dvae.model import Dvae
from pretrain.draw import UNKNOWN

MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded


def read_prime(path: Path, rows: int, dvae: Dvae) -> Tensor:
    """(I,) int64 codes of a picture's middle square: its top `rows` rows, or all if that is 0.

    Codes whose patch has a transparent pixel are UNKNOWN too. FolderError if the picture cannot be
    read, SettingError if nothing or everything would be given.
    """
    if not path.is_file():
        raise FolderError(f"prime picture {path} does not exist")
    data = path.read_bytes()
    try:
        picture = decode(data, MAX_PIXELS)
    except ImageProblem as problem:
        raise FolderError(f"prime picture {path}: {problem}") from None
    side, grid = dvae.config.image_side, dvae.config.grid
    flat = io.BytesIO()
    picture.save(flat, "png")
    pixels = to_pixels(square(flat.getvalue(), side)[None]).to(next(dvae.parameters()).device)
    with torch.no_grad():
        codes = dvae.encode(map_pixels(pixels))[0].cpu()
    given = torch.from_numpy(opaque_patches(data, side, grid))
    if rows > grid:
        raise SettingError(f"prime_rows={rows} is more than the {grid} rows of codes that a picture has")
    if rows:
        given[rows:] = False
    if not given.any():
        raise SettingError(f"prime picture {path} gives no code: its top rows are transparent")
    if given.all():
        raise SettingError(f"prime picture {path} gives every code: set prime_rows, or make transparent what to draw")
    return torch.where(given, codes, UNKNOWN).flatten()


def opaque_patches(data: bytes, side: int, grid: int) -> np.ndarray:
    """(G, G) bool: which patches of the middle square have no transparent pixel."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        opaque = image.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha == 255))
    mask = io.BytesIO()
    opaque.save(mask, "png")
    patches = square(mask.getvalue(), side)[..., 0].reshape(grid, side // grid, grid, side // grid)
    return patches.min((1, 3)) == 255
