"""What differs between two checkpoints: settings, inputs, and every weight and moment by name.

    smalti checkpoint diff runs/a other=runs/b          the newest of each that verifies
    smalti checkpoint diff runs/a step=100 other_step=200

Whatever ZeRO stages and numbers of ranks wrote them; also works on runs of `smalti dvae` and `smalti scorer`. Exit
code 1 if anything differs. Needs the memory of the largest parameter a few times over, and reads every byte.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.checkpoint import find_checkpoint
from cluster.command import Command, run_command
from cluster.manifest import FolderError, differences
from cluster.settings import setting
from cluster.weights import STATE
from pretrain.engine_files import AVERAGE, WEIGHT, EngineFiles

LINES = 40  # tensors that are shown


@dataclass(frozen=True)
class DiffConfig:
    """Which two."""

    run: str = setting("runs/train", "run folder (first plain word)")
    other: str = setting("", "run folder to compare with; empty: the same")
    step: int = setting(-1, "checkpoint of `run`; -1: the newest that verifies")
    other_step: int = setting(-1, "checkpoint of `other`; -1: the newest that verifies")


Tensors = dict[str, Callable[[], Tensor]]  # name -> reads it


def diff(config: DiffConfig) -> None:
    """Run the verb; see the module's text. FolderError if anything differs."""
    one = find_checkpoint(Path(config.run), config.step)
    other = find_checkpoint(Path(config.other or config.run), config.other_step)
    print(f"{one.folder} (step {one.step:,})  -  {other.folder} (step {other.step:,})")
    lines = [f"setting {text}" for text in differences(one.about["settings"], other.about["settings"]).values()]
    lines += [f"input {text}" for text in differences(one.about["made_from"], other.about["made_from"]).values()]
    found, count = compare(tensors_of(one.folder), tensors_of(other.folder))
    shown = [*lines, *found[:LINES]]
    print("\n".join(shown) if shown else "no difference")
    if len(found) > LINES:
        print(f"... and {len(found) - LINES} more tensors")
    if shown:
        raise FolderError(f"{len(lines)} settings and inputs and {len(found)} of {count} tensors differ")


def compare(one: Tensors, other: Tensors) -> tuple[list[str], int]:
    """A line for each tensor that differs, the largest relative difference first; how many there are in all."""
    lines: list[tuple[float, str]] = []
    names = list(dict.fromkeys([*one, *other]))
    for name in names:
        if name not in one or name not in other:
            lines.append((float("inf"), f"{name}: only in the {'first' if name in one else 'second'}"))
        elif (line := _difference(name, one[name](), other[name]())) is not None:
            lines.append(line)
    return [text for _, text in sorted(lines, key=lambda line: -line[0])], len(names)


def _difference(name: str, a: Tensor, b: Tensor) -> tuple[float, str] | None:
    """How far apart, relative to the largest value, and that in words; None for equal tensors (NaN equals NaN)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        kinds = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (a, b)]
        return float("inf"), f"{name}: {kinds[0]} there, {kinds[1]} here"
    apart = (a != b) & ~((a != a) & (b != b))
    count = int(apart.sum())
    if not count:
        return None
    share = f"{name}: {count:,} of {a.numel():,} differ"
    if not a.is_floating_point():  # codes of 16-bit moments, which have no distance
        return count / a.numel(), share
    gap, scale = float((a.float() - b.float()).abs().max()), float(torch.maximum(a.abs().max(), b.abs().max()))
    relative = gap / scale if scale else 0.0
    return relative if relative == relative else float("inf"), f"{share}, by at most {gap:.3g} ({relative:.2g} of max)"


def tensors_of(folder: Path) -> Tensors:
    """Everything that a checkpoint holds; FolderError if nothing of smalti wrote it."""
    return _of_state(folder / STATE) if (folder / STATE).is_file() else _of_engine(EngineFiles(folder))


def _of_engine(files: EngineFiles) -> Tensors:
    found: Tensors = {}
    for name in files.names:
        for key in (WEIGHT, *([AVERAGE] if files.has_average() else []), *files.keys(name)):
            found[f"{name} ({key})"] = lambda name=name, key=key: files.tensor(name, key)  # type: ignore[misc]
        for key, value in files.scalars(name).items():
            found[f"{name} ({key})"] = lambda value=value: torch.as_tensor(value)  # type: ignore[misc]
    return found


def _of_state(path: Path) -> Tensors:
    """Of a one-process trainer: nested dicts and lists, by their keys."""
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {name: lambda value=value: value for name, value in _leaves(state, "").items()}  # type: ignore[misc]


def _leaves(value: Any, name: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found: dict[str, Tensor] = {}
    for key, inner in pairs:
        found |= _leaves(inner, f"{name}.{key}" if name else str(key))
    return found


COMMAND = Command(
    "checkpoint diff", DiffConfig, Path(__file__).parent / "configs" / "diff", diff, __doc__, plain=("run",)
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
