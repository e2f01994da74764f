"""Checkpoints that survive a kill at any byte.

`checkpoints/global_stepN/` is written under a temporary name, sealed with a manifest of sizes and
digests, renamed, and only then does `checkpoints/latest` (DeepSpeed's pointer file) move to it. A
restore takes the newest folder whose manifest verifies and says which ones it passed over.

What follows the copy of the state into memory may happen in a background thread of each rank. Threads
use no collective: each leaves a note in the folder, which all ranks see, and rank 0 seals when it has all.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.manifest import FolderError, file_digest, write_bytes, write_json
from cluster.process import Place, largest_of
from cluster.snapshot import SnapshotWriter, first_line

SEAL = "smalti_manifest.json"
REPLACED = ".old"  # of a folder that one of the same step is about to replace
PATIENCE_SECONDS = 600.0  # that rank 0 waits for the notes of the others when it has written its own files
PATIENCE_AT_END_SECONDS = 5.0  # and after an error has ended its training: a rank that is lost leaves no note
_STEP = re.compile(rf"global_step(\d+)({re.escape(REPLACED)})?")


class Checkpoints:
    """The `checkpoints/` folder of one run. Every rank has one and calls it in step."""

    def __init__(
        self,
        folder: Path,
        place: Place,
        keep_last: int,
        keep_every: int = 0,
        writers: Collection[int] | None = None,
    ) -> None:
        """keep_last: how many are kept; keep_every: those of its multiples are kept as well, 0 is none. writers:
        the ranks that hold what is saved, with 0 among them (the others hold replicas); None: all."""
        self.folder, self.place = folder, place
        self.keep_last, self.keep_every = keep_last, keep_every
        self.writers = frozenset(range(place.world_size) if writers is None else writers)
        if 0 not in self.writers:
            raise ValueError(f"rank 0 seals checkpoints, so it must be one of the writers {sorted(self.writers)}")
        self.writer = SnapshotWriter(writes=place.rank in self.writers)
        self.saved_step = -1  # the newest known to be sealed by this process; moved by `wait`
        self.stall_seconds = 0.0  # how long training stood still for the last save
        self._part = folder / "unfinished"
        self._thread: threading.Thread | None = None
        self._sealed = -1  # step of the last save, on rank 0, once it is sealed

    def save(
        self, step: int, about: dict[str, Any], write: Callable[[Path, str], None], background: bool = False
    ) -> bool:
        """Save the state after `step` updates; called by every rank, and the same answer on all: is it saved?

        `write(folder, tag)` puts the state's files into folder / tag, on every rank, or gives them to `writer`,
        which copies them: then with background=True the rest happens while training goes on, the answer is
        whether it has begun, and `wait` tells the outcome. `about` (JSON) is kept in the seal. A save that fails,
        or that would not fit on the disk as the newest one does, says so in one line and leaves earlier ones as
        they were: a healthy run goes on.
        """
        started = time.monotonic()
        try:
            self.wait()
            self._sealed = -1
            tag = f"global_step{step}"
            problem = self._prepare(tag) if self.place.is_main else ""
            if largest_of(self.place, int(bool(problem))):
                self._tell(tag, problem)
                return False
            problem = self._write(write, tag)
            words = (step, json.dumps(about), problem)
            if self.place.rank not in self.writers:
                return background or self.wait()
            if background:
                self._thread = threading.Thread(target=self._finish, args=words, name=f"save {tag}")
                self._thread.start()
                return True
            self._finish(*words)
            return self.wait()
        finally:
            self.stall_seconds = time.monotonic() - started

    def wait(self) -> bool:
        """Until the save under way has ended; is the last one saved? Collective, and the same answer on all ranks."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        sealed = largest_of(self.place, self._sealed)
        self.saved_step = max(self.saved_step, sealed)
        return sealed >= 0

    def newest_valid(self) -> tuple[int, Path, dict[str, Any]] | None:
        """(step, folder, about) of the newest checkpoint that verifies, or None if there is none.

        Collective: the ranks share the reading.
        """
        self.wait()
        found = found_in(self.folder) if self.place.is_main else []
        while (number := largest_of(self.place, _number(found.pop()[1]) if found else 0)) > 0:
            folder = self.folder / _name(number)
            problem = verify(folder, self.place.rank, self.place.world_size)
            if not largest_of(self.place, int(problem is not None)):
                return number // 2 - 1, folder, about_of(folder)
            if problem is not None:
                print(f"smalti: passing over {folder}: {problem}", file=sys.stderr)
        return None

    def _prepare(self, tag: str) -> str:
        """Make the unfinished folder; what stands against it, if anything."""
        try:
            shutil.rmtree(self._part, ignore_errors=True)
            (self._part / tag).mkdir(parents=True)
            files = [path for _, folder in found_in(self.folder)[-1:] for path in folder.rglob("*")]
            needed = sum(path.stat().st_size for path in files)
            free = shutil.disk_usage(self._part).free
        except OSError as error:
            return first_line(error)
        return f"the newest one has {needed / 2**20:.0f} MiB" if free < needed else ""

    def _write(self, write: Callable[[Path, str], None], tag: str) -> str:
        """Call it; what went wrong, if anything."""
        self.writer.clear()
        try:
            write(self._part, tag)
        except (OSError, RuntimeError) as error:
            return first_line(error)
        return self.writer.problem

    def _finish(self, step: int, about: str, problem: str) -> None:
        """What follows `write` on each rank that writes, perhaps in its thread: files, note, on rank 0 the seal."""
        tag = f"global_step{step}"
        files: dict[str, Any] = {}
        if not problem:
            try:
                files = self.writer.write_out()
            except Exception as error:  # whatever it is, training goes on
                problem = first_line(error)
        try:
            write_json(self._note(self.place.rank), {"problem": problem, "files": files})
            if self.place.is_main:
                notes = self._notes()
                problem = _in_one_line({rank: note["problem"] for rank, note in notes.items()}, self.place.world_size)
                if not problem:
                    self._seal(tag, {"step": step, "about": json.loads(about)}, notes)
                    self._sealed = step
        except Exception as error:
            problem = first_line(error)
        if self.place.is_main and problem:
            self._tell(tag, problem)
            shutil.rmtree(self._part, ignore_errors=True)

    def _note(self, rank: int) -> Path:
        return self._part / f"rank{rank}.json"

    def _notes(self) -> dict[int, dict[str, Any]]:
        """What each writing rank says of its files. One that says nothing for too long has a problem."""
        notes: dict[int, dict[str, Any]] = {}
        started, pause = time.monotonic(), 0.005
        until = started + PATIENCE_SECONDS
        while missing := self.writers - notes.keys():
            names = set(os.listdir(self._part))  # one call for all, and one that a shared file system answers afresh
            here = [rank for rank in missing if self._note(rank).name in names]
            if not threading.main_thread().is_alive():
                until = min(until, time.monotonic() + PATIENCE_AT_END_SECONDS)
            notes |= {rank: json.loads(self._note(rank).read_text()) for rank in here}
            if not here and time.monotonic() > until:
                silence = f"no word in {time.monotonic() - started:.0f} s; does it see this folder?"
                return notes | {rank: {"problem": silence} for rank in missing}
            if not here:
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
        return notes

    def _tell(self, tag: str, problem: str) -> None:
        """One line about a save that failed, from rank 0."""
        if self.place.is_main:
            free = shutil.disk_usage(self.folder).free / 2**20 if self.folder.is_dir() else 0
            told = f"could not save {self.folder / tag} with {free:.0f} MiB of disk free ({problem})"
            print(f"smalti: {told}; earlier checkpoints are untouched", file=sys.stderr, flush=True)

    def _seal(self, tag: str, seal: dict[str, Any], notes: dict[int, dict[str, Any]]) -> None:
        part, target, replaced = self._part / tag, self.folder / tag, self.folder / (tag + REPLACED)
        known = {name: record for note in notes.values() for name, record in note["files"].items()}
        files = {}
        for path in sorted(path for path in part.rglob("*") if path.is_file()):
            files[str(path.relative_to(part))] = known.pop(str(path), None) or _flushed(path)
        if known:
            raise FileNotFoundError(f"{min(known)} is not seen by rank 0; do all ranks share this file system?")
        seal |= {"files": files}
        write_json(part / SEAL, seal | {"sha256": _digest(seal)})
        _flush_folder(part)
        if target.exists():  # out of the way, and still to be found until the new one stands there
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        part.rename(target)
        _flush_folder(self.folder)
        write_bytes(self.folder / "latest", tag.encode())
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(self._part, ignore_errors=True)
        found = found_in(self.folder)
        for old in set(found) - set(kept_of(found, self.keep_last, self.keep_every)):
            shutil.rmtree(old[1], ignore_errors=True)


