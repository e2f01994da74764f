"""`smalti launch ...`: whose word is whose, what is refused before anything starts, and a real start of two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from cluster.command import run_command
from cluster.launch_local import LocalConfig, environments
from cluster.process import TIMEOUT
from cluster.settings import SettingError
from pretrain.cli import VERBS, command_of
from pretrain.launch import TOGETHER, launchable, program_of, split_at_verb
from pretrain.launch_hostfile import COMMAND as HOSTFILE
from pretrain.launch_local import COMMAND as LOCAL
from pretrain.launch_slurm import COMMAND as SLURM
from pretrain.launch_slurm import LaunchSlurmConfig
from tests.small import smalti

LAUNCHES = pytest.mark.parametrize("launch", [LOCAL, HOSTFILE, SLURM], ids=lambda one: one.verb)


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ("train emoji", 0), ("nodes=2 train emoji nodes=3", 1), ("--dry-run train emoji", 1),
        ("--partition train train emoji", 2), ("--partition=train train", 1), ("my.toml --nodes 2 dvae import a b", 3),
        ("partition=sample", 1), ("", 0),
    ],
)  # fmt: skip
def test_the_words_are_the_launchs_up_to_the_first_that_names_a_verb(words: str, own: int) -> None:
    given = words.split()
    assert split_at_verb(given, LaunchSlurmConfig) == (given[:own], given[own:])


@LAUNCHES
def test_the_verb_and_its_words_become_the_command(launch: type) -> None:
    config = launch.settings(["--dry-run", "train", "emoji", "n_steps=3"])
    assert config.command == ("train", "emoji", "n_steps=3")
    assert config.dry_run


def test_a_launch_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "launch.toml"
    path.write_text('processes = 3\ncommand = ["train", "emoji"]\n')
    config = LOCAL.settings([str(path), "port=25000"])
    assert (config.processes, config.port, config.command) == (3, 25000, ("train", "emoji"))
    assert LOCAL.settings([str(path), "sample"]).command == ("sample",)


@LAUNCHES
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train emoji n_stepps=3", "train: setting 'n_stepps' does not exist"),
        ("train emojy", "train: no preset is named 'emojy'"),
        ("nodess=2 train emoji", "setting 'nodess' does not exist"),
        ("trian emoji", "'trian' is no verb; there are: preprocess"),
        ("launch local train emoji", "'launch local' is no verb that can be launched"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    launch: type, words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(launch, words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"smalti {launch.verb}: {told}")
    assert said.count("\n") == 1


@LAUNCHES
def test_words_that_are_only_shown_are_checked_too(launch: type, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(launch, ["--show", "train", "emojy"]) == 2
    assert "train: no preset is named 'emojy'" in capsys.readouterr().err


@LAUNCHES
def test_a_launch_of_nothing_says_what_is_missing(launch: type, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(launch, []) == 2
    assert "no verb was given; it comes last: preprocess" in capsys.readouterr().err


@pytest.mark.parametrize("verb", launchable())
def test_a_verb_is_launched_together_if_its_processes_join_a_group(verb: str) -> None:
    path = Path(__file__).parents[2] / (VERBS[verb].replace(".", "/") + ".py")
    text = path.read_text()
    assert (verb in TOGETHER) == ("joined_place" in text or "meeting_place" in text)


@pytest.mark.parametrize(
    ("launch", "words"), [(LOCAL, "processes=2"), (HOSTFILE, "hostfile=hosts"), (SLURM, "nodes=2")]
)
def test_a_verb_that_works_alone_is_not_started_twice(
    launch: type, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("a slots=1\nb slots=1\n")
    assert run_command(launch, [words, "--dry-run", "rerank"]) == 2
    assert "rerank runs in one process, and this would start 2" in capsys.readouterr().err


def test_a_program_is_the_module_of_its_verb_and_knows_where_it_writes() -> None:
    program = program_of(("train", "emoji", "out=runs/mine"))
    assert (program.module, program.words) == ("pretrain.train", ("emoji", "out=runs/mine"))
    assert program.folder == Path("runs/mine")
    assert 'out = "runs/mine"' in program.settings
    with pytest.raises(SettingError, match="'pain' is no verb"):
        program_of(("pain",))


def test_a_job_script_runs_the_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["nodes=2", "gpus_per_node=4", "partition=big", "--dry-run", "train", "emoji", f"out={tmp_path}/run"]
    assert run_command(SLURM, words) == 0
    said = capsys.readouterr().out
    assert said.startswith("#!/bin/bash")
    assert "-m pretrain.train emoji" in said
    assert "#SBATCH --partition=big" in said
    assert not (tmp_path / "run").exists()


def test_without_slurm_a_submission_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command(SLURM, ["train", "emoji", f"out={tmp_path}/run"]) == 1
    assert "there is no command sbatch here" in capsys.readouterr().err


def test_a_submission_prints_the_jobs_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 4711\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert run_command(SLURM, ["tasks=3", "after=12,13", "tokenise", f"out={tmp_path}/run"]) == 0
    assert capsys.readouterr().out == f"job 4711: tokenise, logs in {tmp_path}/run/logs\n"
    script = (tmp_path / "run" / "scripts" / "tokenise.sh").read_text()
    assert "#SBATCH --array=0-2" in script
    assert "#SBATCH --dependency=afterok:12:13" in script
    assert (tmp_path / "run" / "launch" / "001" / "settings.toml").is_file()


@pytest.mark.parametrize(
    ("verb", "told"),
    [("train emoji", "train is not shared by tasks: setting 'tasks' does not exist"),
     ("preprocess merge emoji", "preprocess merge is one job, which ends what the tasks began")],
)  # fmt: skip
def test_an_array_of_what_is_not_shared_by_tasks_is_refused(
    verb: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(SLURM, ["tasks=2", "--dry-run", *verb.split()]) == 2
    assert capsys.readouterr().err.startswith(f"smalti launch slurm: tasks=2: {told}")


def test_a_run_whose_job_waits_is_submitted_again_only_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("sbatch", "echo 4711"), ("squeue", "echo '4711|PENDING|Priority'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    words = ["train", "emoji", f"out={tmp_path}/run"]
    assert [run_command(SLURM, words), run_command(SLURM, words)] == [0, 1]
    assert "wait or run: wait for them, or `scancel 4711`, or submit with after=4711" in capsys.readouterr().err
    assert not (tmp_path / "run" / "launch" / "002").exists()
    assert run_command(SLURM, ["after=4711", *words]) == 0


def test_a_real_start_ends_with_the_code_of_its_processes(tmp_path: Path) -> None:
    """A mistake that only the processes can find: every rank ends with 1."""
    done = smalti("launch", "local", "processes=2", "train", "emoji", f"tokens={tmp_path}", f"vocab={tmp_path}",
                  f"out={tmp_path}/run", check=False)  # fmt: skip
    assert done.returncode == 1
    assert "smalti train:" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_waits_as_long_as_its_own_settings_say_under_a_launch_too() -> None:
    """Rank 1 never comes; a run would wait for it for half an hour."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, _ = environments(LocalConfig(), 2, store.port)
    environment = {name: value for name, value in os.environ.items() if name != TIMEOUT} | first
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.doctor", "emoji", "timeout_seconds=2"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "not all 2 ranks came in" in done.stdout


def test_the_module_is_the_verb() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.launch_local", "processes=2", "--dry-run", "train", "emoji"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.count("-m pretrain.train emoji") == 2


def test_help_names_the_verb_that_comes_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command_of("launch hostfile"), ["--help"]) == 0
    assert "smalti launch hostfile [FILE.toml]" in capsys.readouterr().out.splitlines()[0]
