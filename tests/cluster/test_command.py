"""Entry points: exit codes, one line for a user's mistake, a traceback for a bug of ours."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.command import Command, run_command
from cluster.settings import UserError, setting
from cluster.watch import Requeue


@dataclass(frozen=True)
class Config:
    steps: int = setting(3, "how many steps")
    out: str = setting("run", "folder to write")


PRINTS = """
import sys
from dataclasses import dataclass
from pathlib import Path
from cluster.command import Command, run_command
@dataclass(frozen=True)
class Config:
    pass
sys.exit(run_command(Command("say", Config, Path(), lambda config: print("x" * int(sys.argv[1])), "Says."), []))
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Command]:
    (tmp_path / "tiny.toml").write_text("steps = 1\n")

    def command(run: Callable[[Config], None] = lambda config: None) -> Command:
        return Command("paint", Config, tmp_path, run, "Paints.\n")

    return command


def raising(error: BaseException) -> Callable[[Config], None]:
    def run(config: Config) -> None:
        raise error

    return run


def test_a_command_runs_with_its_resolved_settings(make: Callable[..., Command]) -> None:
    got: list[Config] = []
    assert run_command(make(got.append), ["tiny", "out=here", "--local_rank=0"]) == 0
    assert got == [Config(1, "here")]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no such folder"), 1, "smalti paint: no such folder\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.tar"),
            1,
            "smalti paint: No space left on device: x.tar\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "smalti paint: No space left on device: while writing run\n",
        ),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "smalti paint: Broken pipe: while writing run\n"),
        (KeyboardInterrupt(), 130, "smalti paint: stopped; run the same command again to go on\n"),
        (Requeue(), 75, "smalti paint: stopped before the end (exit code 75); the same command goes on\n"),
    ],
)
def test_failures_are_one_line_and_an_exit_code(
    make: Callable[..., Command], capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    assert run_command(make(raising(error)), []) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("count", [1, 100_000])  # printed at the end, and at once
def test_output_that_cannot_be_written_is_a_line_and_output_that_nobody_reads_is_none(count: int) -> None:
    reader, pipe = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(pipe, "w") as unread:
        told = []
        for output in (full, unread):
            done = subprocess.run(
                [sys.executable, "-c", PRINTS, str(count)],
                stdout=output, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
            )  # fmt: skip
            told.append((done.returncode, done.stderr))
    assert told == [(1, "smalti say: No space left on device: while writing\n"), (141, "")]


def test_wrong_words_exit_2_and_point_to_the_help(
    make: Callable[..., Command], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(make(raising(AssertionError("ran"))), ["stpes=2"]) == 2
    said = capsys.readouterr().err
    assert "'stpes'" in said and "smalti paint --help" in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("broken data stream")])
def test_a_bug_keeps_its_traceback(make: Callable[..., Command], error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command(make(raising(error)), [])


def test_show_prints_settings_that_can_be_run_and_runs_nothing(
    make: Callable[..., Command], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(make(raising(AssertionError("ran"))), ["tiny", "out=x", "--show"]) == 0
    shown = tmp_path / "shown.toml"
    shown.write_text(capsys.readouterr().out)
    got: list[Config] = []
    assert run_command(make(got.append), [str(shown)]) == 0
    assert got == [Config(1, "x")]


def test_help_lists_presets_and_every_setting_with_its_default(
    make: Callable[..., Command], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(make(raising(AssertionError("ran"))), ["--help"]) == 0
    said = capsys.readouterr().out
    assert "Presets: tiny." in said and "Paints." in said
    assert [line.split()[0] for line in said.splitlines() if line.startswith("  ")] == ["steps=3", 'out="run"']
    assert "how many steps" in said
