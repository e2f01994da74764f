"""Several processes on this machine: they meet, hear each signal once, end together, and their code is ours."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import launch_local as door
from cluster.launch import Program
from cluster.launch_local import LocalConfig, launch_local, run_processes
from cluster.settings import SettingError, UserError

RANKS = [{"RANK": "0"}, {"RANK": "1"}]
LISTENS = """
import os, pathlib, signal, sys, time
heard = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: heard.append(number))
folder = pathlib.Path(sys.argv[1])
(folder / f"up{os.environ['RANK']}").write_text(str(os.getpid()))
until = time.monotonic() + 60
while not heard and time.monotonic() < until:
    time.sleep(0.05)
time.sleep(1)  # a second time would be heard now
(folder / f"heard{os.environ['RANK']}").write_text(" ".join(map(str, heard)))
sys.exit(130 if heard[:1] == [signal.SIGINT] else 75)
"""
LAUNCHES = f"""
import signal, sys
from cluster.launch_local import run_processes
signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sys.argv else signal.SIG_DFL)
sys.exit(run_processes([sys.executable, "-c", {LISTENS!r}, sys.argv[1]], {RANKS!r}))
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_alive(number: int) -> bool:
    """False also for one that has ended, and that nobody has asked for its code."""
    try:
        return bool(psutil.Process(number).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(paths: list[Path]) -> None:
    until = time.monotonic() + 60
    while not all(path.is_file() and path.read_text() for path in paths):
        assert time.monotonic() < until, paths
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "heard", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGTERM, 75),
        (signal.SIGUSR1, signal.SIGUSR1, 75), (signal.SIGHUP, signal.SIGTERM, 75),
    ],
)  # fmt: skip
def test_every_process_hears_a_signal_once_and_their_code_is_the_launchs(
    tmp_path: Path, number: signal.Signals, heard: signal.Signals, code: int
) -> None:
    """Sent to the whole group, as a terminal sends Ctrl-C."""
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    launch = subprocess.Popen([*python(LAUNCHES), str(tmp_path)], env=environment, start_new_session=True)
    try:
        wait_for([tmp_path / "up0", tmp_path / "up1"])
        os.killpg(launch.pid, number)
        assert launch.wait(timeout=60) == code
    finally:
        launch.kill()
    assert [(tmp_path / f"heard{rank}").read_text() for rank in (0, 1)] == [str(int(heard))] * 2
    assert not [rank for rank in (0, 1) if psutil.pid_exists(int((tmp_path / f"up{rank}").read_text()))]


def test_a_closed_terminal_is_heard_once_though_it_sends_two_signals(tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and so does the shell; a rank ends at once at a second SIGTERM."""
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    launch = subprocess.Popen([*python(LAUNCHES), str(tmp_path)], env=environment, start_new_session=True)
    try:
        wait_for([tmp_path / "up0", tmp_path / "up1"])
        for _ in range(2):
            os.killpg(launch.pid, signal.SIGHUP)
            time.sleep(0.3)  # or the two could become one; the ranks listen for a second
        assert launch.wait(timeout=60) == 75
    finally:
        launch.kill()
    assert [(tmp_path / f"heard{rank}").read_text() for rank in (0, 1)] == [str(int(signal.SIGTERM))] * 2


def test_under_nohup_a_closed_terminal_is_not_heard(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    launch = subprocess.Popen([*python(LAUNCHES), str(tmp_path), "nohup"], env=environment, start_new_session=True)
    try:
        wait_for([tmp_path / "up0", tmp_path / "up1"])
        os.killpg(launch.pid, signal.SIGHUP)
        time.sleep(0.3)  # or both could wait for the launch, which would hear the one with the lower number first
        os.killpg(launch.pid, signal.SIGUSR1)
        assert launch.wait(timeout=60) == 75
    finally:
        launch.kill()
    assert [(tmp_path / f"heard{rank}").read_text() for rank in (0, 1)] == [str(int(signal.SIGUSR1))] * 2


def test_when_one_fails_the_others_have_a_while_and_are_then_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "LAST_WORDS_SECONDS", 0.5)
    start = time.monotonic()
    code = run_processes(python("import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"),
                         RANKS)  # fmt: skip
    assert code == 3
    assert time.monotonic() - start < 30


def test_the_workers_of_a_process_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 ends by itself and leaves its worker behind; rank 0 is ended, and could not tell its own."""
    monkeypatch.setattr(door, "LAST_WORDS_SECONDS", 0.5)
    code = "import os, subprocess, sys, time; rank = os.environ['RANK']; worker = subprocess.Popen(['sleep', '60']); "
    code += "open(os.path.join(sys.argv[1], rank), 'w').write(str(worker.pid)); "
    code += "other = os.path.join(sys.argv[1], '0')\nwhile not os.path.exists(other): time.sleep(0.05)\n"
    code += "time.sleep(60) if rank == '0' else os._exit(3)"
    assert run_processes([*python(code), str(tmp_path)], RANKS) == 3
    workers = [int((tmp_path / rank).read_text()) for rank in "01"]
    until = time.monotonic() + 30
    while left := [worker for worker in workers if is_alive(worker)]:
        if time.monotonic() > until:
            for worker in left:
                os.kill(worker, signal.SIGKILL)
            pytest.fail(f"workers {left} of {workers} are left behind")
        time.sleep(0.05)


def test_who_stopped_as_planned_waits_for_the_others_however_long_they_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "LAST_WORDS_SECONDS", 0.0)
    saves = f"time.sleep(2); open({str(tmp_path / 'saved')!r}, 'w').close()"
    code = f"import os, sys, time\nif os.environ['RANK'] == '1': {saves}\nsys.exit(75)"
    assert run_processes(python(code), RANKS) == 75
    assert (tmp_path / "saved").is_file()


