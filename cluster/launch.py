"""What every launch has: the program that all processes run, the record it leaves, and the code it ends with.

OUT/launch/NNN/  launch.toml (how it was started)  settings.toml (of the verb, resolved)  command.txt
                 code.txt (git commit, or version)  code.diff (what differs from that commit, if anything does)
                 environment.txt (of a hostfile's launch: names of the variables that went along, without values)
"""

import importlib.metadata
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.manifest import write_bytes
from cluster.process import TIMEOUT
from cluster.settings import SettingError, setting, to_toml
from cluster.watch import INTERRUPTED, REQUEUE

PLANNED = (REQUEUE, INTERRUPTED)  # of a run that was told to stop: it saved, and its processes end together
MOST_DIFF_BYTES = 10 * 2**20
GIT_SECONDS = 60.0
CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class LaunchConfig:
    """What all launches take."""

    command: tuple[str, ...] = setting((), "the verb and its words, behind the settings of the launch")
    dry_run: bool = setting(False, "print what would be run, and start nothing")


@dataclass(frozen=True)
class MeetingConfig(LaunchConfig):
    """How processes that are started together find each other."""

    port: int = setting(0, "where the processes meet; 0: a free one")
    timeout_minutes: float = setting(0.0, "how long a process waits for the others; 0: as long as the verb has it")

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise SettingError(f"port={self.port} must be from 1 to {2**16 - 1}, or 0")
        if not 0 <= self.timeout_minutes < float("inf"):
            raise SettingError(f"timeout_minutes={self.timeout_minutes} must be above 0, or 0 for what the verb has")

    @property
    def timeout(self) -> dict[str, str]:
        """The variable that tells a process how long to wait, if anything was said: doctor waits shorter than train."""
        return {TIMEOUT: f"{self.timeout_minutes:g}"} if self.timeout_minutes else {}


@dataclass(frozen=True)
class Program:
    """`python -m MODULE words`; folder: what it writes, None where it writes none; settings: resolved, as TOML;
    together: several processes of it share one work, and do not all do the whole."""

    verb: str
    module: str
    words: tuple[str, ...]
    folder: Path | None
    settings: str
    together: bool = True

    def refuse_company(self, count: int) -> None:
        """SettingError if `count` processes would get into each other's way."""
        if count > 1 and not self.together:
            raise SettingError(f"{self.verb} runs in one process, and this would start {count}")

    def command(self) -> list[str]:
        """On this machine."""
        return [sys.executable, "-u", "-m", self.module, *self.words]


def record(program: Program, config: Any) -> Path | None:
    """Write what was launched, how, and with which code, into the run folder; returns the folder of the record.

    Every launch has its own, numbered from 1. None for a program without a folder.
    """
    if program.folder is None:
        return None
    above = program.folder / "launch"
    taken = [int(path.name) for path in above.glob("*") if path.name.isdigit()]
    folder = above / f"{max(taken, default=0) + 1:03d}"
    folder.mkdir(parents=True)
    commit, diff = code_state(CHECKOUT)
    files = {
        "launch.toml": to_toml(config),
        "settings.toml": program.settings,
        "command.txt": shlex.join(["smalti", program.verb, *program.words]) + "\n",
        "code.txt": commit + "\n",
        "code.diff": diff,
    }
    for name, text in files.items():
        if text:
            write_bytes(folder / name, text.encode())
    return folder


def code_state(checkout: Path) -> tuple[str, str]:
    """The commit of a git checkout with the files that git does not have, and what differs in those it has; outside
    of a checkout the version that is installed, and ""."""
    if not (checkout / ".git").exists():
        return f"smalti {_version()}", ""
    commit = _git(checkout, "rev-parse", "HEAD")
    if not commit:
        return f"smalti {_version()}, in a git checkout that git does not read", ""
    files = _git(checkout, "ls-files", "--others", "--exclude-standard").split("\n")
    added = "".join(f"\nnot in git: {name}" for name in files if name)
    diff = _git(checkout, "diff", "HEAD")
    if len(diff) > MOST_DIFF_BYTES:
        diff = f"longer than {MOST_DIFF_BYTES} bytes; changed files:\n" + _git(checkout, "status", "--short")
    return f"git commit {commit.strip()}{added}", diff


def _git(checkout: Path, *words: str) -> str:
    """What git says; "" where it fails, or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *words],
            capture_output=True, text=True, errors="replace", timeout=GIT_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _version() -> str:
    try:
        return importlib.metadata.version("smalti")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def exit_code(codes: Iterable[int]) -> int:
    """The launch's code, given those of its processes in the order in which they ended.

    Negative codes are signals, told as shells tell them. What failed first is the reason; a planned stop is one only
    if nothing failed.
    """
    seen = [128 - code if code < 0 else code for code in codes if code]
    return next((code for code in seen if code not in PLANNED), seen[0] if seen else 0)
