"""Writes safetensors one tensor at a time, in files of a limited size, under the Hugging Face Hub's names.

The safetensors package wants all tensors of a file in memory at once. The format is 8 bytes with the length of
a JSON header, the header, and the tensors' bytes one behind the other.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cluster.manifest import write_json
from cluster.weights import INDEX, WEIGHTS

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ALIGNED_BYTES = 8  # where the tensors begin, so that they can be mapped

Shapes = dict[str, tuple[int, ...]]


def write_weights(
    folder: Path, shapes: Shapes, dtype: torch.dtype, largest_bytes: int, tensor: Callable[[str], Tensor]
) -> list[str]:
    """Write `tensor(name)` for all names, and no more than one of them in memory; the names of the files.

    One file, or several of at most `largest_bytes` of tensors (a larger tensor has one to itself) and their index.
    """
    parts = _parts(shapes, dtype, largest_bytes)
    if len(parts) == 1:
        _write_file(folder / WEIGHTS, parts[0], dtype, tensor)
        return [WEIGHTS]
    stem, ending = WEIGHTS.split(".")
    files = [f"{stem}-{number:05d}-of-{len(parts):05d}.{ending}" for number in range(1, len(parts) + 1)]
    for name, part in zip(files, parts, strict=True):
        _write_file(folder / name, part, dtype, tensor)
    index = {
        "metadata": {"total_size": sum(_bytes(shape, dtype) for shape in shapes.values())},
        "weight_map": {weight: name for name, part in zip(files, parts, strict=True) for weight in part},
    }
    write_json(folder / INDEX, index)
    return [*files, INDEX]


def _parts(shapes: Shapes, dtype: torch.dtype, largest_bytes: int) -> list[Shapes]:
    parts: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        n_bytes = _bytes(shape, dtype)
        if parts[-1] and size + n_bytes > largest_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += n_bytes
    return parts


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _write_file(path: Path, shapes: Shapes, dtype: torch.dtype, tensor: Callable[[str], Tensor]) -> None:
    """The file is there whole or not at all."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _bytes(shape, dtype)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED_BYTES)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            value = tensor(name)
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, not {shape}")
            file.write(value.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
