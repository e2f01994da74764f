"""A launch over ssh, with stand-ins for ssh and DeepSpeed; `make lab` tries it with four hosts and the real ones."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import launch_hosts as door
from cluster.launch import Program
from cluster.launch_hosts import (
    HostfileConfig,
    Hosts,
    Watched,
    deepspeed_command,
    environment_lines,
    for_remote_shell,
    launch_hosts,
)
from cluster.process import LAUNCH
from cluster.settings import SettingError, UserError

SECRET = "hush" * 3  # which stands nowhere, not even in the record's diff of this file
WORDS = ["n=1", "a b", "$HOME `x` \\ \"q\" 'r'", "semi;colon", "it's", "$HOME", "50%n", "*", "[1,2]", "a\tb", '"', "\\"]


def program(*words: str) -> Program:
    return Program("paint", "art.paint", words, None, "")


def shell_reads(line: str) -> list[str]:
    """The words of a line as a host's shell sees them, after pdsh: pdsh(1) has %n for a number, %% for %."""
    line = re.sub("%[%n]", lambda found: {"%%": "%", "%n": "0"}[found[0]], line)
    shown = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, timeout=60, check=True
    )
    return shown.stdout.splitlines()


@pytest.mark.parametrize("word", WORDS)
def test_a_word_comes_through_deepspeed_and_the_hosts_shell(word: str) -> None:
    """DeepSpeed 0.19.8, PDSHRunner.parse_user_args: words with a space go between double quotes, and no others."""
    given = for_remote_shell(word)
    given = '"{}"'.format(given.replace('"', '\\"')) if " " in given else given
    assert shell_reads(given) == [word]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and an empty folder to work in, without variables that would be passed on."""
    for name in list(os.environ):
        if name.startswith(door.PASSED_NAMES) or name == "DS_ENV_FILE":
            monkeypatch.delenv(name)
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_the_environment_is_passed_by_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_DEBUG", "OMP_NUM_THREADS", "MINE", "NOT_MINE"):
        monkeypatch.setenv(name, f"of {name}")
    words = "MINE, OTHER=a=b,OMP_NUM_THREADS=2"
    lines = environment_lines(HostfileConfig(env=words), "mark")
    assert sorted(lines) == [
        "MINE=of MINE", "NCCL_DEBUG=of NCCL_DEBUG", "OMP_NUM_THREADS=2", "OTHER=a=b", "SMALTI_LAUNCH=mark",
    ]  # fmt: skip
    lines = environment_lines(HostfileConfig(env=words, timeout_minutes=1.5), "mark")
    assert sorted(lines) == [
        "MINE=of MINE", "NCCL_DEBUG=of NCCL_DEBUG", "OMP_NUM_THREADS=2", "OTHER=a=b", "SMALTI_LAUNCH=mark",
        "SMALTI_TIMEOUT_MINUTES=1.5",
    ]  # fmt: skip


def test_a_users_own_file_of_variables_still_counts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".deepspeed_env").write_text("A=1\n\n")
    Path(".deepspeed_env").write_text("B=2\n")
    assert environment_lines(HostfileConfig(), "mark")[:2] == ["A=1", "B=2"]
    (home / "third").write_text("C=3\n")
    monkeypatch.setenv("DS_ENV_FILE", str(home / "third"))
    assert environment_lines(HostfileConfig(), "mark")[0] == "C=3"
    (home / "third").write_text("C\n")
    with pytest.raises(SettingError, match="third: 'C' must be NAME=VALUE"):
        environment_lines(HostfileConfig(), "mark")


@pytest.mark.parametrize("value", ["plain", "a b", "$HOME", 'a"b', "a\\b", "`x`", "5%n"])
def test_a_value_comes_through_deepspeeds_export(home: Path, value: str) -> None:
    """DeepSpeed 0.19.8, MultiNodeRunner.add_export: double quotes round what has other characters than these."""
    line = environment_lines(HostfileConfig(env=f"X={value}"), "mark")[0].partition("=")[2]
    quoted = line if all(c.isalnum() or c in "_@%+=:,./-" for c in line) else f'"{line}"'
    assert shell_reads(quoted) == [value]


def test_a_variable_that_cannot_be_passed_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="env: NOT_THERE has no value here"):
        environment_lines(HostfileConfig(env="NOT_THERE"), "mark")
    monkeypatch.setenv("NCCL_DEBUG", "a\nb")
    with pytest.raises(SettingError, match="^env: the value of NCCL_DEBUG must be one line"):
        environment_lines(HostfileConfig(), "mark")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"env": "1X=2"}, "'1X=2' must be NAME"), ({"ssh_port": -1}, "ssh_port=-1"), ({"port": -1}, "port=-1"),
        ({"lost_after_seconds": 2}, "lost_after_seconds=2 must be at least 3"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(changes: dict[str, str], told: str) -> None:
    with pytest.raises(SettingError, match=told):
        HostfileConfig(**changes)  # type: ignore[arg-type]


def test_deepspeed_is_told_everything() -> None:
    config = HostfileConfig(hostfile="hosts", exclude="b:0", address="10.0.0.1", ssh_port=2222)
    words = deepspeed_command(config, program("red", "a;b"), 25000)
    assert words[:5] == [sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--hostfile=hosts"]
    assert {"--master_port=25000", "--exclude=b:0", "--master_addr=10.0.0.1", "--ssh_port=2222"} <= set(words)
    assert "--force_multi" in words  # else one host that is left would be this machine
    assert words[-4:] == ["--module", "art.paint", "red", "'a;b'"]


def test_a_dry_run_starts_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("hosts").write_text("a slots=2\nb slots=1\n")
    config = HostfileConfig(hostfile="hosts", exclude="a:0", port=25000, dry_run=True)
    assert launch_hosts(config, program("red", "a;b")) == 0
    told = capsys.readouterr().out
    assert told.startswith("on a: 1, b: 1, each with these variables")
    command = told.splitlines()[-1]
    assert command.startswith("DS_ENV_FILE=FILE PDSH_SSH_ARGS_APPEND='-o ServerAliveInterval=15 ")
    assert shlex.split(command)[2:] == deepspeed_command(config, program("red", "a;b"), 25000)


@pytest.mark.parametrize("folder", ["a b", "a;b", "a$HOME", "50%n"])
def test_a_folder_that_deepspeed_would_not_quote_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """DeepSpeed 0.19.8, PDSHRunner.get_cmd: folder, Python and address stand in a shell's line as they are."""
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    with pytest.raises(SettingError, match=re.escape(f"this folder, {str(tmp_path / folder)!r}, has characters")):
        deepspeed_command(HostfileConfig(), program(), 25000)
    monkeypatch.chdir(tmp_path)
    deepspeed_command(HostfileConfig(address="fe80::1"), program(), 25000)
    with pytest.raises(SettingError, match="address, 'a;b', has characters"):
        deepspeed_command(HostfileConfig(address="a;b"), program(), 25000)
    monkeypatch.setattr(sys, "executable", f"/opt/{folder}/python")
    with pytest.raises(SettingError, match=re.escape(f"this Python, '/opt/{folder}/python', has characters")):
        deepspeed_command(HostfileConfig(), program(), 25000)


