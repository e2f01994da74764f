"""How every entry point starts and fails: help, settings, one-line errors, exit codes.

Exit codes: 0 done, 1 a user's mistake or a full disk (one line says which), 2 wrong words, 70 hung,
75 stopped by a signal or a time limit and saved (start it again), 130 stopped by Ctrl-C, 141 stopped since nobody
reads what it prints (as `head`, which has seen enough).
"""

import os
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.manifest import FolderError
from cluster.process import launched_rank
from cluster.settings import SettingError, UserError, describe, load_settings, preset_names, to_toml
from cluster.watch import INTERRUPTED, REQUEUE, Requeue

UNREAD = 141  # as shells tell SIGPIPE
LAUNCHER_FLAGS = ("--local_rank", "--local-rank")  # old launchers add it; process.py reads LOCAL_RANK


@dataclass(frozen=True)
class Command:
    """One verb: its settings, where its presets lie, what it runs, and which settings plain words fill, in order.

    A verb of two words ("dvae import") is a verb like any other.
    """

    verb: str
    config: type
    presets: Path
    run: Callable[[Any], None]
    about: str
    plain: tuple[str, ...] = ()

    def settings(self, words: list[str]) -> Any:
        """The settings that the words give; SettingError as `load_settings` raises it."""
        return load_settings(self.config, words, self.presets, self.plain)

    def help(self) -> str:
        names = ", ".join(preset_names(self.presets)) or "none"
        plain = "".join(f"[{key.upper()}] " for key in self.plain)
        start = f"{plain}[FILE.toml]" if plain else "[PRESET | FILE.toml]"
        return (
            f"smalti {self.verb} {start} [key=value | --key value ...] [--show]\n\n"
            f"{self.about.strip()}\n\n"
            f"Presets: {names}.  --show prints the resolved settings and stops.\n\n"
            f"Settings (key=default):\n{describe(self.config)}\n"
        )


def run_command(command: Command, words: list[str]) -> int:
    """Run a verb on its words and return the exit code."""
    words = [word for word in words if not word.startswith(LAUNCHER_FLAGS)]
    config = None
    try:
        if "--help" in words or "-h" in words:
            print(command.help())
        else:
            config = command.settings([word for word in words if word != "--show"])
            if "--show" in words:
                print(to_toml(config), end="")
            else:
                command.run(config)
        print(end="", flush=True)  # here a full disk can still be told
    except SettingError as error:
        return _fail(command.verb, f"{error} (see `smalti {command.verb} --help`)", 2)
    except FolderError as error:
        return _fail(command.verb, str(error), 1)
    except KeyboardInterrupt:
        return _fail(command.verb, "stopped; run the same command again to go on", INTERRUPTED)
    except Requeue:
        return _fail(command.verb, f"stopped before the end (exit code {REQUEUE}); the same command goes on", REQUEUE)
    except UserError as error:
        return _fail(command.verb, str(error), 1, every_rank=True)
    except OSError as error:
        if error.strerror is None:
            raise
        unread = isinstance(error, BrokenPipeError) and _nobody_reads()
        _drop_output()
        if unread:
            return UNREAD
        out = getattr(config, "out", None)
        where = error.filename or (f"while writing {out}" if out else "while writing")
        return _fail(command.verb, f"{error.strerror}: {where}", 1, every_rank=True)
    return 0


def shown(name: object) -> str:
    """A path or a name as it may be printed: on one line, with what would steer a terminal escaped."""
    text = str(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _nobody_reads() -> bool:
    """True if standard output is a pipe whose reader has gone."""
    output = select.poll()
    output.register(1, 0)
    return bool(output.poll(0))


def _drop_output() -> None:
    """Send nowhere what could not be printed, or Python would complain once more at its end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(verb: str, line: str, code: int, every_rank: bool = False) -> int:
    """Say the line once: what all ranks find alike (settings, folders, Ctrl-C) only rank 0 says."""
    if every_rank or launched_rank() == 0:
        print(f"smalti {verb}: {shown(line)}", file=sys.stderr)
    return code