def found_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint in a `checkpoints/` folder, whole or not, by step."""
    paths = folder.glob("global_step*") if folder.is_dir() else ()
    return [(_number(path) // 2 - 1, path) for path in sorted(filter(_number, paths), key=_number)]


def kept_of(found: list[tuple[int, Path]], last: int, every: int) -> list[tuple[int, Path]]:
    """Which of `found_in` are kept: the last ones, and those whose step is a multiple of `every` (0: none)."""
    return [pair for pair in found if pair in found[-last:] or (every and pair[0] % every == 0)]


def verify(folder: Path, share: int = 0, n_shares: int = 1) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file has its size and digest.

    Only every `n_shares`-th digest is compared, from number `share` on: ranks verify together.
    """
    try:
        seal = json.loads((folder / SEAL).read_text())
        sealed = [(name, record["bytes"], record["sha256"]) for name, record in seal["files"].items()]
        if seal.pop("sha256") != _digest(seal) or not isinstance(seal["about"], dict):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {SEAL} is missing or unreadable (the save did not finish)"
    for number, (name, n_bytes, digest) in enumerate(sealed):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != n_bytes or (number % n_shares == share and file_digest(path) != digest):
            return f"{name} was cut or changed"
    return None


@dataclass(frozen=True)
class Checkpoint:
    """One that verified: its folder, and what was said of it when it was saved."""

    step: int
    folder: Path
    about: dict[str, Any]


