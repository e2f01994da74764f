"""Job scripts are run by bash against a pretended SLURM; tests/lab/slurm.py runs them in a real one."""

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import SettingError, UserError
from cluster.slurm.job import Job, SlurmConfig, directives, script, seconds_of, submit
from cluster.slurm.queue import submitted

LISTENS = """#!/bin/bash
trap 'exit 75' USR1 TERM
touch "{ready}"
while :; do sleep 0.02; done
"""
DEAF = """#!/bin/bash
touch "{ready}"
while :; do sleep 0.02; done
"""
SECONDS = 30.0  # in which bash does anything that is tried here


def job(tmp_path: Path, program: str = "#!/bin/bash\nexit 0\n", array: int = 0, **settings: Any) -> Job:
    """A job whose Python is that program."""
    path = tmp_path / "program"
    path.write_text(program.replace("{ready}", str(tmp_path / "ready")))
    path.chmod(0o755)
    config = SlurmConfig(python=str(path), **settings)
    return Job("train", "pretrain.train", ["emoji", "out=a b", "x=$HOME;'"], tmp_path / "my runs", config, array)


def start(one: Job, **environment: str) -> subprocess.Popen[str]:
    given = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[7-8]", **environment}
    return subprocess.Popen(
        ["bash", "-c", script(one)], env=os.environ | given, text=True, stdout=subprocess.PIPE, start_new_session=True
    )


def finish(one: Job, **environment: str) -> tuple[int, str]:
    process = start(one, **environment)
    told, _ = process.communicate(timeout=SECONDS)
    return process.returncode, told


def signalled(one: Job, tmp_path: Path, number: signal.Signals) -> int:
    """Exit code of a script that gets the signal once its program is up."""
    process = start(one)
    until = time.monotonic() + SECONDS
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=SECONDS)
    return process.returncode


def requeued(calls: Path) -> list[str]:
    return [line for line in calls.read_text().splitlines() if line.startswith("scontrol requeue")]


def test_srun_gets_the_words_as_they_were_given(calls: Path, tmp_path: Path) -> None:
    noted = tmp_path / "words"
    one = job(tmp_path, f'#!/bin/bash\nprintf "%s|" "$@" > {noted}\n')
    code, _ = finish(replace(one, words=[*one.words, "y=1\n2"]))
    assert (code, noted.read_text()) == (0, "-m|pretrain.train|emoji|out=a b|x=$HOME;'|y=1\n2|")
    line = next(line for line in calls.read_text().splitlines() if line.startswith("srun"))
    assert "--kill-on-bad-exit=0" in line and f"--output={tmp_path}/my runs/logs/train-%j-%t.log" in line


def test_the_ranks_are_told_where_rank_0_is(calls: Path, tmp_path: Path) -> None:
    noted = tmp_path / "where"
    finish(job(tmp_path, f'#!/bin/bash\necho "$MASTER_ADDR" > {noted}\n'))
    assert noted.read_text() == "10.0.0.7\n"
    assert "MASTER_PORT" not in script(job(tmp_path))  # cluster/process.py has a rule for it


def test_a_task_of_an_array_knows_its_number(calls: Path, tmp_path: Path) -> None:
    noted = tmp_path / "words"
    one = job(tmp_path, f'#!/bin/bash\nprintf "%s\\n" "$@" > {noted}\nexit 75\n', array=4)
    code, _ = finish(one, SLURM_ARRAY_JOB_ID="4700", SLURM_ARRAY_TASK_ID="3")
    assert (code, noted.read_text().splitlines()[-2:]) == (75, ["tasks=4", "task=3"])
    assert requeued(calls) == ["scontrol requeue 4700_3"]  # the id alone may be that of the whole array
    assert "--array=0-3" in directives(one)


@pytest.mark.parametrize("code", [0, 1, 2, 70, 130, 137])
def test_a_code_is_passed_on(code: int, calls: Path, tmp_path: Path) -> None:
    assert finish(job(tmp_path, f"#!/bin/bash\nexit {code}\n"))[0] == code
    assert not requeued(calls)


def test_saved_and_stopped_is_queued_again(calls: Path, tmp_path: Path) -> None:
    code, told = finish(job(tmp_path, "#!/bin/bash\nexit 75\n"), SLURM_RESTART_COUNT="2")
    assert (code, requeued(calls)) == (75, ["scontrol requeue 4711"])
    assert "starts on n[7-8], restart 2" in told


@pytest.mark.parametrize(("settings", "count"), [({"restarts": 3}, "3"), ({"requeue": False}, "0")])
def test_a_job_does_not_queue_itself_for_ever(settings: dict, count: str, calls: Path, tmp_path: Path) -> None:
    code, told = finish(job(tmp_path, "#!/bin/bash\nexit 75\n", **settings), SLURM_RESTART_COUNT=count)
    assert (code, requeued(calls)) == (75, [])
    assert "as often as it may be" in told


def test_the_signal_before_the_time_limit_reaches_the_program(calls: Path, tmp_path: Path) -> None:
    assert signalled(job(tmp_path, LISTENS), tmp_path, signal.SIGUSR1) == 75
    assert requeued(calls) == ["scontrol requeue 4711"]


def test_a_program_that_does_not_listen_is_queued_again_too(calls: Path, tmp_path: Path) -> None:
    assert signalled(job(tmp_path, DEAF), tmp_path, signal.SIGUSR1) == 75
    assert requeued(calls) == ["scontrol requeue 4711"]


