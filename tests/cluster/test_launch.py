"""What a launch leaves in the run folder, and the code it ends with."""

import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.launch import CHECKOUT, LaunchConfig, MeetingConfig, Program, code_state, exit_code, record
from cluster.settings import SettingError, setting


@dataclass(frozen=True)
class Config(LaunchConfig):
    processes: int = setting(2, "how many")


def paint(folder: Path | None) -> Program:
    return Program("paint", "art.paint", ("red", "a b", "out=x"), folder, "colour = 'red'\n")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with a commit, a change and a new file."""
    if not shutil.which("git"):
        pytest.skip("there is no git")
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "old.py").write_text("a = 1\n")
    by = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "old.py"], [*by, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True, timeout=60, capture_output=True)
    (folder / "old.py").write_text("a = 2\n")
    (folder / "new.py").write_text("")
    return folder


def test_every_launch_leaves_its_own_record(tmp_path: Path) -> None:
    first, second = (record(paint(tmp_path / "run"), Config(("paint", "red"), processes=n)) for n in (3, 4))
    assert (first, second) == (tmp_path / "run/launch/001", tmp_path / "run/launch/002")
    assert tomllib.loads((first / "launch.toml").read_text()) == {
        "command": ["paint", "red"], "dry_run": False, "processes": 3,
    }  # fmt: skip
    assert tomllib.loads((second / "launch.toml").read_text())["processes"] == 4
    assert (first / "settings.toml").read_text() == "colour = 'red'\n"
    assert (first / "command.txt").read_text() == "smalti paint red 'a b' out=x\n"
    assert (first / "code.txt").read_text().strip() == code_state(CHECKOUT)[0]


def test_a_program_without_a_folder_leaves_no_record() -> None:
    assert record(paint(None), Config()) is None


def test_the_record_tells_the_commit_and_what_differs_from_it(checkout: Path) -> None:
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], check=True, timeout=60, capture_output=True, text=True
    ).stdout.strip()
    told, diff = code_state(checkout)
    assert told == f"git commit {commit}\nnot in git: new.py"
    assert "-a = 1\n+a = 2\n" in diff


def test_outside_of_a_checkout_the_record_tells_the_version(tmp_path: Path) -> None:
    told, diff = code_state(tmp_path)
    assert told.startswith("smalti ")
    assert diff == ""


def test_a_checkout_that_git_refuses_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: nowhere\n")
    assert "that git does not read" in code_state(tmp_path)[0]


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([], 0), ([0, 0], 0), ([75, 75], 75), ([0, 75], 75), ([130, 75], 130), ([75, 1], 1), ([1, 70], 1),
        ([70, 1, 1], 70), ([-9, 1], 137), ([75, -15], 143),
    ],
)  # fmt: skip
def test_the_code_is_that_of_the_first_failure_else_of_the_planned_stop(codes: list[int], code: int) -> None:
    assert exit_code(codes) == code


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"port": -1}, "port=-1 must be"), ({"port": 65536}, "port=65536 must be"),
        ({"timeout_minutes": -1.0}, "timeout_minutes=-1.0 must be above 0"),
        ({"timeout_minutes": float("nan")}, "timeout_minutes=nan must be above 0"),
        ({"timeout_minutes": float("inf")}, "timeout_minutes=inf must be above 0"),
    ],
)  # fmt: skip
def test_a_meeting_that_cannot_be_is_refused(changes: dict[str, float], told: str) -> None:
    with pytest.raises(SettingError, match=told):
        MeetingConfig(**changes)  # type: ignore[arg-type]


def test_a_program_that_works_alone_refuses_company() -> None:
    alone = Program("paint", "art.paint", (), None, "", together=False)
    alone.refuse_company(1)
    paint(None).refuse_company(2)
    with pytest.raises(SettingError, match="paint runs in one process, and this would start 2"):
        alone.refuse_company(2)
