"""Checkpoints that survive a kill at any byte.

`checkpoints/global_stepN/` is written under a temporary name, sealed with a manifest of sizes and
digests, renamed, and only then does `checkpoints/latest` (DeepSpeed's pointer file) move to it. A
restore takes the newest folder whose manifest verifies and says which ones it passed over.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.manifest import file_digest, write_bytes, write_json
from cluster.process import Place, largest_of

SEAL = "smalti_manifest.json"
_STEP = re.compile(r"global_step(\d+)")


class Checkpoints:
    """The `checkpoints/` folder of one run."""

    def __init__(self, folder: Path, place: Place, keep_last: int, keep_every: int = 0) -> None:
        """keep_last: how many are kept; keep_every: those of its multiples are kept as well, 0 is none."""
        self.folder = folder
        self.place = place
        self.keep_last, self.keep_every = keep_last, keep_every

    def save(self, step: int, about: dict[str, Any], write: Callable[[Path, str], None]) -> bool:
        """Save the state after `step` updates; called by every rank, and the same answer on all: is it saved?

        `write(folder, tag)` puts the state's files into folder / tag, on every rank. `about` (JSON) is kept
        in the seal. A save that fails, or that would not fit on the disk as the newest one does, says so in
        one line and leaves earlier ones as they were: a healthy run goes on.
        """
        tag = f"global_step{step}"
        part = self.folder / "unfinished"
        problem = self._prepare(part / tag) if self.place.is_main else ""
        if self._anywhere(tag, problem):
            return False
        try:
            write(part, tag)
        except (OSError, RuntimeError) as error:
            problem = _reason(error)
        if self._anywhere(tag, problem):
            shutil.rmtree(part, ignore_errors=True)
            return False
        try:
            if self.place.is_main:
                self._seal(part / tag, step, about)
        except OSError as error:
            problem = _reason(error)
        return not self._anywhere(tag, problem)

    def _prepare(self, part: Path) -> str:
        """Make the unfinished folder; what stands against it, if anything."""
        try:
            shutil.rmtree(part.parent, ignore_errors=True)
            part.mkdir(parents=True)
            files = [path for _, folder in found_in(self.folder)[-1:] for path in folder.rglob("*")]
            needed = sum(path.stat().st_size for path in files)
            free = shutil.disk_usage(part).free
        except OSError as error:
            return _reason(error)
        return f"the newest one has {needed / 2**20:.0f} MiB" if free < needed else ""

    def _anywhere(self, tag: str, problem: str) -> bool:
        """True on all ranks if any has a problem, which that one tells."""
        if problem:
            free = shutil.disk_usage(self.folder).free / 2**20 if self.folder.is_dir() else 0
            told = f"could not save {self.folder / tag} with {free:.0f} MiB of disk free ({problem})"
            print(f"smalti: {told}; earlier checkpoints are untouched", file=sys.stderr, flush=True)
        return bool(largest_of(self.place, int(bool(problem))))

    def newest_valid(self) -> tuple[int, Path, dict[str, Any]] | None:
        """(step, folder, about) of the newest checkpoint that verifies, or None if there is none."""
        for step, folder in reversed(found_in(self.folder)):
            problem = verify(folder)
            if problem is None:
                return step, folder, json.loads((folder / SEAL).read_text())["about"]
            if self.place.is_main:
                print(f"smalti: passing over {folder}: {problem}", file=sys.stderr)
        return None

    def _seal(self, part: Path, step: int, about: dict[str, Any]) -> None:
        files = {}
        for path in sorted(path for path in part.rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files[str(path.relative_to(part))] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        write_json(part / SEAL, {"step": step, "about": about, "files": files})
        target = self.folder / part.name
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        write_bytes(self.folder / "latest", part.name.encode())
        shutil.rmtree(part.parent, ignore_errors=True)
        found = found_in(self.folder)
        for old in set(found) - set(kept_of(found, self.keep_last, self.keep_every)):
            shutil.rmtree(old[1], ignore_errors=True)


def found_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint in a `checkpoints/` folder, whole or not, by step."""
    paths = folder.glob("global_step*") if folder.is_dir() else ()
    matches = ((_STEP.fullmatch(path.name), path) for path in paths)
    return sorted((int(match[1]), path) for match, path in matches if match)


def kept_of(found: list[tuple[int, Path]], last: int, every: int) -> list[tuple[int, Path]]:
    """Which of `found_in` are kept: the last ones, and those whose step is a multiple of `every` (0: none)."""
    return [pair for pair in found if pair in found[-last:] or (every and pair[0] % every == 0)]


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file has its size and digest."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        sealed = [(name, record["bytes"], record["sha256"]) for name, record in seal["files"].items()]
        if not isinstance(seal["about"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {SEAL} is missing or unreadable (the save did not finish)"
    for name, n_bytes, digest in sealed:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != n_bytes or file_digest(path) != digest:
            return f"{name} was cut or changed"
    return None


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