def test_what_is_cancelled_stays_cancelled(calls: Path, tmp_path: Path) -> None:
    assert signalled(job(tmp_path, LISTENS), tmp_path, signal.SIGTERM) == 75
    assert not requeued(calls)


def test_a_signal_during_the_setup_starts_no_program(calls: Path, tmp_path: Path) -> None:
    one = job(tmp_path, setup="kill -USR1 $$")
    assert finish(one)[0] == 75
    assert requeued(calls) and "srun" not in calls.read_text()


def test_setup_lines_and_a_setup_file_come_before_the_program(calls: Path, tmp_path: Path) -> None:
    noted = tmp_path / "value"
    program = f'#!/bin/bash\necho "$VALUE" >> {noted}\n'
    (tmp_path / "setup.sh").write_text("# a remark\nexport VALUE=from-file\n")
    for setup in ("export VALUE=1; VALUE=from-lines", str(tmp_path / "setup.sh")):
        assert finish(job(tmp_path, program, setup=setup))[0] == 0
    assert noted.read_text() == "from-lines\nfrom-file\n"


def test_what_is_asked_of_slurm_stands_in_the_script(tmp_path: Path) -> None:
    one = job(
        tmp_path, partition="gpu", account="me", qos="high", constraint="a100&nvlink", time="2-12:30:00", nodes=4,
        gpus_per_node=8, cpus_per_process=12, memory="500G", signal_seconds=300,
        extra="--exclusive; #SBATCH --mail-type=END",
    )  # fmt: skip
    assert directives(one) == [
        "--job-name=train", f"--output='{tmp_path}/my runs/logs/train-%j.log'", "--open-mode=append",
        "--partition=gpu", "--account=me", "--qos=high", "--constraint='a100&nvlink'", "--time=2-12:30:00",
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=500G",
        "--signal=B:USR1@300", "--requeue", "--exclusive", "--mail-type=END",
    ]  # fmt: skip
    assert "srun --kill-on-bad-exit=0 --wait=600" in script(one) and " --cpus-per-task=12 " in script(one)


def test_what_is_not_asked_is_left_to_the_cluster(tmp_path: Path) -> None:
    asked = " ".join(directives(job(tmp_path, requeue=False)))
    assert "--no-requeue" in asked
    assert not [name for name in ("partition", "account", "mem", "gpus", "cpus", "array", "dep") if name in asked]


def test_a_container_brings_its_own_python() -> None:
    config = SlurmConfig(container="nvcr.io#x:1", srun="--container-mounts=/data 'a b'")
    text = script(Job("x", "m", [], Path("out"), config))
    assert "'--container-image=nvcr.io#x:1' --container-mounts=/data 'a b' python -m m &" in text


def test_a_percent_sign_in_a_folder_is_no_pattern() -> None:
    text = script(Job("x", "m", [], Path("10%j"), SlurmConfig()))
    assert "--output=10%%j/logs/x-%j.log" in text and "--output=10%%j/logs/x-%j-%t.log" in text


def test_submit_writes_the_script_the_log_folder_and_a_record(calls: Path, tmp_path: Path) -> None:
    one = job(tmp_path, array=2)
    assert submit(one) == "4711"
    assert one.path.read_text() == script(one) and (one.folder / "logs").is_dir()
    assert calls.read_text() == f"sbatch --parsable {one.path}\n"
    assert [(record.job, record.name, record.array) for record in submitted(one.folder)] == [("4711", "train", 2)]


def test_a_refusal_is_passed_on_in_one_line(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSAL", "sbatch: error: invalid partition specified: nope\nsbatch: error: it failed")
    with pytest.raises(UserError, match="^sbatch: error: invalid partition specified: nope sbatch: error: it failed$"):
        submit(job(tmp_path))
    assert not submitted(job(tmp_path).folder)


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no command sbatch here"):
        submit(job(tmp_path))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("1-2", 93600), ("1-2:30", 95400), ("2-00:00:01", 172801),
     ("0", 0)],
)  # fmt: skip
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"time": "tomorrow"}, "time='tomorrow'"), ({"time": "1:2:3:4"}, "time="), ({"time": ""}, "time=''"),
        ({"time": "2", "signal_seconds": 120}, "signal_seconds=120 must be below"),
        ({"signal_seconds": 0}, "signal_seconds=0"), ({"nodes": 0}, "nodes=0"), ({"restarts": -1}, "restarts=-1"),
        ({"gpus_per_node": -1}, "gpus_per_node=-1"), ({"memory": "lots"}, "memory='lots'"),
        ({"setup": "missing.sh"}, "setup='missing.sh'"), ({"extra": "--a; mail me"}, "extra: 'mail me'"),
        ({"srun": "'open"}, "srun="), ({"partition": "a\nb"}, "partition="),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingError, match=f"^{told}"):
        SlurmConfig(**settings)


def test_a_name_that_is_no_file_name_is_refused() -> None:
    with pytest.raises(SettingError, match="a job's name"):
        Job("a/b", "m", [], Path("out"), SlurmConfig())


def test_a_folder_that_would_end_a_directive_is_refused() -> None:
    with pytest.raises(SettingError, match=r"a job's folder must be one line .*'out\\ntouch gone'"):
        Job("x", "m", [], Path("out\ntouch gone"), SlurmConfig())