def find_checkpoint(run: Path, step: int = -1) -> Checkpoint:
    """A run's checkpoint of that step, or (-1) the newest, if it verifies; FolderError if there is none."""
    found = found_in(run / "checkpoints")
    for number, folder in reversed(found):
        if step not in (-1, number):
            continue
        problem = verify(folder)
        if problem is None:
            return Checkpoint(number, folder, about_of(folder))
        print(f"smalti: passing over {folder}: {problem}", file=sys.stderr)
    steps = ", ".join(str(number) for number, _ in found) or "none"
    asked = f"no checkpoint of step {step} that verifies" if step >= 0 else "no checkpoint that verifies"
    raise FolderError(f"{run / 'checkpoints'} holds {asked} (steps there: {steps})")


def about_of(folder: Path) -> dict[str, Any]:
    """What was said of a checkpoint when it was saved."""
    return json.loads((folder / SEAL).read_text())["about"]


def _number(path: Path) -> int:
    """Orders checkpoint folders by step, one about to be replaced before the one that replaces it; 0: it is none."""
    match = _STEP.fullmatch(path.name)
    return 2 * (int(match[1]) + 1) + (match[2] is None) if match else 0


def _name(number: int) -> str:
    return f"global_step{number // 2 - 1}{'' if number % 2 else REPLACED}"


def _digest(seal: dict[str, Any]) -> str:
    """Of what a seal says: a flip in its settings would make a run refuse to go on, instead of passing it over."""
    return hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()


def _in_one_line(problems: dict[int, str], world_size: int) -> str:
    """The first rank's problem and how many others have one; "" if none has."""
    bad = sorted((rank, problem) for rank, problem in problems.items() if problem)
    if not bad:
        return ""
    rank, problem = bad[0]
    more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
    return problem if world_size == 1 else f"rank {rank}: {problem}{more}"


def _flushed(path: Path) -> dict[str, Any]:
    """Size and digest of a file that is on the disk when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _flush_folder(folder: Path) -> None:
    """Let the names in a folder survive a power cut."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
