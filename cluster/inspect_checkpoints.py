"""Look at the checkpoints of a run, and clear old ones away.

    smalti checkpoint ls runs/train                       what is there
    smalti checkpoint verify runs/train                   every file against its digest; exit code 1 if one is bad
    smalti checkpoint prune runs/train keep_last=1        remove all but these; shows them, and acts with yes=true
    smalti checkpoint diff runs/a other=runs/b            which weights and settings differ  } verbs of their own:
    smalti checkpoint export runs/train out=released      weights for others to use          } see their --help

Works on any trainer's run folder, with or without the run going on. Verifying reads every byte.
"""

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.checkpoint import REPLACED, SEAL, found_in, kept_of, verify
from cluster.command import Command, run_command
from cluster.manifest import FolderError
from cluster.settings import SettingError, require_at_least_one, setting


@dataclass(frozen=True)
class CheckpointConfig:
    """What is done, and to which run."""

    action: Literal["ls", "verify", "prune"] = setting("ls", "what to do (first plain word)")
    run: str = setting("runs/train", "run folder (second plain word)")
    keep_last: int = setting(2, "prune: checkpoints kept")
    keep_every: int = setting(0, "prune: steps of whose multiples checkpoints are kept too; 0 is none")
    yes: bool = setting(False, "prune: remove what it shows")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("keep_last",))
        if self.keep_every < 0:
            raise SettingError(f"keep_every={self.keep_every} must be at least 0")


def inspect(config: CheckpointConfig) -> None:
    """Run the action; see the module's text. FolderError if there is nothing to look at, or something is bad."""
    folder = Path(config.run) / "checkpoints"
    found = found_in(folder)
    if not found:
        raise FolderError(f"{folder} holds no checkpoint; name the run folder, as runs/train")
    {"ls": show, "verify": check, "prune": prune}[config.action](config, folder, found)


def show(config: CheckpointConfig, folder: Path, found: list[tuple[int, Path]]) -> None:
    """A line a checkpoint: step, size, age, and what became of its save."""
    latest = folder / "latest"
    newest = latest.read_text().strip() if latest.is_file() else ""
    for step, path in found:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        hours = (time.time() - path.stat().st_mtime) / 3600
        state = "sealed" if (path / SEAL).is_file() else "unfinished"
        state += ", to be replaced by a new save of this step" if path.name.endswith(REPLACED) else ""
        state += ", latest" if path.name == newest else ""
        print(f"step {step:>9,}  {size / 2**20:>10,.1f} MiB  {hours:>7.1f} h old  {state}")


def check(config: CheckpointConfig, folder: Path, found: list[tuple[int, Path]]) -> None:
    """A line a checkpoint: good, or what is wrong with it."""
    problems = {path.name: verify(path) for _, path in found}
    for name, problem in problems.items():
        print(f"{name}: {problem or 'good'}")
    bad = [name for name, problem in problems.items() if problem]
    if bad:
        good = [name for name in problems if name not in bad]
        rest = f"{good[-1]} would be restored" if good else "none is left to restore"
        raise FolderError(f"{len(bad)} of {len(found)} checkpoints of {config.run} are bad ({', '.join(bad)}); {rest}")


def prune(config: CheckpointConfig, folder: Path, found: list[tuple[int, Path]]) -> None:
    """Remove all but those kept, and never the newest that verifies."""
    whole = next((path for _, path in reversed(found) if verify(path) is None), None)
    kept = {path for _, path in kept_of(found, config.keep_last, config.keep_every)} | {whole}
    for _, path in found:
        if path not in kept:
            print(f"{'removed' if config.yes else 'would remove'} {path}")
            if config.yes:
                shutil.rmtree(path)
    if not config.yes:
        print("nothing was removed: say yes=true")


COMMAND = Command(
    "checkpoint", CheckpointConfig, Path(__file__).parent / "configs", inspect, __doc__, plain=("action", "run")
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
