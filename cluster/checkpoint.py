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
from cluster.process import Place, wait_for_all
from cluster.settings import UserError

SEAL = "smalti_manifest.json"
_STEP = re.compile(r"global_step(\d+)")


class Checkpoints:
    """The `checkpoints/` folder of one run."""

    def __init__(self, folder: Path, place: Place, keep_last: int) -> None:
        self.folder = folder
        self.place = place
        self.keep_last = keep_last

    def save(self, step: int, about: dict[str, Any], write: Callable[[Path, str], None]) -> None:
        """Save the state after `step` updates; called by every rank.

        `write(folder, tag)` puts the state's files into folder / tag, on every rank. `about` (JSON)
        is kept in the seal. A full disk stops the run with a UserError; earlier saves stay valid.
        """
        tag = f"global_step{step}"
        part = self.folder / "unfinished"
        if self.place.is_main:
            shutil.rmtree(part, ignore_errors=True)
            (part / tag).mkdir(parents=True)
        wait_for_all(self.place)
        try:
            write(part, tag)
            wait_for_all(self.place)
            if self.place.is_main:
                self._seal(part / tag, step, about)
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(self.folder).free / 2**20
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(
                f"could not save {self.folder / tag} with {free:.0f} MiB of disk free ({_reason(error)}); "
                "earlier checkpoints are untouched: free some space and run the same command again"
            ) from error
        wait_for_all(self.place)

    def newest_valid(self) -> tuple[int, Path, dict[str, Any]] | None:
        """(step, folder, about) of the newest checkpoint that verifies, or None if there is none."""
        for step, folder in sorted(self._found(), reverse=True):
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
        for _, old in sorted(self._found())[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)

    def _found(self) -> list[tuple[int, Path]]:
        paths = self.folder.glob("global_step*") if self.folder.is_dir() else ()
        matches = ((_STEP.fullmatch(path.name), path) for path in paths)
        return [(int(match[1]), path) for match, path in matches if match]


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