def test_a_process_that_was_killed_counts_as_the_shell_has_it() -> None:
    kill = "import os, signal, time; os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '0' else None"
    assert run_processes(python(kill), RANKS) == 137


def test_signals_are_heard_again_as_before_when_all_have_ended() -> None:
    before = [signal.getsignal(number) for number in door.HEARD]
    run_processes(python(""), RANKS)
    assert [signal.getsignal(number) for number in door.HEARD] == before


def test_what_cannot_be_started_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-such-program"):
        run_processes([str(tmp_path / "no-such-program")], RANKS)


MEETS = """
import json, os, pathlib, sys
from cluster.process import gathered, joined_place
with joined_place() as place:
    ranks = gathered(place, place.rank)
local = os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], os.environ.get("SMALTI_TIMEOUT_MINUTES")
pathlib.Path(sys.argv[1], f"{place.rank}.json").write_text(json.dumps([ranks, *local]))
"""


@pytest.fixture
def meets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A program whose processes join a group and write who was there; on CPUs, whatever the machine has."""
    monkeypatch.setattr(door, "n_accelerators", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "meets_here.py").write_text(MEETS)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("SMALTI_TIMEOUT_MINUTES", raising=False)
    return Program("meet", "meets_here", (str(tmp_path),), tmp_path / "out", "")


def test_the_processes_of_a_launch_meet(tmp_path: Path, meets: Program) -> None:
    assert launch_local(LocalConfig(processes=2, timeout_minutes=2.5), meets) == 0
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert said == [[[0, 1], "0", "2", "2.5"], [[0, 1], "1", "2", "2.5"]]
    assert (tmp_path / "out/launch/001/launch.toml").is_file()


def test_unless_told_a_launch_leaves_the_time_to_wait_to_the_verb(tmp_path: Path, meets: Program) -> None:
    assert launch_local(LocalConfig(processes=1), meets) == 0
    assert json.loads((tmp_path / "0.json").read_text()) == [[0], "0", "1", None]


def test_slurms_variables_around_a_launch_do_not_count(
    tmp_path: Path, meets: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert launch_local(LocalConfig(processes=1), meets) == 0
    assert json.loads((tmp_path / "0.json").read_text())[0] == [0]


def test_a_port_that_is_taken_is_told_before_anything_starts(tmp_path: Path, meets: Program) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port} is taken by another process"):
            launch_local(LocalConfig(processes=2, port=port), meets)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_every_process_and_starts_none(
    tmp_path: Path, meets: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch_local(LocalConfig(processes=2, dry_run=True), meets) == 0
    told = capsys.readouterr().out
    assert "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1" in told
    assert told.count(f"-u -m meets_here {tmp_path}") == 2
    assert not (tmp_path / "out").exists()


def test_the_number_of_processes_is_that_of_the_gpus_where_the_verb_shares_its_work(
    meets: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(door, "n_accelerators", lambda: 4)
    launch_local(LocalConfig(dry_run=True), meets)
    assert "WORLD_SIZE=4" in capsys.readouterr().out
    launch_local(LocalConfig(dry_run=True), Program("paint", "paint", (), None, "", together=False))
    assert "WORLD_SIZE=1" in capsys.readouterr().out
    with pytest.raises(SettingError, match="processes=5 must be at most the 4 GPUs"):
        launch_local(LocalConfig(processes=5), meets)


def test_a_negative_number_of_processes_is_refused() -> None:
    with pytest.raises(SettingError, match="processes=-1 must be at least 0"):
        LocalConfig(processes=-1)