@pytest.mark.parametrize("env", [f"OTHER=1,LAB_TOKEN={SECRET}", "LAB_TOKEN"])
def test_values_of_variables_are_kept_nowhere(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], env: str
) -> None:
    """They lie in a file that only this user can read, as long as the launch runs; the record has the names."""
    monkeypatch.setenv("LAB_TOKEN", SECRET)
    stand_in(tmp_path, "ssh", SSH, monkeypatch)
    stand_in(tmp_path, "pdsh", "exit 9", monkeypatch)
    Path("hosts").write_text("here slots=1\n")
    seen = []

    def run(launch: Watched) -> int:
        file = Path(launch.environment["DS_ENV_FILE"])
        seen.append((file, f"LAB_TOKEN={SECRET}" in file.read_text().split(), file.parent.stat().st_mode & 0o777))
        return 0

    monkeypatch.setattr(Watched, "run", run)
    paints = Program("paint", "art.paint", (), tmp_path / "out", "")
    config = HostfileConfig(hostfile="hosts", env=env)
    assert launch_hosts(config, paints) == 0
    assert launch_hosts(replace(config, dry_run=True), paints) == 0
    ((file, had_it, mode),) = seen
    assert (had_it, mode, file.exists()) == (True, 0o700, False)
    record = tmp_path / "out/launch/001"
    assert [path for path in record.rglob("*") if SECRET in path.read_text()] == []
    assert "LAB_TOKEN" in (record / "environment.txt").read_text().split()
    assert "LAB_TOKEN" in tomllib.loads((record / "launch.toml").read_text())["env"].split(",")
    told = capsys.readouterr().out
    assert "LAB_TOKEN" in told and SECRET not in told


def stand_in(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of this name before all others."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


SSH = """
while [ "$#" -gt 2 ]; do shift; done
[ "$1" = away ] && exit 255
exec sh -c "$2"
"""


def test_hosts_that_do_not_answer_are_named_before_anything_starts(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "ssh", SSH, monkeypatch)
    stand_in(tmp_path, "pdsh", "exit 9", monkeypatch)
    Path("hosts").write_text("here slots=2\naway slots=1\n")
    with pytest.raises(UserError, match="no ssh connection to away; try `ssh away true`"):
        launch_hosts(HostfileConfig(hostfile="hosts"), program())


def test_without_pdsh_the_line_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("hosts").write_text("here slots=2\n")
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(UserError, match="install the package pdsh"):
        launch_hosts(HostfileConfig(hostfile="hosts"), program())


@pytest.mark.parametrize(("interrupt", "code"), [(True, -signal.SIGINT), (False, -signal.SIGUSR1)])
def test_only_the_ranks_of_this_launch_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: bool, code: int
) -> None:
    stand_in(tmp_path, "ssh", SSH, monkeypatch)
    kinds = [{LAUNCH: "a1", "RANK": "0"}, {LAUNCH: "a1"}, {LAUNCH: "a12", "RANK": "0"}, {"RANK": "0"}]
    sleep = ["env", "--default-signal=INT", "sleep", "60"]  # tests that run in the background may be deaf to it
    sleepers = [subprocess.Popen(sleep, env={"PATH": os.environ["PATH"]} | kind) for kind in kinds]
    try:
        hosts = Hosts(["here", "there"], [], "a1")
        assert hosts.tell_ranks(interrupt)
        assert sleepers[0].wait(timeout=30) == code
        assert [one.poll() for one in sleepers[1:]] == [None, None, None]
        hosts.end(["there"])
        assert sleepers[1].wait(timeout=30) == -signal.SIGKILL
        assert [one.poll() for one in sleepers[2:]] == [None, None]
    finally:
        for one in sleepers:
            one.kill()
            one.wait()
